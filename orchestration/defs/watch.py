"""Sensors that look after what is there: trainers, runs whose process is gone, failed refreshes, and the live pointer."""

import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import dagster as dg

from assets.checkpoint import LIVE_POINTER
from assets.partitions import REALM_CKPT
from assets.serving import pointer_event
from assets.settings import home_settings
from orchestration import journal, pointer_watch, reaper, refreshes, segments, supervisor
from orchestration.defs.jobs import bootstrap, refresh_index, start_training, train_segment
from orchestration.resources import spool
from orchestration.resources.tracking import MlflowTracker, tracker_for
from orchestration.retraining import RETRAIN
from realm_core.artifacts.keys import parse_key
from realm_core.artifacts.store import Store
from realm_core.ports import Tracker

_SECONDS = home_settings().refresh.sensor_seconds
_MINUTE = min(60, 4 * _SECONDS)  # what nobody waits for
_LEFT_SECONDS = 60.0  # a spool file that nobody wrote to for so long is nobody's who still runs
_TAG_LENGTH = 1000  # characters: a tracker takes no tag of any length


@dg.sensor(minimum_interval_seconds=_SECONDS, default_status=dg.DefaultSensorStatus.RUNNING)
def trainer_health_sensor(
    context: dg.SensorEvaluationContext, store: dg.ResourceParam[Store]
) -> dg.SensorResult | dg.SkipReason:
    """Start dead trainers again from their last checkpoint, `supervise.max_restarts` times; then an alert.

    One that was stopped on request, or that ended with an error only a person can mend, is not started again.
    """
    beats = json.loads(context.cursor or "{}")
    found = [supervisor.tend(store, run, beats) for run in store.runs()]
    context.update_cursor(json.dumps(beats))
    news = [finding for finding in found if finding.news]
    if not news:
        return dg.SkipReason(
            "; ".join(f"{each.run} {each.state}: {each.message}" for each in found) or "no training run"
        )
    for finding in news:
        context.log.warning(f"{finding.run} {finding.state}: {finding.message}")
    return dg.SensorResult(asset_events=[_training_event(finding) for finding in news], cursor=json.dumps(beats))


@dg.sensor(job=train_segment, minimum_interval_seconds=_SECONDS, default_status=dg.DefaultSensorStatus.RUNNING)
def segment_sensor(
    context: dg.SensorEvaluationContext, store: dg.ResourceParam[Store]
) -> dg.SensorResult | dg.SkipReason:
    """With `supervise.mode: segments`, ask for the next segment of every training run that is wanted, one at a time each."""
    if store.config().supervise.mode != "segments":
        return dg.SkipReason("supervise.mode=detached: whoever trains is a process of its own")
    turns = [segments.take_turn(store, context.instance, run) for run in store.runs()]
    due = [turn for turn in turns if turn.key is not None]
    if not due:
        return dg.SkipReason("; ".join(f"{turn.run} {turn.reason}" for turn in turns) or "no training run")
    known = context.instance.get_dynamic_partitions(str(REALM_CKPT.name))
    new = [turn.key for turn in due if turn.key and turn.key not in known]
    return dg.SensorResult(
        run_requests=[dg.RunRequest(run_key=turn.run_key, partition_key=turn.key) for turn in due],
        dynamic_partitions_requests=[REALM_CKPT.build_add_request(new)] if new else [],
    )


@dg.sensor(minimum_interval_seconds=_MINUTE, default_status=dg.DefaultSensorStatus.RUNNING)
def dead_run_sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Report runs as failed whose process is gone; what they hold is then free, and Dagster tries them once more."""
    dead = reaper.reap(context.instance)
    return dg.SkipReason(
        f"reported as failed: {', '.join(dead)}" if dead else "every run that is under way has a process"
    )


@dg.sensor(minimum_interval_seconds=_MINUTE, default_status=dg.DefaultSensorStatus.RUNNING)
def pointer_sensor(
    context: dg.SensorEvaluationContext, store: dg.ResourceParam[Store]
) -> dg.SensorResult | dg.SkipReason:
    """Observe the live pointer: whoever moved it, and with an alert if that was not a promotion."""
    found = pointer_watch.look(store)
    if found.problem is None and found.live is not None:
        if pointer_watch.observed(context.instance, found.live):
            return dg.SkipReason(f"{found.live.index} is live, generation {found.live.generation}, and was observed")
        return dg.SensorResult(asset_events=[pointer_event(found.live)], cursor="")
    if found.problem is None:
        return dg.SkipReason("no index is live yet")
    if context.cursor == found.problem:
        return dg.SkipReason(f"told before: {found.problem}")
    context.log.error(found.problem)
    journal.alert(store, "pointer", "live.json", found.problem)
    event = dg.AssetObservation(LIVE_POINTER, description=found.problem, metadata={"problem": found.problem})
    return dg.SensorResult(asset_events=[event], cursor=found.problem)


@dg.run_failure_sensor(
    monitored_jobs=[refresh_index],
    minimum_interval_seconds=_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
)
def refresh_failure_sensor(
    context: dg.RunFailureSensorContext, store: dg.ResourceParam[Store], tracker: dg.ResourceParam[Tracker]
) -> dg.SkipReason:
    """Record why a refresh failed, and what is still live; the tracked training run is tagged with it."""
    run = context.dagster_run
    key = run.tags.get("dagster/partition", "?")
    error, said = refreshes.failure(context.instance, run.run_id)
    why = said or context.failure_event.message or "its process died"
    live = pointer_watch.look(store).live
    facts: dict[str, Any] = {"run_id": run.run_id, "error": error, "live": live.index if live else None}
    journal.decide(store, key, None, "failed", why, **facts)
    metadata = {"failed": why, "run": run.run_id, "still_live": live.index if live else "nothing"}
    context.instance.report_runless_asset_event(dg.AssetObservation("mips_index", partition=key, metadata=metadata))
    if key != "?":
        tags = {
            "last_failed_refresh": key,
            "last_failed_refresh_reason": why[:_TAG_LENGTH],
            "last_failed_refresh_run": run.run_id,
        }
        tracker.tag(parse_key(key)[0], tags)
    return dg.SkipReason(f"{key}: {why}; {metadata['still_live']} stays live")


@dg.run_failure_sensor(
    monitored_jobs=[bootstrap, start_training, train_segment],
    minimum_interval_seconds=_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
)
def training_failure_sensor(context: dg.RunFailureSensorContext, store: dg.ResourceParam[Store]) -> dg.SkipReason:
    """Tell somebody that the inputs of a training run, its start, or a segment of it failed, unless it is tried again."""
    run = context.dagster_run
    if refreshes.goes_on(run):
        return dg.SkipReason(f"{run.job_name}: run {run.run_id} is tried again")
    if run.job_name == segments.JOB and store.config().supervise.mode == "segments":
        return dg.SkipReason(f"{run.job_name}: segment_sensor asks for it again, or gives it up with an alert")
    error, said = refreshes.failure(context.instance, run.run_id)
    why = said or context.failure_event.message or "its process died"
    about = run.tags.get("dagster/partition") or run.tags.get(RETRAIN) or run.job_name
    message = f"{run.job_name} for {about} failed: {why}"
    journal.alert(store, "training", about, message, run_id=run.run_id, error=error)
    event = dg.AssetObservation("realm_checkpoint", description=message, metadata={"failed": why, "run": run.run_id})
    context.instance.report_runless_asset_event(event)
    return dg.SkipReason(message)


@dg.sensor(minimum_interval_seconds=_MINUTE, default_status=dg.DefaultSensorStatus.RUNNING)
def spool_sensor(context: dg.SensorEvaluationContext, store: dg.ResourceParam[Store]) -> dg.SkipReason:
    """Send to MLflow what processes left in the spool that ended while it was down. Never waits for it."""
    left = spool.left_behind(store.home / "mlflow" / "spool", time.time() - _LEFT_SECONDS)
    if not left:
        return dg.SkipReason("nothing waits for MLflow that nobody else sends")
    _tracker(store.home).flush(0.0)
    return dg.SkipReason(f"sending what waits for MLflow: {', '.join(left)}")


@cache
def _tracker(home: Path) -> MlflowTracker:
    """One for all looks: its thread goes on between them."""
    return tracker_for(home)


def _training_event(finding: supervisor.Finding) -> dg.AssetObservation:
    metadata: dict[str, Any] = {
        "run": finding.run,
        "trainer": finding.state,
        "restarts": finding.restarts,
        "message": finding.message,
    }
    return dg.AssetObservation("realm_checkpoint", description=finding.message, metadata=metadata)


ALL = [
    trainer_health_sensor,
    segment_sensor,
    dead_run_sensor,
    pointer_sensor,
    refresh_failure_sensor,
    training_failure_sensor,
    spool_sensor,
]
