"""Replay: build an index version again from what its manifest says it was made of, and compare digests."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from realm_core.artifacts import corpora
from realm_core.artifacts.manifest import Manifest
from realm_core.artifacts.settings import settings_of
from realm_core.artifacts.store import Store
from realm_core.config import Config
from realm_core.errors import ArtifactError
from realm_core.ports import NullSink
from realm_core.stages import index as index_stage
from realm_core.stages import reembed


def replay(store: Store, name: str, scratch: Path) -> dict[str, Any]:
    """Embed the corpus again with the recorded checkpoint and settings, build the index, all below `scratch`.

    Returns `equal`, the digests `recorded` and `rebuilt`, `seconds`, and `differences`, one line each, the first being
    where the two part. On a CPU, equal code and thread count give equal bytes. Only manifests of the old snapshot and
    index are read, so that versions dropped by retention can be replayed. Raises ArtifactError if the checkpoint's
    weights, the corpus or the settings are gone. Where single blocks had their vectors from another version, they have
    them from it again: replay that one too.
    """
    began = time.monotonic()
    folder = store.path("indexes", name)
    recorded = store.manifest("indexes", name)
    places = {role: store.parent(folder, role) for role in ("snapshot", "checkpoint", "corpus")}
    embedded = store.manifest("snapshots", places["snapshot"].name)
    inputs: dict[str, Any] = {"checkpoint": places["checkpoint"], "corpus": places["corpus"]}
    borrowed = embedded.record.get("borrowed_blocks")
    made = reembed.run(
        _settings(store, embedded, reembed.SECTIONS, places["snapshot"]),
        **inputs,
        out=scratch / "snapshots" / name,
        sink=NullSink(),
        earlier=corpora.snapshots_beside(store, name, only=embedded.record["reused_from"]) if borrowed else (),
    )
    built = index_stage.run(
        _settings(store, recorded, index_stage.SECTIONS, folder),
        snapshot=scratch / "snapshots" / name,
        **inputs,
        out=scratch / "indexes" / name,
        sink=NullSink(),
    )
    found = [*_differences("snapshot", embedded, made), *_differences("index", recorded, built)]
    return {
        "index": name,
        "recorded": recorded.digest,
        "rebuilt": built.digest,
        "equal": recorded.digest == built.digest,
        "differences": found,
        "seconds": time.monotonic() - began,
    }


def _settings(store: Store, manifest: Manifest, sections: tuple[str, ...], folder: Path) -> Config:
    config = settings_of(store, manifest, sections)
    if config is None:
        raise ArtifactError(
            f"{folder}: made with settings {manifest.config_digest[:12]} that {store.home} does not remember; "
            "restore its home.json or settings.history.jsonl"
        )
    return config


def _differences(what: str, old: Manifest, new: Manifest) -> Iterator[str]:
    """Where two manifests part, causes before effects."""
    if old.code != new.code:
        yield f"{what}: stage code {old.code} then, {new.code} now"
    if old.config_digest != new.config_digest:
        yield f"{what}: the version that wrote it knew other settings; those added since have their defaults here"
    for title, before, after in (
        ("parent", old.parents, new.parents),
        ("fact", old.facts, new.facts),
        ("file", old.files, new.files),
    ):
        for key in sorted(before.keys() | after.keys()):
            a, b = before.get(key), after.get(key)
            if a != b and not isinstance(a, dict):
                yield f"{what}: {title} {key} was {_short(a)}, is {_short(b)}"
            elif a != b and isinstance(a, dict):
                changed = [name for name in a if not isinstance(b, dict) or a[name] != b.get(name)]
                yield f"{what}: {title} {key} differs in {', '.join(changed)}"


def _short(value: Any) -> str:
    return "missing" if value is None else str(value)[:12]
