"""The store: one folder a kind of artifact, one pointer that moves, and the names everything goes by.

home/
  home.json                 schema, settings and sources of this home
  corpus/v0001 …            also pretrain_corpus/ questions/ ict/ sparse_readers/: versions in the order they were made
  checkpoints/RUN-s0000500  also snapshots/ indexes/ drifts/ verdicts/ evaluations/ readers/ results/: by checkpoint, and
                            RUN-s0000500+v0002 … where the corpus has grown since (see keys, corpora)
  live.json                 the index version that answers; live.history.jsonl, every move it made
  trainer/RUN/              lease, step log and index swaps of a training run
"""

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from realm_core.artifacts.keys import (
    checkpoint_key,
    checkpoint_of,
    is_key,
    is_run_name,
    parse_key,
    require_run_name,
)
from realm_core.artifacts.lease import Lease
from realm_core.artifacts.manifest import MANIFEST, PRUNED, QUARANTINED, Manifest, Plan, file_sha256, read_manifest
from realm_core.artifacts.pointer import SCHEMA, Live, Pointer
from realm_core.artifacts.publish import append_durably, operator_error, write_durably
from realm_core.config import OPERATION, SAVING, Config
from realm_core.errors import ArtifactError, ConfigError
from realm_core.params import config_from

__all__ = ["BY_CHECKPOINT", "PRUNED", "VERSIONED", "Live", "Store", "checkpoint_key", "parse_key", "require_run_name"]

REFRESHING = "refreshing.json"  # checkpoints whose refresh waits or runs
COLLAPSED = "collapsed.json"  # in the trainer folder of a run that collapsed
VERSIONED = ("corpus", "pretrain_corpus", "questions", "ict", "sparse_readers")
BY_CHECKPOINT = ("checkpoints", "snapshots", "indexes", "drifts", "verdicts", "evaluations", "readers", "results")
_VERSION = re.compile(r"^v\d{4,}$")


class Store(Pointer):
    """Artifacts below one home folder, and its pointer."""

    @classmethod
    def open(cls, home: Path) -> "Store":
        """Open an existing home. Raises ArtifactError if there is none or if a newer version wrote it."""
        store = cls(home)
        store.settings()
        return store

    @classmethod
    def create(cls, home: Path, config: Config, sources: Mapping[str, str], profile: str) -> "Store":
        """Create a home, or open it if it was made with the same settings and sources; a source may have moved elsewhere.

        Until a training run has begun, other settings and sources simply take the place of the first ones: what was made
        from those stays as a version of its own. Later, only the sections of OPERATION may change, and a ConfigError names
        the first other setting that differs.
        Raises ArtifactError if the folder cannot be written.
        """
        store = cls(home)
        wanted = {
            "schema": SCHEMA,
            "profile": profile,
            "sources": dict(sources),
            "config": config.model_dump(mode="json"),
        }
        found = store._settings_if_any()
        if found == wanted:
            return store
        began = found if store.names("checkpoints") else None
        if began:
            moved = {
                kind: path
                for kind, path in sources.items()
                if path != began["sources"].get(kind) and store._was_made_from(kind, Path(path))
            }
            began = {**began, "sources": began["sources"] | moved}
        if began and (difference := first_difference(_without_operation(began), _without_operation(wanted))):
            raise ConfigError(f"{home}: made with other settings: {difference}; pass them again or another --home")
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"{home}: cannot be created ({error.strerror}); choose another --home") from None
        store.write_settings(wanted)
        return store

    def _was_made_from(self, kind: str, source: Path) -> bool:
        """Whether the content of this file is what versions of `kind` were made from, wherever the file lay then. What a
        corpus took in later (stage grow) is no source of the home."""
        if not source.is_file():
            return False
        digest = file_sha256(source)
        made = (self.manifest(kind, name) for name in self.names(kind))
        return any(manifest.stage != "grow" and digest in manifest.sources.values() for manifest in made)

    def write_settings(self, values: Mapping[str, Any]) -> None:
        """Replace the content of home.json; the settings that it held stay in settings.history.jsonl."""
        before = self._settings_if_any()
        if before is not None:
            append_durably(self.home / "settings.history.jsonl", {"until": time.time(), "config": before["config"]})
        write_durably(self.home / "home.json", json.dumps(dict(values), indent=1) + "\n")

    def settings(self) -> dict[str, Any]:
        """Content of home.json."""
        values = self._settings_if_any()
        if values is None:
            raise ArtifactError(f"{self.home}: not a realm home; make one with realm demo or realm run")
        return values

    def _settings_if_any(self) -> dict[str, Any] | None:
        path = self.home / "home.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found = values["schema"]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read ({error.strerror}); mend its permissions") from None
        except (ValueError, KeyError, TypeError):
            raise ArtifactError(f"{path}: damaged; restore it or choose another --home") from None
        if found != SCHEMA:
            raise ArtifactError(f"{path}: schema {found}, this code reads {SCHEMA}; use the version that wrote it")
        return values

    @property
    def identity(self) -> str:
        """What tells this home from every other on a service that several share: 32 hexadecimal digits, made once."""
        path = self.home / "home.id"
        with suppress(FileNotFoundError):
            return path.read_text(encoding="utf-8").strip()
        mine = self.home / f".home.id.{os.getpid()}"
        try:
            mine.write_text(uuid.uuid4().hex + "\n", encoding="utf-8")
            with suppress(FileExistsError):  # of two processes at once the first one names the home
                os.link(mine, path)
            mine.unlink()
        except OSError as error:
            raise operator_error(error, path) from None
        return path.read_text(encoding="utf-8").strip()

    def config(self) -> Config:
        """The resolved settings of this home."""
        return config_from(self.settings()["config"], where=str(self.home / "home.json"))

    def source(self, name: str) -> Path:
        """A raw input of this home: `corpus`, `questions`, or `pretrain_corpus`. Raises ConfigError if it has none such."""
        sources = self.settings()["sources"]
        if name not in sources:
            raise ConfigError(f"{self.home}: made without a source named {name}; it has {', '.join(sources) or 'none'}")
        return Path(sources[name])

    def has_source(self, name: str) -> bool:
        return name in self.settings()["sources"]

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

    def keys(self, kind: str) -> list[str]:
        """`names` that are keys of checkpoints: a copy that somebody laid beside them is none of ours."""
        return [name for name in self.names(kind) if is_key(name)]

    def foreign(self) -> list[str]:
        """KIND/NAME of what lies among checkpoints, versions and trainers and is passed over for its name."""
        kinds = [kind for kind in BY_CHECKPOINT if kind not in ("readers", "results")]
        found = [f"{kind}/{name}" for kind in kinds for name in self.names(kind) if not is_key(name)]
        return found + [f"trainer/{name}" for name in self._trainers() if not is_run_name(name)]

    def has(self, kind: str, name: str) -> bool:
        return (self.path(kind, name) / MANIFEST).is_file()

    def manifest(self, kind: str, name: str) -> Manifest:
        return read_manifest(self.path(kind, name))

    def newest(self, kind: str) -> Path:
        """Newest version of a kind. Raises ArtifactError if there is none."""
        names = self._versions(kind)
        if not names:
            raise ArtifactError(f"{self.home}: no {kind} yet; materialise it first")
        return self.path(kind, names[-1])

    def pretraining_corpus(self) -> Path:
        """Where masked queries are drawn from: a corpus of its own if this home has one, else the one retrieved from."""
        return self.newest("pretrain_corpus" if self.has_source("pretrain_corpus") else "corpus")

    def version_for(self, kind: str, plan: Plan) -> Path:
        """The newest version if it is the result of `plan`, else the folder of the next version.

        An older version of the same plan is made again under a new number: what counts is always the newest.
        """
        assert kind in VERSIONED, kind
        names = self._versions(kind)
        if names and plan.describes(self.manifest(kind, names[-1])):
            return self.path(kind, names[-1])
        return self.next_version(kind)

    def next_version(self, kind: str) -> Path:
        """The folder of a version that is still to be made."""
        names = self._versions(kind)
        return self.path(kind, f"v{int(names[-1][1:]) + 1 if names else 1:04d}")

    def _versions(self, kind: str) -> list[str]:
        """v0001, v0002 … in the order they were made; a folder somebody named otherwise is no version."""
        return sorted((name for name in self.names(kind) if _VERSION.match(name)), key=lambda name: int(name[1:]))

    def find(self, digest: str) -> Path | None:
        """Folder of the artifact whose manifest digest starts with `digest`."""
        for kind, name in self.everything():
            if self.manifest(kind, name).digest.startswith(digest):
                return self.path(kind, name)
        return None

    def everything(self) -> Iterator[tuple[str, str]]:
        """(kind, name) of every finished artifact; of a kind, what goes by a key comes before the copies of it."""
        for kind in VERSIONED + BY_CHECKPOINT:
            yield from ((kind, name) for name in sorted(self.names(kind), key=lambda name: (not is_key(name), name)))

    def parent(self, folder: Path, role: str) -> Path:
        """Folder of the artifact that `folder` was made from in this role. Raises ArtifactError if it is gone."""
        digest = read_manifest(folder).parents[role]
        found = self.find(digest)
        if found is None:
            raise ArtifactError(f"{folder}: its {role} {digest[:12]} is not in this store; restore that folder")
        return found

    def checkpoints(self, run: str) -> list[str]:
        """Keys of a run's checkpoints that can be gone on from, oldest first: weights are there and nobody warns of them."""
        return [
            key
            for key in self.keys("checkpoints")
            if parse_key(key)[0] == run and not (self.is_pruned(key) or self.is_quarantined(key))
        ]

    def is_pruned(self, checkpoint: str) -> bool:
        """Whether retention has dropped the weights."""
        return (self.path("checkpoints", checkpoint) / PRUNED).exists()

    def is_quarantined(self, checkpoint: str) -> bool:
        """Whether it is set aside: neither resumed from nor refreshed nor promoted, but kept for whoever asks why."""
        return (self.path("checkpoints", checkpoint) / QUARANTINED).exists()

    def quarantine(self, checkpoint: str, reason: str) -> None:
        """Set a checkpoint aside."""
        mark = self.path("checkpoints", checkpoint) / QUARANTINED
        write_durably(mark, json.dumps({"reason": reason, "time": time.time()}) + "\n")

    def collapse(self, run: str) -> str | None:
        """Why a run ended for good: its retriever collapsed; None while it may go on or has reached its end."""
        aside = [key for key in self.keys("checkpoints") if parse_key(key)[0] == run and self.is_quarantined(key)]
        marks = [self.trainer(run) / COLLAPSED, *(self.path("checkpoints", key) / QUARANTINED for key in aside)]
        for mark in marks:  # the first is absent where an earlier version set checkpoints aside
            with suppress(FileNotFoundError):
                return str(json.loads(mark.read_text(encoding="utf-8"))["reason"])
        return None

    def end_collapsed(self, run: str, good: str, reason: str) -> None:
        """Nothing goes on from this run but another one, from its checkpoint `good`; later ones are set aside."""
        keys = self.checkpoints(run)
        write_durably(self.trainer(run) / COLLAPSED, json.dumps({"reason": reason, "time": time.time()}) + "\n")
        for key in keys[keys.index(good) + 1 :]:
            self.quarantine(key, reason)

    def runs(self) -> list[str]:
        """Training runs that have left a checkpoint or a trainer folder."""
        folders = {name for name in self._trainers() if is_run_name(name)}
        return sorted(folders | {parse_key(key)[0] for key in self.keys("checkpoints")})

    def _trainers(self) -> list[str]:
        started = self.home / "trainer"
        return sorted(entry.name for entry in started.iterdir() if entry.is_dir()) if started.is_dir() else []

    def trainer(self, run: str) -> Path:
        return self.home / "trainer" / require_run_name(run)

    def training_lease(self, run: str) -> Lease:
        """The one lease of a training run, whoever trains it: the detached trainer, a segment, or a command.

        Looking at it makes no folder; taking it does.
        """
        settings = self.config().supervise
        path = self.trainer(run) / "lease.json"
        return Lease(path, settings.heartbeat_seconds, settings.stale_seconds, makes_folder=True)

    def require_run(self, run: str) -> None:
        """Raise ConfigError unless this training run has begun here."""
        if require_run_name(run) not in (known := self.runs()):
            raise ConfigError(f"{self.home}: no training run {run}; there is {', '.join(known) or 'none yet'}")

    # --- retention -----------------------------------------------------------------------------------------------

    def prune_checkpoints(self, run: str, keep: int, spare: set[str]) -> list[str]:
        """Drop the bytes of old checkpoints but keep their manifests, so that lineage stays walkable.

        Spared are the newest `keep`, those in `spare`, what the live index and the one before it were built from, what an
        index or a reader that is still there was made from, and what is being refreshed or waits for it. Nothing goes while
        the pointer cannot be read: nobody knows then what it needs.
        """
        try:
            live, before = self.live(), self.rollback_target()
        except ArtifactError:
            return []
        pinned = {move.index for move in (live, before) if move}
        spared = {checkpoint_of(name) for name in spare | pinned | self._still_opened()} | set(self.refreshing())
        dropped = []
        for key in self.checkpoints(run)[:-keep]:
            if key in spared or self._being_refreshed(key, live):
                continue
            # The mark comes first: a crash in between leaves a checkpoint that says it is incomplete.
            mark = self.path("checkpoints", key) / PRUNED
            write_durably(mark, json.dumps({"pruned_at": time.time()}) + "\n")
            dropped.append(key)
        for key in self.keys("checkpoints"):  # those marked just now, and what a crash left of earlier ones
            folder = self.path("checkpoints", key)
            if parse_key(key)[0] == run and (folder / PRUNED).exists():
                _drop_files(folder)
        return dropped

    def _still_opened(self) -> set[str]:
        """Indexes and readers with bytes: an index is asked with the query tower of its checkpoint, and a reader that was
        tuned on it with the rest of that retriever."""
        kinds = ("indexes", "readers")
        return {name for kind in kinds for name in self.keys(kind) if not (self.path(kind, name) / PRUNED).exists()}

    def _being_refreshed(self, key: str, live: Live | None) -> bool:
        """Whether an index of this checkpoint may still go live: it must then be asked with this query tower.

        True from the first embedded shard until the verdict refuses it, it is scored, or a later step is live.
        """
        grown = {path.name.strip(".").removesuffix(".partial") for path in (self.home / "snapshots").glob(f"*{key}+*")}
        return any(self._may_go_live(name, live) for name in {key, *grown})

    def note_refreshing(self, checkpoints: Collection[str]) -> None:
        """Keep what a refresh was asked for until the next note: it may wait, or start, for longer than retention would."""
        path, wanted = self.home / REFRESHING, sorted(checkpoints)
        if wanted != self.refreshing():
            write_durably(path, json.dumps(wanted) + "\n")

    def refreshing(self) -> list[str]:
        """Checkpoints whose refresh waits or runs, as last noted."""
        with suppress(OSError, ValueError, TypeError):
            return [str(key) for key in json.loads((self.home / REFRESHING).read_text(encoding="utf-8"))]
        return []

    def _may_go_live(self, name: str, live: Live | None) -> bool:
        begun = (self.home / "snapshots" / f".{name}.partial").exists() or self.has("snapshots", name)
        if not begun or self.has("evaluations", name):
            return False
        if live is not None:
            (run, step), (live_run, live_step) = parse_key(name), parse_key(live.index)
            if run == live_run and step <= live_step:
                return False
        return not self.has("verdicts", name) or bool(self.manifest("verdicts", name).facts["passed"])


def _drop_files(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name not in (MANIFEST, PRUNED, QUARANTINED):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _without_operation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that may not change, with the defaults of keys that the version which wrote them did not know."""
    config = config_from(settings["config"], where="home.json").model_dump(mode="json")
    for name in SAVING:
        del config[name]["checkpoint_every"]
    return {**settings, "config": {name: values for name, values in config.items() if name not in OPERATION}}


def first_difference(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first setting that differs, in words; None if none does."""
    for key in sorted(found.keys() | wanted.keys()):
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if inner := first_difference(old, new, f"{prefix}{key}."):
                return inner
        elif old != new:
            return f"{prefix}{key} is {old!r} there, {new!r} now"
    return None
