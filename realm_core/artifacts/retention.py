"""Retention of snapshots and indexes: old bytes go, manifests stay, and nothing goes that somebody may still open."""

import json
import shutil
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from realm_core.artifacts.manifest import MANIFEST, PRUNED
from realm_core.artifacts.publish import read_json_lines, write_durably
from realm_core.artifacts.store import Store, parse_key

KINDS = ("snapshots", "indexes")


def collect(
    store: Store, *, keep: int, grace_seconds: float = 0.0, dry_run: bool = False, now: float | None = None
) -> dict[str, Any]:
    """Drop the bytes of all but the newest `keep` versions of every training run, and of what `pinned` names.

    Returns {"dropped": [{"index", "bytes"}], "pinned": {index: reason}}; only reasons that kept something are told. Takes
    the pointer's lock, so that no version goes live while it is being dropped.
    """
    with store.pointer_lock():
        pins = pinned(store, grace_seconds=grace_seconds, now=time.time() if now is None else now)
        by_run: dict[str, list[str]] = defaultdict(list)
        for name in sorted({name for kind in KINDS for name in store.keys(kind)}):
            by_run[parse_key(name)[0]].append(name)
        old = [name for names in by_run.values() for name in names[:-keep] if _has_bytes(store, name)]
        dropped = [name for name in old if name not in pins]
        rows = [{"index": name, "bytes": sum(map(_size, _folders(store, name)))} for name in dropped]
        if not dry_run:
            for name in dropped:
                for folder in _folders(store, name):
                    # The mark comes first: a crash in between leaves a version that says it is incomplete.
                    write_durably(folder / PRUNED, json.dumps({"pruned_at": time.time()}) + "\n")
    if not dry_run:  # all that is marked, what a crash left of an earlier attempt included
        for kind in KINDS:
            for name in store.keys(kind):
                if (store.path(kind, name) / PRUNED).exists():
                    _drop_files(store.path(kind, name))
    return {"dropped": rows, "pinned": {name: pins[name] for name in old if name in pins}}


def pinned(store: Store, *, grace_seconds: float, now: float) -> dict[str, str]:
    """Index name -> why its bytes must stay, whatever its age."""
    pins: dict[str, str] = {}
    live = store.live()
    for name in store.keys("indexes"):
        run, _ = parse_key(name)
        if not any(parse_key(other)[0] == run for other in pins):
            pins[name] = "first of its run: the baseline without joint training"
    for name in store.keys("snapshots"):
        if not store.has("verdicts", name) and not _overtaken(store, name):
            pins[name] = "its refresh is not done"
    for run in store.runs():
        for name in _used_by_trainer(store, run):
            pins[name] = f"trainer {run} searches it, or would on resuming"
    moves = store.live_history()
    for place, move in enumerate(moves):
        left = moves[place + 1].promoted_at if place + 1 < len(moves) else now
        if now - left < grace_seconds:
            pins[move.index] = "was live a moment ago"
    if live is not None:
        before = store.rollback_target()
        if before is not None:
            pins[before.index] = "was live before: the rollback"
        pins[live.index] = "live"
    return pins


def _used_by_trainer(store: Store, run: str) -> list[str]:
    """What serves a run, and what served the steps it would repeat after a crash: those since its newest checkpoint."""
    swaps = read_json_lines(store.trainer(run) / "swaps.jsonl")
    keys = store.checkpoints(run)
    newest = parse_key(keys[-1])[1] if keys else 0
    earlier = [swap["index"] for swap in swaps if swap["step"] <= newest]
    return [
        *earlier[-1:],
        *(swap["index"] for swap in swaps if swap["step"] > newest),
        *(s["index"] for s in swaps[-1:]),
    ]


def _overtaken(store: Store, name: str) -> bool:
    live = store.live()
    if live is None:
        return False
    (run, step), (live_run, live_step) = parse_key(name), parse_key(live.index)
    return run == live_run and step < live_step


def _has_bytes(store: Store, name: str) -> bool:
    return any(not (folder / PRUNED).exists() for folder in _folders(store, name))


def _folders(store: Store, name: str) -> list[Path]:
    return [store.path(kind, name) for kind in KINDS if store.has(kind, name)]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _drop_files(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name not in (MANIFEST, PRUNED):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
