"""Retraining by the calendar: first the inputs are brought up to date, then a new training run starts on them."""

import dagster as dg

from assets.settings import home_settings
from orchestration import retraining
from orchestration.defs.jobs import bootstrap, start_training
from orchestration.retraining import RETRAIN
from realm_core.artifacts.store import Store
from realm_core.cron import problem_with

_SETTINGS = home_settings().retrain
# An expression that Dagster refuses would take every other definition down with this schedule.
_PROBLEM = problem_with(_SETTINGS.cron) if _SETTINGS.cron else "no retrain.cron is set"


@dg.schedule(
    job=bootstrap,
    cron_schedule=_SETTINGS.cron if _SETTINGS.cron and not _PROBLEM else "0 3 * * 0",
    execution_timezone=_SETTINGS.timezone,
    default_status=dg.DefaultScheduleStatus.STOPPED if _PROBLEM else dg.DefaultScheduleStatus.RUNNING,
    description=f"Off: retrain.cron: {_PROBLEM}" if _SETTINGS.cron and _PROBLEM else None,
)
def retrain_schedule(
    context: dg.ScheduleEvaluationContext, store: dg.ResourceParam[Store]
) -> dg.RunRequest | dg.SkipReason:
    """A new training run, r2 after r1, if corpus or code changed since the last one began; else the reason why not."""
    due = retraining.due(store)
    if due.run is None:
        return dg.SkipReason(due.reason)
    return dg.RunRequest(run_key=f"retrain:{due.run}", tags={RETRAIN: due.run, "realm/reason": due.reason})


@dg.run_status_sensor(
    run_status=dg.DagsterRunStatus.SUCCESS,
    monitored_jobs=[bootstrap],
    request_job=start_training,
    minimum_interval_seconds=home_settings().refresh.sensor_seconds,
    default_status=dg.DefaultSensorStatus.RUNNING,
)
def retrain_sensor(context: dg.RunStatusSensorContext) -> dg.RunRequest | dg.SkipReason:
    """Start the training run that the inputs were brought up to date for."""
    run = context.dagster_run.tags.get(RETRAIN)
    if run is None:
        return dg.SkipReason("not for a training run")
    config = {"ops": {"start_detached_trainer": {"config": {"run": run}}}}
    return dg.RunRequest(run_key=f"retrain:{run}", run_config=config, tags={RETRAIN: run})


SCHEDULES, SENSORS = [retrain_schedule], [retrain_sensor]
