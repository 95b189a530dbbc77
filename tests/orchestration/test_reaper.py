"""Dead runs are buried, living ones are left alone."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import dagster as dg
import pytest
from dagster import DagsterRunStatus
from dagster._core.events import EngineEventData

from orchestration import reaper
from orchestration.defs.watch import dead_run_sensor
from orchestration.resources.store import HOST, store_resource
from realm_core.artifacts.lease import HERE
from realm_core.artifacts.store import Store


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def started_run(instance: dg.DagsterInstance, process: int | None, host: str | None = HERE) -> str:
    """A run that Dagster believes to be under way since now, in this process of this machine."""
    tags = {HOST: host} if host else {}
    run = dg.DagsterRun(job_name="refresh_index", run_id=str(uuid.uuid4()), tags=tags)
    instance.add_run(run)
    start = dg.DagsterEvent(event_type_value="PIPELINE_START", job_name=run.job_name)
    instance.report_dagster_event(start, run.run_id)
    if process is not None:
        # the very event the in-process executor writes
        instance.report_engine_event("Executing steps in process", run, EngineEventData.in_process(process))
    return run.run_id


def status(instance: dg.DagsterInstance, run_id: str) -> DagsterRunStatus:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run.status


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_run_whose_process_is_gone_is_reported_as_failed(instance: dg.DagsterInstance) -> None:
    run_id = started_run(instance, dead_process())
    assert reaper.reap(instance) == [run_id]
    assert status(instance, run_id) == DagsterRunStatus.FAILURE
    assert reaper.reap(instance) == []


def test_a_run_whose_process_lives_is_left_alone(instance: dg.DagsterInstance) -> None:
    run_id = started_run(instance, os.getpid())
    assert reaper.reap(instance) == []
    assert status(instance, run_id) == DagsterRunStatus.STARTED


def test_a_process_number_that_was_given_away_again_does_not_keep_a_run_alive(instance: dg.DagsterInstance) -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        run_id = started_run(instance, child.pid)
        record = instance.get_run_record_by_id(run_id)
        assert record is not None and record.start_time is not None
        assert reaper._lives(child.pid, record.start_time)
        assert not reaper._lives(child.pid, time.time() - 3600)  # the run is older than the process
    finally:
        child.kill()
        child.wait()


def test_a_run_that_has_not_said_where_it_runs_is_left_alone(instance: dg.DagsterInstance) -> None:
    run_id = started_run(instance, None)
    assert reaper.reap(instance) == []
    assert status(instance, run_id) == DagsterRunStatus.STARTED


def test_the_sensor_names_what_it_buried(instance: dg.DagsterInstance) -> None:
    run_id = started_run(instance, dead_process())
    reason = dead_run_sensor(dg.build_sensor_context(instance=instance))
    assert isinstance(reason, dg.SkipReason)
    assert run_id in reason.skip_message


def test_a_run_of_another_machine_is_left_to_the_daemon_there(instance: dg.DagsterInstance) -> None:
    run_id = started_run(instance, dead_process(), host="elsewhere")
    assert reaper.reap(instance, now=time.time() + 3600) == []
    assert status(instance, run_id) == DagsterRunStatus.STARTED


def test_a_run_that_never_said_on_which_machine_it_is_is_given_a_moment(instance: dg.DagsterInstance) -> None:
    run_id = started_run(instance, dead_process(), host=None)
    assert reaper.reap(instance) == []
    assert reaper.reap(instance, now=time.time() + 60) == [run_id]


def test_every_run_that_opens_the_home_notes_its_machine(instance: dg.DagsterInstance, empty_store: Store) -> None:
    seen = []

    @dg.op(required_resource_keys={"store"})
    def look(context: dg.OpExecutionContext) -> None:
        seen.append(context.instance.get_run_by_id(context.run_id).tags[HOST])

    @dg.job(resource_defs={"store": store_resource.configured({"home": str(empty_store.home)})})
    def any_job() -> None:
        look()

    assert any_job.execute_in_process(instance=instance).success
    assert seen == [HERE]
