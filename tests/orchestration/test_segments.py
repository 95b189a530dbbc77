"""Training in segments: which one is asked for next, when none is, and what happens to one that dies."""

import json
import os
import time
import uuid
from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest
from dagster import DagsterRunStatus

from orchestration import journal, main_job, retraining, segments, supervisor, trainer
from orchestration.defs import watch
from orchestration.segments import JOB, following
from realm_core.artifacts.lease import HERE
from realm_core.artifacts.store import Store
from realm_core.errors import RealmError
from tests.orchestration import worlds

SUCCESS, FAILURE, CANCELED = DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


@pytest.fixture
def wanted(empty_store: Store) -> Store:
    """A home that trains in segments, where training was started and the first checkpoint is there."""
    operate(empty_store, mode="segments", max_restarts=2)
    worlds.pretend_checkpoint(empty_store, "r1", 0)
    assert "segment_sensor asks for them" in trainer.start(empty_store.home, "r1")
    return empty_store


def operate(store: Store, **settings: Any) -> None:
    values = store.settings()
    values["config"]["supervise"].update(settings)
    (store.home / "home.json").write_text(json.dumps(values))


def tick(store: Store, instance: dg.DagsterInstance) -> Any:
    """One tick, and what the daemon does with its result."""
    result = watch.segment_sensor(dg.build_sensor_context(instance=instance, resources={"store": store}))
    if isinstance(result, dg.SensorResult):
        for request in result.dynamic_partitions_requests or ():
            instance.add_dynamic_partitions(request.partitions_def_name, list(request.partition_keys))
        for request in result.run_requests or ():
            tags = {"dagster/partition": str(request.partition_key), "dagster/run_key": str(request.run_key)}
            run = dg.DagsterRun(job_name=JOB, run_id=str(uuid.uuid4()), status=DagsterRunStatus.STARTED, tags=tags)
            instance.add_run(run)
    return result


def asked(result: Any) -> list[str]:
    return [] if isinstance(result, dg.SkipReason) else [request.partition_key for request in result.run_requests]


@pytest.mark.parametrize(
    ("newest", "next_one"),
    [(None, 0), (0, 4), (3, 4), (4, 8), (8, 12), (11, 12)],  # tiny: every 4 steps, 12 in all
)
def test_the_next_segment_ends_at_the_next_checkpoint(empty_store: Store, newest: int | None, next_one: int) -> None:
    if newest is not None:
        worlds.pretend_checkpoint(empty_store, "r1", newest)
    assert following(empty_store, "r1") == f"r1-s{next_one:07d}"


def test_one_segment_follows_the_other_up_to_the_last_step(wanted: Store, instance: dg.DagsterInstance) -> None:
    for step in (4, 8, 12):
        assert asked(tick(wanted, instance)) == [f"r1-s{step:07d}"]
        assert "a segment is queued or runs" in tick(wanted, instance).skip_message
        worlds.pretend_checkpoint(wanted, "r1", step)
        worlds.end_runs(instance, SUCCESS)
    assert "r1 finished" in tick(wanted, instance).skip_message
    assert trainer.outcome(wanted.home, "r1") == {"finished": True, "error": None}
    assert len({run.tags["dagster/run_key"] for run in instance.get_runs()}) == 3


def test_a_segment_that_dies_is_asked_for_again_so_many_times_and_then_somebody_is_told_once(
    wanted: Store, instance: dg.DagsterInstance
) -> None:
    for _ in range(3):
        assert asked(tick(wanted, instance)) == ["r1-s0000004"]
        worlds.end_runs(instance, FAILURE)
    assert len({run.tags["dagster/run_key"] for run in instance.get_runs()}) == 3
    for _ in range(2):
        assert "given up: its segment after r1-s0000000 died 3 times" in tick(wanted, instance).skip_message
    (alert,) = journal.alerts(wanted)
    assert (alert["kind"], alert["about"]) == ("trainer", "r1")
    trainer.start(wanted.home, "r1")  # a person begins the count anew
    assert asked(tick(wanted, instance)) == ["r1-s0000004"]


def test_a_segment_that_is_cancelled_is_not_asked_for_again(wanted: Store, instance: dg.DagsterInstance) -> None:
    tick(wanted, instance)
    worlds.end_runs(instance, CANCELED)
    assert "was cancelled" in tick(wanted, instance).skip_message
    assert trainer.outcome(wanted.home, "r1")["finished"] is False


def test_a_run_that_collapsed_is_given_up_with_what_its_segment_said(
    wanted: Store, instance: dg.DagsterInstance
) -> None:
    worlds.pretend_checkpoint(wanted, "r1", 4)
    assert asked(tick(wanted, instance)) == ["r1-s0000008"]
    wanted.quarantine("r1-s0000004", "collapsed")  # which makes step 4 the next one again
    worlds.end_runs(instance, FAILURE, "RealmError")
    assert "the trainer of r1 is given up: it said why" in tick(wanted, instance).skip_message


def test_a_segment_whose_heart_stands_still_is_put_down(wanted: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    signals: list[int] = []
    monkeypatch.setattr(supervisor.os, "kill", lambda process, signum: signals.append(process))
    lease = wanted.training_lease("r1")
    held = lease.take("a segment")
    try:
        record = {"pid": 4321, "host": HERE, "by": "", "heartbeat": time.time() - 1000, "token": 1}
        os.pwrite(held, json.dumps(record).encode(), 0)
        beats: dict[str, float] = {}
        assert [supervisor.tend(wanted, "r1", beats).state for _ in range(2)] == ["runs", "killed"]
        assert signals == [4321]
    finally:
        os.close(held)


def test_nothing_is_asked_for_beside_a_trainer_after_a_stop_or_unless_wanted(
    wanted: Store, instance: dg.DagsterInstance
) -> None:
    with wanted.training_lease("r1").hold("a trainer of r1", by=trainer.DETACHED):
        assert "r1 runs" in tick(wanted, instance).skip_message
    with wanted.training_lease("r1").hold("a trainer of r1", by="a segment"):
        assert "goes on to its checkpoint and is the last one" in trainer.stop(wanted.home, "r1", timeout=0)
    assert "r1 stopped" in tick(wanted, instance).skip_message
    with pytest.raises(RealmError, match="was asked to stop; run the same command again"):
        main_job._wait_for_restart(wanted, None)
    worlds.pretend_checkpoint(wanted, "r2", 0)
    assert "r2 unwanted" in tick(wanted, instance).skip_message
    operate(wanted, mode="detached")
    assert "a process of its own" in tick(wanted, instance).skip_message


def test_between_two_segments_nobody_starts_a_trainer_and_no_new_run_begins(
    wanted: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "launch", lambda *_: pytest.fail("a trainer was started"))
    assert supervisor.tend(wanted, "r1", {}).state == "waits"
    assert retraining.due(wanted).reason == "r1 is still being trained"
    assert main_job._wait_for_restart(wanted, None) is None


def test_the_mode_may_change_in_the_middle_of_a_run(wanted: Store, instance: dg.DagsterInstance) -> None:
    operate(wanted, mode="detached")
    assert supervisor.look(wanted, "r1").state == "down"  # which the health sensor mends
    operate(wanted, mode="segments")
    assert asked(tick(wanted, instance)) == ["r1-s0000004"]


def test_the_count_is_the_book_of_the_supervisor(wanted: Store, instance: dg.DagsterInstance) -> None:
    tick(wanted, instance)
    assert supervisor.supervision(wanted, "r1") == supervisor.Supervision(restarts=1, checkpoint="r1-s0000000")
    assert segments.take_turn(wanted, instance, "r1").key is None
