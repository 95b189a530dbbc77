"""The report of a training run, gathered from the store, Dagster's event log and the tracker."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import dagster as dg

from orchestration import services
from orchestration.resources.tracking import tracker_for
from realm_core.artifacts.publish import read_json_lines
from realm_core.artifacts.store import Store, checkpoint_key, parse_key
from realm_core.evaluate.versions import describe, training_time

SENSOR_TAG = "dagster/sensor_name"
SCHEDULE_TAG = "dagster/schedule_name"


def collect(store: Store, run: str, instance: dg.DagsterInstance, seconds: float) -> dict[str, Any]:
    """Everything `report.json` holds; its keys are a promise to other programs."""
    live = store.live()
    tracker = tracker_for(store.home)
    tracker.flush()
    swaps = read_json_lines(store.trainer(run) / "swaps.jsonl")
    keys = [key for key in store.keys("indexes") if parse_key(key)[0] == run]
    return {
        "seconds": round(seconds, 1),
        "index_versions": [_version(store, key, instance, swaps) for key in keys],
        "live": {"checkpoint": live.index, "index_digest": live.index_digest} if live else None,
        "swaps": [{"step": swap["step"], "index_digest": swap["index_digest"]} for swap in swaps],
        "qa": {
            "bm25": _scores(store, "bm25"),
            "ict": _scores(store, checkpoint_key(run, 0)),
            "realm": _trained_scores(store, keys, live.index if live else None),
        },
        "dagster_home": str(services.dagster_home(store.home)),
        "mlflow": {"tracking_uri": tracker.uri, "run_id": tracker.run_id(run)},
        "training": training(store, run),
        "refreshes": refreshes(store, instance, keys),
    }


def triggered_by(instance: dg.DagsterInstance, run_id: str | None) -> str | None:
    """`sensor:NAME` or `schedule:NAME`, else `person`; None if the run is not in this instance."""
    found = instance.get_run_by_id(run_id) if run_id else None
    if found is None:
        return None
    for tag, kind in ((SENSOR_TAG, "sensor"), (SCHEDULE_TAG, "schedule")):
        if tag in found.tags:
            return f"{kind}:{found.tags[tag]}"
    return "person"


def _version(store: Store, key: str, instance: dg.DagsterInstance, swaps: list[dict]) -> dict[str, Any]:
    known = describe(store, key)
    served = next((swap["step"] for swap in swaps if swap["index_digest"] == known["index_digest"]), None)
    return {
        "checkpoint": key,
        **{name: known[name] for name in ("step", "index_digest", "dagster_run_id", *_SHOWN, "drift", "verdict")},
        "triggered_by": triggered_by(instance, known["dagster_run_id"]),
        "top_k_overlap": (known["drift"] or {}).get("top_k_overlap"),
        "age_steps": None if served is None else served - known["step"],
        "live": known["state"] == "live",
    }


_SHOWN = ("recall_vs_exact", "recall_at_5", "exact_match", "null_probability")


def _scores(store: Store, name: str) -> dict[str, Any]:
    if not store.has("results", name):
        return _no_scores()
    metrics = store.manifest("results", name).facts["metrics"]
    return {key: metrics.get(key) for key in _no_scores()}


def _trained_scores(store: Store, keys: Sequence[str], live: str | None) -> dict[str, Any]:
    """Scores of the live version, or where that is not scored (somebody went back to it) of the newest trained one that is."""
    named = [live] if live and parse_key(live)[1] > 0 else []
    scored = [key for key in (*named, *reversed(keys)) if store.has("results", key) and parse_key(key)[1] > 0]
    return _scores(store, scored[0]) if scored else _no_scores()


def _no_scores() -> dict[str, Any]:
    return dict.fromkeys(("recall_at_5", "recall_at_20", "exact_match"))


def training(store: Store, run: str) -> dict[str, Any]:
    """How long the trainer computed, and how long it stood still because of refreshes and index swaps, in seconds."""
    seconds, stalled = training_time(store, run)
    return {
        "run": run,
        "seconds": round(seconds, 2),
        "stalled_seconds": round(stalled, 2),
        "stalled_share": round(stalled / seconds, 5) if seconds else None,
    }


def refreshes(store: Store, instance: dg.DagsterInstance, keys: list[str]) -> dict[str, Any]:
    """Medians over the index versions `keys`, in seconds: `overhead_seconds`, what a refresh took beyond its stages,
    `live_after_seconds`, from the checkpoint on disk to the moved pointer, and `live_beyond_embedding_seconds`, what of that
    was not embedding: the sensor's interval, the queue behind earlier checkpoints, index, checks, and dev questions."""
    promoted = {live.index: live.promoted_at for live in store.live_history()}
    overheads, waits, beyond = [], [], []
    for key in keys:
        kinds = ("snapshots", "indexes", "drifts", "verdicts", "evaluations")
        stages = [store.manifest(kind, key).record for kind in kinds if store.has(kind, key)]
        ran = instance.get_run_record_by_id(str(stages[-1].get("dagster_run_id")))
        # Where a second run did the rest, the stages were shared between two: neither tells what one refresh costs.
        whole = store.has("evaluations", key) and len({record.get("dagster_run_id") for record in stages}) == 1
        if whole and ran is not None and ran.start_time and ran.end_time:
            overheads.append(ran.end_time - ran.start_time - sum(record["seconds"] for record in stages))
        made = all(store.has(kind, key) for kind in ("checkpoints", "snapshots"))
        if key in promoted and made:  # not over a corpus that grew long after the checkpoint
            waits.append(promoted[key] - store.manifest("checkpoints", key).record["created"])
            beyond.append(waits[-1] - store.manifest("snapshots", key).record["seconds"])
    return {
        "measured": len(overheads),
        "overhead_seconds": _median(overheads),
        "live_after_seconds": _median(waits),
        "live_beyond_embedding_seconds": _median(beyond),
    }


def _median(seconds: Sequence[float]) -> float | None:
    return round(median(seconds), 2) if seconds else None


def steps_of(store: Store, run: str) -> list[dict[str, Any]]:
    """Rows of the step log, the last one where a step was repeated after a crash."""
    rows: dict[int, dict[str, Any]] = {}
    for row in read_json_lines(Path(store.trainer(run)) / "steps.jsonl"):
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]
