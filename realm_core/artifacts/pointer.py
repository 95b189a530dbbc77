"""The pointer: which index version answers, and every move it made. `live.json` and `live.history.jsonl` of a home."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from realm_core.artifacts.keys import parse_key
from realm_core.artifacts.publish import append_durably, operator_error, read_json_lines, write_durably
from realm_core.errors import ArtifactError, ConfigError

SCHEMA = 1  # of home.json too
_DAMAGE = (ValueError, KeyError, TypeError)  # what reading a pointer raises that holds something else


@dataclass(frozen=True, kw_only=True)
class Live:
    """Which index version answers."""

    index: str  # its name: the key of its checkpoint, and the version of the corpus where that has grown since
    index_digest: str
    checkpoint_digest: str
    generation: int  # counts the moves of the pointer
    promoted_at: float  # seconds since the epoch
    reason: str
    dagster_run_id: str | None = None
    schema: int = SCHEMA


class Pointer:
    """The pointer of one home folder."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._pointer_lock = FileLock(home / ".live.lock")

    def live(self) -> Live | None:
        """The live index version, or None before the first promotion."""
        try:
            return self._read_live()
        except _DAMAGE:
            raise ArtifactError(
                f"{self.home / 'live.json'}: damaged; put the last line of live.history.jsonl in its place, "
                "as the next realm promote or realm rollback does"
            ) from None

    def _read_live(self) -> Live | None:
        """`live`, with the errors of reading where the file holds something else than a pointer."""
        path = self.home / "live.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read ({error.strerror}); mend its permissions") from None
        if values["schema"] != SCHEMA:
            raise ArtifactError(
                f"{path}: schema {values['schema']}, this code reads {SCHEMA}; use the version that wrote it"
            )
        return _live_of(values)

    def mend_live(self) -> str | None:
        """Put the last line of the history in the place of a `live.json` that is damaged, which is kept beside it.

        Says what was done; None if there was nothing to mend. The caller holds `pointer_lock`.
        """
        try:
            self._read_live()
            return None
        except _DAMAGE:
            pass
        path, last = self.home / "live.json", self.live_history()[-1:]
        try:
            os.replace(path, path.with_name("live.json.damaged"))
        except OSError as error:
            raise operator_error(error, path) from None
        if not last:
            return f"{path}: was damaged, and no history tells what was live; it is live.json.damaged now"
        write_durably(path, json.dumps(asdict(last[0]), indent=1) + "\n")
        return f"{path}: was damaged; {last[0].index} of the last line of live.history.jsonl took its place"

    def require_live(self) -> Live:
        live = self.live()
        if live is None:
            raise ArtifactError(f"{self.home}: no index is live yet; run realm demo, realm run, or promote one")
        return live

    def move_live(self, index: str, index_digest: str, checkpoint_digest: str, reason: str, run_id: str | None) -> Live:
        """Move the pointer: history first, then one atomic replace. Only the promotion stage calls this."""
        with self.pointer_lock():
            self.mend_live()
            history = self.live_history()[-1:]  # a crash may have left a last line that live.json never showed
            before = [live.generation for live in (self.live(), *history) if live is not None]
            live = Live(
                index=index,
                index_digest=index_digest,
                checkpoint_digest=checkpoint_digest,
                generation=max(before, default=0) + 1,
                promoted_at=time.time(),
                reason=reason,
                dagster_run_id=run_id,
            )
            append_durably(self.home / "live.history.jsonl", asdict(live))
            write_durably(self.home / "live.json", json.dumps(asdict(live), indent=1) + "\n")
        return live

    def live_history(self) -> list[Live]:
        """Every move of the pointer, oldest first."""
        moves = []
        for row in read_json_lines(self.home / "live.history.jsonl"):
            with suppress(*_DAMAGE):  # a line that somebody else wrote there
                if row.get("schema") == SCHEMA:
                    moves.append(_live_of(row))
        return moves

    def live_before(self, index: str) -> Live | None:
        """The version that was live before `index`, which is the live one as long as `index` has not gone live itself."""
        live, moves = self.live(), self.live_history()
        if live is None or (index != live.index and not any(move.index == index for move in moves)):
            return live
        last = max((place for place, move in enumerate(moves) if move.index == index), default=len(moves))
        return next((move for move in reversed(moves[:last]) if move.index != index), None)

    def rollback_target(self) -> Live | None:
        """What a rollback goes back to: the version that was live before and that nobody went back from since.

        Of a pointer that somebody edited this is what the last promotion made live.
        """
        live, moves = self.live(), self.live_history()
        if live is None:
            return None
        if live in moves[-2:-1]:  # a crash came between the last line and the pointer: it never went live
            moves = moves[:-1]
        standing = [move for move in _standing(moves) if move.index != live.index]
        return standing[-1] if standing else None

    @contextmanager
    def pointer_lock(self) -> Iterator[None]:
        """Held from the look at the live version to the move: two promotions never decide on the same state. Reentrant."""
        try:
            self._pointer_lock.acquire()
        except OSError as error:
            raise operator_error(error, self.home) from None
        try:
            yield
        finally:
            self._pointer_lock.release()


def _live_of(values: Mapping[str, Any]) -> Live:
    """Raises one of _DAMAGE unless these are the values of a pointer."""
    live = Live(**values)
    if not all(isinstance(text, str) for text in (live.index, live.index_digest, live.checkpoint_digest)):
        raise TypeError("names and digests are text")
    return live


def _standing(moves: Sequence[Live]) -> list[Live]:
    """The moves that were not taken back: going back to a version takes back all that went live after it, and going back
    to an earlier step that was not live takes back the later steps of its run."""
    standing: list[Live] = []
    for move in moves:
        names = [each.index for each in standing]
        if move.index in names:
            standing = standing[: names.index(move.index)]
        else:
            while standing and _is_later(standing[-1].index, move.index):
                standing.pop()
        standing.append(move)
    return standing


def _is_later(name: str, other: str) -> bool:
    """Whether one version is of a later step of the same run as another."""
    try:
        (run, step), (other_run, other_step) = parse_key(name), parse_key(other)
    except ConfigError:
        return False
    return run == other_run and step > other_step
