"""Sensors: one closes the loop, so that a new checkpoint is registered, reported, and refreshed; one buries dead runs."""

import os
from collections import defaultdict
from pathlib import Path

import dagster as dg

from assets.checkpoint import checkpoint_event
from assets.partitions import REALM_CKPT
from orchestration import reaper
from orchestration.defs.jobs import refresh_index
from realm_core.artifacts.store import Store, parse_key
from realm_core.config import RefreshConfig
from realm_core.errors import RealmError

EVENTS_A_TICK = 50  # reporting costs some 15-70 ms a checkpoint; a first import of hundreds is spread over ticks
UNDER_WAY = [
    status
    for status in dg.DagsterRunStatus
    if status not in (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
]


def seconds_between_ticks() -> int:
    """`refresh.sensor_seconds` of the home these definitions are loaded for, or its default where there is none."""
    try:
        return Store(Path(os.environ["REALM_HOME"])).config().refresh.sensor_seconds
    except (KeyError, RealmError):
        return RefreshConfig().sensor_seconds


@dg.sensor(
    job=refresh_index,
    minimum_interval_seconds=seconds_between_ticks(),
    default_status=dg.DefaultSensorStatus.RUNNING,
)
def checkpoint_sensor(
    context: dg.SensorEvaluationContext, store: dg.ResourceParam[Store]
) -> dg.SensorResult | dg.SkipReason:
    """Register and report every new checkpoint; ask for a refresh of the newest one of each training run.

    Older unseen checkpoints are registered only, and while a refresh of a run is under way no other is asked for: REALM
    wants the freshest index (Guu et al. 2020, section 3.3), and a queue would only grow older. The run key holds the
    checkpoint's digest, so a replayed tick or a lost cursor asks for nothing twice.
    """
    by_run = _checkpoints(context, store)
    if not by_run:
        return dg.SkipReason("the store holds no checkpoint yet")
    keys = [key for group in by_run.values() for key in group]
    known = set(context.instance.get_dynamic_partitions(str(REALM_CKPT.name)))
    reported = context.instance.get_materialized_partitions(dg.AssetKey("realm_checkpoint"))
    new = [key for key in keys if key not in known]
    events = _events(context, store, [key for key in keys if key not in reported])
    asked = {parse_key(key)[0]: key for key in (context.cursor or "").split(",") if key}
    requests = _requests(context, store, by_run, asked)
    asked |= {parse_key(request.partition_key or "")[0]: request.partition_key or "" for request in requests}
    if not (new or events or requests):
        newest = ", ".join(group[-1] for group in by_run.values())
        return dg.SkipReason(f"newest checkpoint: {newest}; each is asked for, settled, or waits for its run's refresh")
    return dg.SensorResult(
        run_requests=requests,
        dynamic_partitions_requests=[REALM_CKPT.build_add_request(new)] if new else [],
        asset_events=events,
        cursor=",".join(asked.values()),
    )


@dg.sensor(minimum_interval_seconds=60, default_status=dg.DefaultSensorStatus.RUNNING)
def dead_run_sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Report runs as failed whose process is gone; what they hold is then free, and Dagster tries them once more."""
    dead = reaper.reap(context.instance)
    return dg.SkipReason(
        f"reported as failed: {', '.join(dead)}" if dead else "every run that is under way has a process"
    )


def _checkpoints(context: dg.SensorEvaluationContext, store: Store) -> dict[str, list[str]]:
    """Training run -> keys of its finished checkpoints, oldest first. A folder with a foreign name is passed over."""
    by_run: dict[str, list[str]] = defaultdict(list)
    for key in store.names("checkpoints"):
        try:
            by_run[parse_key(key)[0]].append(key)
        except RealmError as problem:
            context.log.warning(f"not a checkpoint: {problem}")
    return by_run


def _events(context: dg.SensorEvaluationContext, store: Store, unreported: list[str]) -> list[dg.AssetMaterialization]:
    events = []
    for key in unreported[:EVENTS_A_TICK]:
        try:
            events.append(checkpoint_event(store, key))
        except RealmError as problem:
            context.log.warning(f"cannot be reported: {problem}")
    return events


def _requests(
    context: dg.SensorEvaluationContext, store: Store, by_run: dict[str, list[str]], asked: dict[str, str]
) -> list[dg.RunRequest]:
    backlog = store.config().refresh.backlog
    wanted = [
        key
        for run, group in by_run.items()
        for key in (group if backlog == "all" else group[-1:])
        if key > asked.get(run, "")
        and not store.has("verdicts", key)
        and not (store.is_pruned(key) or store.is_quarantined(key))
    ]
    if wanted and backlog == "newest":
        busy = runs_being_refreshed(context.instance)
        wanted = [key for key in wanted if parse_key(key)[0] not in busy]
    requests = []
    for key in wanted:
        try:
            run_key = f"refresh:{key}:{store.manifest('checkpoints', key).digest}"
        except RealmError as problem:
            context.log.warning(f"cannot be refreshed: {problem}")
            continue
        requests.append(dg.RunRequest(run_key=run_key, partition_key=key, tags={"realm/checkpoint": key}))
    return requests


def runs_being_refreshed(instance: dg.DagsterInstance) -> set[str]:
    """Training runs with a refresh that is queued or running."""
    under_way = instance.get_runs(dg.RunsFilter(job_name=refresh_index.name, statuses=UNDER_WAY))
    return {run.tags.get("dagster/partition", "").rpartition("-s")[0] for run in under_way}


ALL = [checkpoint_sensor, dead_run_sensor]
