"""The index follower: swaps the live index into a running trainer at step borders, and remembers which one served when.

The pointer is looked at before every step. A new version is verified and loaded on a thread, so the trainer goes on with the
old one and stalls only for the exchange of a reference. Every swap is on disk before it takes effect; a run resumed from an
earlier checkpoint replays the swaps of the steps it repeats, so that it ends bit for bit where it would have ended.

Where several processes train together, the first one looks at the pointer and writes swaps down; a version serves from the
step at which all of them have it open, and one that some process cannot open serves none.
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from realm_core.artifacts.keys import checkpoint_of, parse_key
from realm_core.artifacts.publish import append_durably, read_json_lines
from realm_core.artifacts.store import Live, Store
from realm_core.errors import ArtifactError, RealmError
from realm_core.index.version import IndexVersion, open_version
from realm_core.model.device import Device
from realm_core.model.world import World

SWAPS = "swaps.jsonl"
_POLL_SECONDS = 0.5
_DECISION_SECONDS = 30.0  # from the scores of a version to its promotion, which takes less than one
_ALONE = World()


class IndexFollower:
    """Serves one index version at a time to one trainer. Its methods are collective."""

    def __init__(
        self, store: Store, folder: Path, device: Device, warn: Callable[[str], None], world: World = _ALONE
    ) -> None:
        self.store, self.folder, self.device, self.warn, self.world = store, folder, device, warn, world
        self.current: IndexVersion | None = None
        self._swaps = world.lead(lambda: read_json_lines(folder / SWAPS))
        self._replay_until = 0  # steps below it were run before and follow the recorded swaps
        self._loading: _Loading | None = None
        self._refused: set[tuple[str, str]] = set()  # name and digest: a pointer mended later is looked at anew
        self._left_behind: set[str] = set()  # checkpoints that nobody waits for any more
        self._told: str | None = None  # what was said of a pointer that cannot be read

    def resume(self, step: int, replay_until: int) -> None:
        """Start at `step`, with the index that served last; steps below `replay_until` ran before a crash and use the
        index they used then, and so does the step that a recorded swap was made for."""
        self._replay_until = max([replay_until, *(swap["step"] + 1 for swap in self._swaps)])
        recorded = self._recorded(step)
        if recorded is not None:
            self.current = self.world.together(lambda: self._open(recorded))

    @property
    def in_use(self) -> set[str]:
        """Checkpoints of the version that serves and of the one that is being read: a resumed run opens them again."""
        names = [self._loading.live.index] if self._loading else []
        return {checkpoint_of(name) for name in [*names, *([self.current.name] if self.current else [])]}

    def wait_for_first(self, seconds: float, should_stop: Callable[[], bool]) -> bool:
        """Wait until some index is live. False if asked to stop; RealmError when the time is over."""
        deadline = time.monotonic() + seconds

        def look() -> str:
            if self.current is not None or self.store.live() is not None:
                return "live"
            if should_stop():
                return "stop"
            if time.monotonic() > deadline:
                raise RealmError(
                    f"{self.store.home}: no index went live within {seconds:.0f} s; "
                    "start the daemon with realm up, or look at the refresh_index runs"
                )
            return "wait"

        while (found := self.world.lead(look)) == "wait":
            time.sleep(_POLL_SECONDS)
        return found == "live"

    def wait_for_young(self, step: int, max_age: int, of: str, seconds: float, should_stop: Callable[[], bool]) -> bool:
        """Wait while the index is more than `max_age` steps old and the newest checkpoint of training run `of` may still
        go live, at most so many seconds for each of them. False if asked to stop. A step that is repeated waits for nothing."""
        if step < self._replay_until:
            return True
        deadline = time.monotonic() + seconds

        def waits() -> bool:
            served = self._served_step(of)
            if served is None or step - served <= max_age:
                return False
            newest = self.store.checkpoints(of)[-1]
            if newest in self._left_behind or parse_key(newest)[1] <= served:
                return False
            if self._stays_behind(newest) or time.monotonic() > deadline:
                self._left_behind.add(newest)
                self.warn(f"no index of {newest} serves; training goes on with one older than pretrain.max_index_age")
                return False
            return True

        self._follow(step)
        while self.world.lead(waits):
            time.sleep(_POLL_SECONDS)
            if self.world.lead(should_stop):  # before the look: who lost the lease while it slept writes no swap
                return False
            self._follow(step)
        return True

    def _served_step(self, run: str) -> int | None:
        """Step of the checkpoint that serves; 0 if it is of another run, which this one may have started from."""
        if self.current is None:
            return None
        return self.current.step if parse_key(self.current.name)[0] == run else 0

    def _stays_behind(self, key: str) -> bool:
        """Whether it is known that a checkpoint will not serve: its index could not be opened, its verdict is against it, or
        it is scored and the pointer has not moved. What cannot be read is not known."""
        try:
            store, live = self.store, self.store.live()
            if live is not None and checkpoint_of(live.index) == key:
                return (live.index, live.index_digest) in self._refused
            if store.has("verdicts", key) and not store.manifest("verdicts", key).facts["passed"]:
                return True
            # The metric policy decides as soon as the scores are there.
            scored = store.manifest("evaluations", key).record["created"] if store.has("evaluations", key) else math.inf
        except RealmError:
            return False
        return time.time() - scored > _DECISION_SECONDS

    def at(self, step: int) -> IndexVersion:
        """The index version that serves this step; swaps first if there is a newer one ready."""
        recorded = self._recorded(step) if step < self._replay_until else None
        if recorded is None:
            self._follow(step)
        elif self.current is None or recorded != self.current.name:
            self.current = self.world.together(lambda: self._open(recorded))
        assert self.current is not None, "wait_for_first comes before the first step"
        return self.current

    def timeline(self, since: int) -> list[dict]:
        """Swaps at or after step `since`: {"step", "index", "index_digest"}."""
        keys = ("step", "index", "index_digest")
        return [{key: swap[key] for key in keys} for swap in self._swaps if swap["step"] >= since]

    def _follow(self, step: int) -> None:
        told = self.world.lead(self._news)
        if told is not None:
            live = Live(**told)
            if self.current is None:
                self._swap(step, self.world.together(lambda: self._open_live(live)))
            else:
                self._loading = _Loading(live, lambda: self._open_live(live))
        if self._loading is not None and self.world.every(self._loading.done()):
            loading, self._loading = self._loading, None
            problems = self.world.exchange(None if loading.version is not None else str(loading.error))
            if loading.version is not None and problems == [None] * self.world.size:
                self._swap(step, loading.version)
            else:
                self._refused.add((loading.live.index, loading.live.index_digest))
                why = "; ".join(f"{self._whose(rank)}{text}" for rank, text in enumerate(problems) if text is not None)
                self.warn(f"step {step}: index {loading.live.index} refused, the old one stays: {why}")

    def _news(self) -> dict[str, Any] | None:
        """The live index if it is one to open now. A pointer that cannot be read is told once; the old index stays."""
        try:
            live, self._told = self.store.live(), None
        except RealmError as problem:
            if self.current is None:
                raise
            if self._told != str(problem):
                self._told = str(problem)
                self.warn(f"index {self.current.name} stays: {problem}")
            return None
        return asdict(live) if live is not None and self._loading is None and self._is_new(live) else None

    def _whose(self, rank: int) -> str:
        return f"{World(rank, self.world.size)}: " if self.world.size > 1 else ""

    def _is_new(self, live: Live) -> bool:
        return (live.index, live.index_digest) not in self._refused and (
            self.current is None or live.index_digest != self.current.digest
        )

    def _swap(self, step: int, version: IndexVersion) -> None:
        swap = {"step": step, "index": version.name, "index_digest": version.digest, "time": time.time()}
        self.world.lead(lambda: append_durably(self.folder / SWAPS, swap))
        self._swaps.append(swap)
        self.current = version

    def _recorded(self, step: int) -> str | None:
        names = [swap["index"] for swap in self._swaps if swap["step"] <= step]
        return names[-1] if names else None

    def _open_live(self, live: Live) -> IndexVersion:
        """Raises ArtifactError before anything is read if the pointer says another digest than the index has."""
        digest = self.store.manifest("indexes", live.index).digest
        if digest != live.index_digest:
            raise ArtifactError(
                f"{self.store.home / 'live.json'}: says {live.index} has digest {live.index_digest[:12]}, it has "
                f"{digest[:12]}: somebody edited it; realm promote {live.index} mends it"
            )
        return self._open(live.index)

    def _open(self, name: str) -> IndexVersion:
        index = self.store.path("indexes", name)
        checkpoint, corpus = (self.store.parent(index, role) for role in ("checkpoint", "corpus"))
        return open_version(index, checkpoint=checkpoint, corpus=corpus, device=self.device, world=self.world)


@dataclass
class _Loading:
    """A version being verified and read on a thread."""

    live: Live
    load: Callable[[], IndexVersion]
    version: IndexVersion | None = None
    error: Exception | None = None

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.version = self.load()
        except Exception as error:  # handed to the trainer's thread, which keeps the old index
            self.error = error

    def done(self) -> bool:
        return not self._thread.is_alive()
