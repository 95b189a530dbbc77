"""The sensor that closes the loop: a new checkpoint is registered, reported, and, if the policy says so, refreshed."""

from collections import defaultdict

import dagster as dg

from assets.checkpoint import checkpoint_event
from assets.partitions import REALM_CKPT
from assets.settings import home_settings
from orchestration import refreshes
from orchestration.defs.jobs import estimate_refresh, refresh_index
from orchestration.turn import Turn
from realm_core.artifacts.store import Store, parse_key
from realm_core.errors import RealmError

EVENTS_A_TICK = 50  # reporting costs some 15-70 ms a checkpoint; a first import of hundreds is spread over ticks


def seconds_between_ticks() -> int:
    """`refresh.sensor_seconds` of the home these definitions are loaded for, or its default where there is none."""
    return home_settings().refresh.sensor_seconds


@dg.sensor(
    jobs=[refresh_index, estimate_refresh],
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
    try:
        turn = Turn(store, context.instance, by_run, asked, context.log.warning).take()
    except RealmError as problem:  # a pointer that cannot be read, above all: pointer_sensor has told somebody
        return dg.SkipReason(f"nothing is refreshed: {problem}")
    for request in turn.requests:
        if request.job_name == refreshes.JOB and request.partition_key:
            run, _ = parse_key(request.partition_key)
            asked[run] = max(asked.get(run, ""), request.partition_key)
    if not (new or events or turn.requests or turn.events):
        return dg.SkipReason("; ".join(turn.reasons))
    return dg.SensorResult(
        run_requests=turn.requests,
        dynamic_partitions_requests=[REALM_CKPT.build_add_request(new)] if new else [],
        asset_events=[*events, *turn.events],
        skip_reason=None if turn.requests else "; ".join(turn.reasons),
        cursor=",".join(asked.values()),
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


ALL = [checkpoint_sensor]
