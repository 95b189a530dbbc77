"""Dagster runs whose process is gone. After a crash of the machine, or of the code server, Dagster believes for ever that
they still run, and for as long as it does their pool lets nobody else in."""

import time

import dagster as dg
import psutil

from orchestration.resources.store import HOST
from realm_core.artifacts.lease import HERE

_SILENCE = 10.0  # seconds in which every run that lives has said where it is
# Runs that are only starting are left to Dagster's run_monitoring, which has a time-out for them.
_UNDER_WAY = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


def reap(instance: dg.DagsterInstance, now: float | None = None) -> list[str]:
    """Report runs of this machine as failed if their process is gone; returns their ids.

    A run says which machine it is on right after it has told its process. One that is on another machine is looked at by
    the daemon there, and one that has said nothing for a while died before it could: its process is looked for here.
    """
    dead, now = [], time.time() if now is None else now
    for record in instance.get_run_records(dg.RunsFilter(statuses=_UNDER_WAY)):
        run = record.dagster_run
        process = _process_of(instance, run.run_id)
        if process is None or record.start_time is None or _lives(process, record.start_time):
            continue
        if _may_be_elsewhere(run.tags.get(HOST), now - record.start_time):
            continue
        instance.report_run_failed(run, f"Its process {process} is gone: the machine or the code server was stopped.")
        dead.append(run.run_id)
    return dead


def _may_be_elsewhere(host: str | None, seconds: float) -> bool:
    return host != HERE if host else seconds < _SILENCE


def _process_of(instance: dg.DagsterInstance, run_id: str) -> int | None:
    """The process that executes the steps, as the run's own log says."""
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        event = entry.dagster_event
        found = event.engine_event_data.metadata.get("pid") if event else None
        if found is not None:
            return int(str(found.value))
    return None


def _lives(process: int, started: float) -> bool:
    """Whether the process that ran at `started` (seconds since the epoch) still does; its number may be reused by now."""
    try:
        found = psutil.Process(process)
        return found.status() != psutil.STATUS_ZOMBIE and found.create_time() <= started + 1
    except psutil.NoSuchProcess:
        return False
