"""The sensor that closes the loop: a new checkpoint is registered, reported, and refreshed."""

from collections import defaultdict

import dagster as dg

from assets.checkpoint import checkpoint_event
from assets.partitions import REALM_CKPT
from orchestration.defs.jobs import refresh_index
from realm_core.artifacts.store import Store, parse_key

EVENTS_A_TICK = 50  # reporting costs some 15-70 ms a checkpoint; a first import of hundreds is spread over ticks


@dg.sensor(job=refresh_index, minimum_interval_seconds=5, default_status=dg.DefaultSensorStatus.RUNNING)
def checkpoint_sensor(
    context: dg.SensorEvaluationContext, store: dg.ResourceParam[Store]
) -> dg.SensorResult | dg.SkipReason:
    """Register and report every new checkpoint; ask for a refresh of the newest one of each training run.

    Older unseen checkpoints are registered only: REALM wants the freshest index (Guu et al. 2020, section 3.3). The run key
    holds the checkpoint's digest, so a replayed tick or a lost cursor asks for nothing twice.
    """
    by_run: dict[str, list[str]] = defaultdict(list)
    for key in store.names("checkpoints"):
        by_run[parse_key(key)[0]].append(key)
    if not by_run:
        return dg.SkipReason("the store holds no checkpoint yet")
    keys = [key for group in by_run.values() for key in group]
    known = set(context.instance.get_dynamic_partitions(str(REALM_CKPT.name)))
    reported = context.instance.get_materialized_partitions(dg.AssetKey("realm_checkpoint"))
    unreported = [key for key in keys if key not in reported][:EVENTS_A_TICK]
    settled = set(store.names("verdicts"))
    backlog = store.config().refresh.backlog
    wanted = [key for group in by_run.values() for key in (group if backlog == "all" else group[-1:])]
    wanted = [key for key in wanted if key not in settled]
    cursor = ",".join(group[-1] for group in by_run.values())
    if not unreported and not wanted and known.issuperset(keys):
        return dg.SkipReason(f"newest checkpoint {cursor} is refreshed or refused already")
    new = [key for key in keys if key not in known]
    return dg.SensorResult(
        run_requests=[
            dg.RunRequest(
                run_key=f"refresh:{key}:{store.manifest('checkpoints', key).digest}",
                partition_key=key,
                tags={"realm/checkpoint": key},
            )
            for key in wanted
        ],
        dynamic_partitions_requests=[REALM_CKPT.build_add_request(new)] if new else [],
        asset_events=[checkpoint_event(store, key) for key in unreported],
        cursor=cursor,
    )


ALL = [checkpoint_sensor]
