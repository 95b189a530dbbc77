"""Moves of the live pointer by hand: promotion and rollback, told to Dagster and MLflow in the same command.

The pointer is the truth and moves first. Dagster's record and the registry's alias follow; one that cannot be reached is named in
the result, and repeating the command tells it again.
"""

import os
import sys
from pathlib import Path
from typing import Any

import dagster as dg

from assets.checkpoint import LIVE_POINTER
from assets.partitions import REALM_CKPT
from assets.reporting import DATA_VERSION_TAG, mirror_version, version_card, version_facts
from orchestration import services
from orchestration.resources.tracking import MlflowTracker, tracker_for
from realm_core.artifacts.store import Live, Store, parse_key
from realm_core.errors import GateError, RealmError
from realm_core.stages import promote as gate
from realm_core.stages import qualify


def promote(
    home: Path, name: str, reason: str, *, allow_older: bool = False, allow_drop: bool = False
) -> tuple[Live, dict[str, str]]:
    """Move the pointer through the gate and tell everybody. Returns what is live, and how each service took it."""
    store = _ready(home)
    allowed = {"allow_older": allow_older, "allow_drop": allow_drop}
    live = gate.run(store.config(), store=store, name=name, reason=reason, **allowed)
    return live, tell(store, live)


def moved(store: Store, live: Live) -> dict[str, str]:
    """`tell` for commands of the library that have moved the pointer already: nothing stops them any more."""
    try:
        _ready(store.home)
    except RealmError as problem:
        return dict.fromkeys(("dagster", "mlflow"), f"not told: {problem}")
    return tell(store, live)


def rollback(home: Path, to: str | None, reason: str) -> tuple[Live, dict[str, str]]:
    """Go back to a version, by default the one that was live before: of A, B, C first B and, done again, A. The same gate
    applies, but older steps may pass; a verdict that was given under other settings is given again first.

    Raises GateError if nothing was live before, or if the version has not earned it.
    """
    gate.require_reason(reason)  # before a verdict is given again
    store = _ready(home)
    with store.pointer_lock():
        if mended := store.mend_live():
            print(f"warning: {mended}", file=sys.stderr, flush=True)
        target = to or _target(store)
        _qualify_by_todays_settings(store, target)
        live = gate.run(store.config(), store=store, name=target, reason=reason, allow_older=True)
    return live, tell(store, live)


def _target(store: Store) -> str:
    """What was live before and nobody went back from."""
    live, before = store.require_live(), store.rollback_target()
    if before is not None:
        return before.index
    others = {move.index for move in store.live_history()} - {live.index}
    said = f"all that was live before {live.index} was gone back from" if others else f"only {live.index} was ever live"
    raise GateError(f"{store.home}: {said}; name another one with --to")


def _ready(home: Path) -> Store:
    """The store, with the environment that its services need; a profile that is not complete is told before anything moves."""
    store = Store.open(home)
    os.environ.update(services.environment(home))
    return store


def _qualify_by_todays_settings(store: Store, name: str) -> None:
    config, index = store.config(), store.path("indexes", name)
    known = store.has("verdicts", name)
    if known and store.manifest("verdicts", name).config_digest != config.digest(*qualify.SECTIONS):
        parts = {role: store.parent(index, role) for role in ("snapshot", "checkpoint", "corpus")}
        qualify.run(config, index=index, **parts, out=store.path("verdicts", name), again=True)


def tell(store: Store, live: Live) -> dict[str, str]:
    """Record the pointer as it stands with Dagster, MLflow and the mirror; service -> what came of it. Never raises."""
    tracker = tracker_for(store.home)
    told = {"dagster": _tell_dagster(store, live, tracker), "mlflow": _tell_mlflow(store, live, tracker)}
    return told | ({"mirror": mirrored} if (mirrored := mirror_version(store, live.index)) else {})


def _tell_dagster(store: Store, live: Live, tracker: MlflowTracker) -> str:
    try:
        services.prepare(store.home)
        with dg.DagsterInstance.get() as instance:
            if live.index not in instance.get_dynamic_partitions(str(REALM_CKPT.name)):
                instance.add_dynamic_partitions(str(REALM_CKPT.name), [live.index])
            version = {DATA_VERSION_TAG: live.index_digest}
            pointer: dict[str, Any] = {
                "index": live.index,
                "index_digest": live.index_digest,
                "generation": live.generation,
            }
            instance.report_runless_asset_event(
                dg.AssetMaterialization(
                    asset_key="promoted_index",
                    partition=live.index,
                    tags=version,
                    metadata={**version_facts(store, live.index, tracker), **pointer, "reason": live.reason},
                )
            )
            instance.report_runless_asset_event(
                dg.AssetObservation(asset_key=LIVE_POINTER, tags=version, metadata={**pointer, "reason": live.reason})
            )
    except Exception as error:  # the pointer has moved; a record that failed must not look like a move that failed
        return f"not recorded: {(str(error).splitlines() or [type(error).__name__])[0]}; run the command again"
    return "recorded"


def _tell_mlflow(store: Store, live: Live, tracker: MlflowTracker) -> str:
    run, step = parse_key(live.index)
    tracker.champion(run, version_card(store, live.index))
    tracker.tag(run, {"live_index": live.index, "live_index_digest": live.index_digest})
    tracker.sink(run).log(step, {"index/generation": float(live.generation)})
    tracker.close(30.0)
    return "spooled until MLflow can be reached" if tracker.waiting else "champion"
