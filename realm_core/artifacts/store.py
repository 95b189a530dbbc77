"""The store: one folder a kind of artifact, one pointer that moves, and the names everything goes by.

home/
  home.json                 schema, settings and sources of this home
  corpus/v0001 …            also questions/ ict/ sparse_readers/: versions in the order they were made
  checkpoints/RUN-s0000500  also snapshots/ indexes/ verdicts/ evaluations/ readers/ results/: by checkpoint
  live.json                 the index version that answers; live.history.jsonl, every move it made
  trainer/RUN/              lease, step log and index swaps of a training run
"""

import json
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from realm_core.artifacts.manifest import MANIFEST, Manifest, Plan, read_manifest
from realm_core.artifacts.publish import append_durably, read_json_lines, write_durably
from realm_core.config import Config, config_from
from realm_core.errors import ArtifactError, ConfigError

SCHEMA = 1
VERSIONED = ("corpus", "questions", "ict", "sparse_readers")
BY_CHECKPOINT = ("checkpoints", "snapshots", "indexes", "verdicts", "evaluations", "readers", "results")
PRUNED = "pruned.json"
_KEY = re.compile(r"^(?P<run>[a-z0-9][a-z0-9_]*)-s(?P<step>\d{7})$")


def checkpoint_key(run: str, step: int) -> str:
    """Name of a checkpoint and of everything made from it; sorts by step within a run."""
    return f"{run}-s{step:07d}"


def parse_key(key: str) -> tuple[str, int]:
    """(run, step) of a checkpoint key. Raises ConfigError on anything else."""
    match = _KEY.match(key)
    if match is None:
        raise ConfigError(f"{key!r}: not a checkpoint key; they look like {checkpoint_key('r1', 500)}")
    return match["run"], int(match["step"])


@dataclass(frozen=True, kw_only=True)
class Live:
    """Which index version answers."""

    index: str  # its name, equal to the key of its checkpoint
    index_digest: str
    checkpoint_digest: str
    generation: int  # counts the moves of the pointer
    promoted_at: float  # seconds since the epoch
    reason: str
    dagster_run_id: str | None = None
    schema: int = SCHEMA


class Store:
    """Artifacts below one home folder."""

    def __init__(self, home: Path) -> None:
        self.home = home

    @classmethod
    def open(cls, home: Path) -> "Store":
        """Open an existing home. Raises ArtifactError if there is none or if a newer version wrote it."""
        store = cls(home)
        store.settings()
        return store

    @classmethod
    def create(cls, home: Path, config: Config, sources: Mapping[str, str], profile: str) -> "Store":
        """Create a home, or open it if it was made with the same settings and sources.

        Raises ConfigError naming the first setting that differs, ArtifactError if the folder cannot be written.
        """
        store = cls(home)
        wanted = {
            "schema": SCHEMA,
            "profile": profile,
            "sources": dict(sources),
            "config": config.model_dump(mode="json"),
        }
        if (home / "home.json").exists():
            found = store.settings()
            if difference := _first_difference(found, wanted):
                raise ConfigError(f"{home}: made with other settings: {difference}; pass them again or another --home")
            return store
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"{home}: cannot be created ({error.strerror}); choose another --home") from None
        write_durably(home / "home.json", json.dumps(wanted, indent=1) + "\n")
        return store

    def settings(self) -> dict[str, Any]:
        """Content of home.json."""
        path = self.home / "home.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found = values["schema"]
        except FileNotFoundError:
            raise ArtifactError(f"{self.home}: not a realm home; make one with realm demo or realm run") from None
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read ({error.strerror}); mend its permissions") from None
        except (ValueError, KeyError, TypeError):
            raise ArtifactError(f"{path}: damaged; restore it or choose another --home") from None
        if found != SCHEMA:
            raise ArtifactError(f"{path}: schema {found}, this code reads {SCHEMA}; use the version that wrote it")
        return values

    def config(self) -> Config:
        """The resolved settings of this home."""
        return config_from(self.settings()["config"], where=str(self.home / "home.json"))

    def source(self, name: str) -> Path:
        """A raw input of this home: `corpus` or `questions`."""
        return Path(self.settings()["sources"][name])

    # --- artifacts -----------------------------------------------------------------------------------------------

    def path(self, kind: str, name: str) -> Path:
        assert kind in VERSIONED + BY_CHECKPOINT, kind
        if not re.fullmatch(r"[a-z0-9][a-z0-9_.+-]*", name):
            raise ConfigError(f"{name!r}: not an artifact name; use lower-case letters, digits and _ . + -")
        return self.home / kind / name

    def names(self, kind: str) -> list[str]:
        """Finished artifacts of a kind, in name order; half-built and foreign folders are left out."""
        folder = self.home / kind
        if not folder.is_dir():
            return []
        return sorted(entry.name for entry in folder.iterdir() if entry.name[0] != "." and (entry / MANIFEST).is_file())

    def has(self, kind: str, name: str) -> bool:
        return (self.path(kind, name) / MANIFEST).is_file()

    def manifest(self, kind: str, name: str) -> Manifest:
        return read_manifest(self.path(kind, name))

    def newest(self, kind: str) -> Path:
        """Newest version of a kind. Raises ArtifactError if there is none."""
        names = self.names(kind)
        if not names:
            raise ArtifactError(f"{self.home}: no {kind} yet; materialise it first")
        return self.path(kind, names[-1])

    def version_for(self, kind: str, plan: Plan) -> Path:
        """The version that is the result of `plan`, or the folder of the next version if there is none yet."""
        assert kind in VERSIONED, kind
        names = self.names(kind)
        for name in reversed(names):
            if plan.describes(self.manifest(kind, name)):
                return self.path(kind, name)
        return self.path(kind, f"v{int(names[-1][1:]) + 1 if names else 1:04d}")

    def find(self, digest: str) -> Path | None:
        """Folder of the artifact whose manifest digest starts with `digest`."""
        for kind in VERSIONED + BY_CHECKPOINT:
            for name in self.names(kind):
                if self.manifest(kind, name).digest.startswith(digest):
                    return self.path(kind, name)
        return None

    def parent(self, folder: Path, role: str) -> Path:
        """Folder of the artifact that `folder` was made from in this role. Raises ArtifactError if it is gone."""
        digest = read_manifest(folder).parents[role]
        found = self.find(digest)
        if found is None:
            raise ArtifactError(f"{folder}: its {role} {digest[:12]} is not in this store; restore that folder")
        return found

    def checkpoints(self, run: str) -> list[str]:
        """Keys of a run's checkpoints whose weights are still there, oldest first."""
        return [
            key
            for key in self.names("checkpoints")
            if parse_key(key)[0] == run and not (self.path("checkpoints", key) / PRUNED).exists()
        ]

    def runs(self) -> list[str]:
        """Training runs that have left a checkpoint or a trainer folder."""
        started = self.home / "trainer"
        folders = {entry.name for entry in started.iterdir()} if started.is_dir() else set()
        return sorted(folders | {parse_key(key)[0] for key in self.names("checkpoints")})

    def trainer(self, run: str) -> Path:
        return self.home / "trainer" / run

    # --- the pointer ---------------------------------------------------------------------------------------------

    def live(self) -> Live | None:
        """The live index version, or None before the first promotion."""
        path = self.home / "live.json"
        try:
            return Live(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            raise ArtifactError(
                f"{path}: damaged; restore the last line of live.history.jsonl with realm promote"
            ) from None

    def require_live(self) -> Live:
        live = self.live()
        if live is None:
            raise ArtifactError(f"{self.home}: no index is live yet; run realm demo, realm run, or promote one")
        return live

    def move_live(self, index: str, index_digest: str, checkpoint_digest: str, reason: str, run_id: str | None) -> Live:
        """Move the pointer: history first, then one atomic replace. Only the promotion stage calls this."""
        with FileLock(self.home / ".live.lock"):
            before = self.live()
            live = Live(
                index=index,
                index_digest=index_digest,
                checkpoint_digest=checkpoint_digest,
                generation=(before.generation if before else 0) + 1,
                promoted_at=time.time(),
                reason=reason,
                dagster_run_id=run_id,
            )
            append_durably(self.home / "live.history.jsonl", asdict(live))
            write_durably(self.home / "live.json", json.dumps(asdict(live), indent=1) + "\n")
        return live

    def live_history(self) -> list[Live]:
        """Every move of the pointer, oldest first."""
        return [Live(**row) for row in read_json_lines(self.home / "live.history.jsonl")]

    # --- retention -----------------------------------------------------------------------------------------------

    def prune_checkpoints(self, run: str, keep: int, spare: set[str]) -> list[str]:
        """Drop the bytes of old checkpoints but keep their manifests, so that lineage stays walkable.

        Spared are the newest `keep`, those in `spare`, and whatever the live index was built from.
        """
        live = self.live()
        spared = spare | ({live.index} if live else set())
        dropped = []
        for key in self.checkpoints(run)[:-keep]:
            if key in spared or self._unembedded(key):
                continue
            folder = self.path("checkpoints", key)
            # The mark comes first: a crash in between leaves a checkpoint that says it is incomplete.
            write_durably(folder / PRUNED, json.dumps({"pruned_at": time.time()}) + "\n")
            for entry in folder.iterdir():
                if entry.name in (MANIFEST, PRUNED):
                    continue
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            dropped.append(key)
        return dropped

    def _unembedded(self, key: str) -> bool:
        # An index names the checkpoint whose query tower it must be asked with, so that checkpoint stays while
        # a refresh of it is under way: its scratch folder exists and its verdict does not.
        under_way = (self.home / "snapshots" / f".{key}.partial").exists() or self.has("snapshots", key)
        return under_way and not self.has("verdicts", key)


def _first_difference(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str | None:
    for key in sorted(found.keys() | wanted.keys()):
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if inner := _first_difference(old, new, f"{prefix}{key}."):
                return inner
        elif old != new:
            return f"{prefix}{key} is {old!r} there, {new!r} now"
    return None
