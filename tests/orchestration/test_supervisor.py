"""Who starts a dead trainer again, how often, and who is told when that does not help."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from orchestration import journal, status, supervisor, trainer
from orchestration.defs import watch
from realm_core.artifacts.lease import HERE
from realm_core.artifacts.manifest import Plan
from realm_core.artifacts.publish import building
from realm_core.artifacts.store import Store
from realm_core.errors import BusyError
from tests.orchestration import worlds


@pytest.fixture
def wanted(empty_store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A home whose trainer was started, has died, and dies at once whenever it is started again."""
    worlds.pretend_checkpoint(empty_store, "r1", 0)
    empty_store.trainer("r1").mkdir(parents=True)
    (empty_store.trainer("r1") / trainer.STARTED).write_text('{"restarts": 0, "checkpoint": "r1-s0000000"}')
    monkeypatch.setattr("orchestration.trainer.sys.executable", shutil.which("false"))
    return empty_store


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def operate(store: Store, **settings: Any) -> None:
    """Change how a home is looked after."""
    values = store.settings()
    values["config"]["supervise"].update(settings)
    (store.home / "home.json").write_text(json.dumps(values))


def leave(store: Store, finished: bool, error: str | None = None) -> None:
    (store.trainer("r1") / trainer.DONE).write_text(json.dumps({"finished": finished, "error": error}))


def tend(store: Store) -> supervisor.Finding:
    return supervisor.tend(store, "r1", {})


def test_a_dead_trainer_is_started_again_so_many_times_and_then_somebody_is_told_once(wanted: Store) -> None:
    found = [tend(wanted) for _ in range(6)]
    assert [each.state for each in found] == ["restarted"] * 3 + ["given up"] * 3
    assert [each.restarts for each in found] == [1, 2, 3, 3, 3, 3]
    assert [each.news for each in found] == [True] * 4 + [False] * 2
    (alert,) = journal.alerts(wanted)
    assert (alert["kind"], alert["about"], alert["restarts"]) == ("trainer", "r1", 3)
    assert "died 4 times after r1-s0000000" in alert["message"]


def test_the_count_outlives_the_one_who_counts_and_a_new_checkpoint_begins_it_anew(wanted: Store) -> None:
    assert [tend(Store(wanted.home)).restarts for _ in range(2)] == [1, 2]
    worlds.pretend_checkpoint(wanted, "r1", 4)
    assert [tend(Store(wanted.home)).restarts for _ in range(3)] == [1, 2, 3]
    assert tend(wanted).state == "given up"


def test_no_restarts_at_all_is_a_setting(wanted: Store) -> None:
    operate(wanted, max_restarts=0)
    assert tend(wanted).state == "given up"


def test_a_start_by_a_person_begins_the_count_anew(wanted: Store) -> None:
    for _ in range(4):
        tend(wanted)
    with pytest.raises(Exception, match="ended at once"):
        trainer.start(wanted.home, "r1")
    assert supervisor.supervision(wanted, "r1") == supervisor.Supervision(restarts=0, checkpoint="r1-s0000000")
    assert tend(wanted).restarts == 1


def test_who_stopped_finished_or_was_never_started_is_left_alone(wanted: Store) -> None:
    leave(wanted, finished=True)
    assert tend(wanted).state == "finished"
    leave(wanted, finished=False)
    trainer.stop(wanted.home, "r1")
    assert tend(wanted).state == "stopped"
    (wanted.trainer("r1") / trainer.DONE).unlink()  # it did not end in time and was killed
    assert tend(wanted).state == "stopped"
    assert supervisor.tend(wanted, "r2", {}).state == "unwanted"
    assert journal.alerts(wanted) == []


def test_an_error_only_a_person_can_mend_is_told_and_not_repeated(wanted: Store) -> None:
    leave(wanted, finished=False, error="disk full or quota reached")
    assert [tend(wanted).state for _ in range(2)] == ["given up", "given up"]
    (alert,) = journal.alerts(wanted)
    assert "disk full or quota reached (starting it again does not mend that)" in alert["message"]


def test_a_segment_that_trains_meanwhile_counts_as_life(wanted: Store) -> None:
    with wanted.training_lease("r1").hold("a trainer of r1", by="a segment"):
        found = tend(wanted)
        assert found.state == "runs" and f"a segment as process {os.getpid()}" in found.message
        with pytest.raises(BusyError, match="no detached trainer; end that one"):
            trainer.stop(wanted.home, "r1", timeout=0)
    (wanted.trainer("r1") / trainer.STOP).unlink()
    assert tend(wanted).state == "restarted"


@pytest.mark.parametrize(("host", "killed"), [(HERE, True), ("elsewhere", False)])
def test_a_heart_that_stands_still_over_two_looks_is_put_down_where_a_signal_reaches_it(
    wanted: Store, monkeypatch: pytest.MonkeyPatch, host: str, killed: bool
) -> None:
    operate(wanted, stale_seconds=100.0)
    signals: list[int] = []
    monkeypatch.setattr(supervisor.os, "kill", lambda process, signum: signals.append(process))
    old = time.time() - 1000
    record = {"pid": 4321, "host": host, "by": trainer.DETACHED, "heartbeat": old, "token": 1}
    lease = wanted.training_lease("r1")
    held = lease.take("a trainer")
    try:
        os.pwrite(held, json.dumps(record).encode(), 0)
        beats: dict[str, float] = {}
        assert supervisor.tend(wanted, "r1", beats).state == "runs"  # a machine that wakes up looks like this too
        found = supervisor.tend(wanted, "r1", beats)
        assert (found.state == "killed", signals == [4321]) == (killed, killed)
        os.pwrite(held, json.dumps({**record, "heartbeat": old + 1}).encode(), 0)  # slow, and alive
        signals.clear()
        assert supervisor.tend(wanted, "r1", beats).state == "runs"
        assert signals == []
    finally:
        os.close(held)


@pytest.mark.parametrize("jump", [-7 * 86400.0, 7 * 86400.0])
def test_a_clock_that_jumps_gets_no_trainer_killed_that_is_well(
    wanted: Store, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """The sensor itself, its cursor and the lease's record; the clock jumps between two looks, before the next heartbeat."""
    monkeypatch.setattr(supervisor.os, "kill", lambda process, signum: pytest.fail("killed"))
    now, context = time.time, dg.build_sensor_context(instance=instance, resources={"store": wanted})
    lease = wanted.training_lease("r1")
    held = lease.take("a trainer")

    def beat_and_look(beats: bool) -> None:
        if beats:
            record = {"pid": 4321, "host": HERE, "by": trainer.DETACHED, "heartbeat": time.time(), "token": 1}
            os.pwrite(held, json.dumps(record).encode(), 0)
        found = watch.trainer_health_sensor(context)
        assert isinstance(found, dg.SkipReason) and found.skip_message.startswith("r1 runs"), found

    try:
        beat_and_look(True)
        beat_and_look(False)  # two looks between two heartbeats
        monkeypatch.setattr(time, "time", lambda: now() + jump)
        beat_and_look(False)
        beat_and_look(True)
        monkeypatch.setattr(time, "time", now)
        beat_and_look(False)
        beat_and_look(True)
    finally:
        os.close(held)
    assert journal.alerts(wanted) == []
    assert supervisor.supervision(wanted, "r1") == supervisor.Supervision(restarts=0, checkpoint="r1-s0000000")


def test_an_alert_reaches_the_command_and_a_command_that_fails_is_noted(empty_store: Store, tmp_path: Path) -> None:
    script = tmp_path / "tell.sh"
    script.write_text(
        f'#!/bin/sh\necho "$REALM_ALERT_KIND|$REALM_ALERT_ABOUT|$REALM_HOME" > {tmp_path}/told\ncat >> {tmp_path}/told\n'
    )
    script.chmod(0o755)
    operate(empty_store, alert_command=str(script))
    journal.alert(empty_store, "trainer", "r1", "is given up")
    told = (tmp_path / "told").read_text().splitlines()
    assert told[0] == f"trainer|r1|{empty_store.home.resolve()}"
    assert json.loads(told[1])["message"] == "is given up"
    operate(empty_store, alert_command="false --really")
    journal.alert(empty_store, "pointer", "live.json", "edited")
    operate(empty_store, alert_command="/nowhere/at-all")
    journal.alert(empty_store, "pointer", "live.json", "edited")
    operate(empty_store, alert_command='"unclosed')
    journal.alert(empty_store, "pointer", "live.json", "edited")
    said = [row["command"] for row in journal.alerts(empty_store)]
    assert said[0] == "ran" and said[1] == "failed with code 1"
    assert "No such file" in said[2] and "No closing quotation" in said[3]


def test_the_health_sensor_shows_restarts_and_the_end_in_dagster(wanted: Store, instance: dg.DagsterInstance) -> None:
    operate(wanted, max_restarts=1)
    results = []
    for _ in range(3):
        context = dg.build_sensor_context(instance=instance, resources={"store": wanted})
        results.append(watch.trainer_health_sensor(context))
    first, second, third = results
    (event,) = first.asset_events
    assert event.metadata["trainer"].value == "restarted" and "restart 1 of 1" in event.description
    (event,) = second.asset_events
    assert event.metadata["trainer"].value == "given up"
    assert isinstance(third, dg.SkipReason)
    assert "r1 given up: died 2 times" in third.skip_message


def test_a_home_without_training_runs_is_a_reason_for_silence(empty_store: Store, instance: dg.DagsterInstance) -> None:
    context = dg.build_sensor_context(instance=instance, resources={"store": empty_store})
    assert watch.trainer_health_sensor(context).skip_message == "no training run"


def test_the_status_tells_who_trains_since_when_and_what_went_wrong(wanted: Store) -> None:
    operate(wanted, max_restarts=0)
    tend(wanted)
    found = status.of(wanted, "r1")
    assert (found["state"], found["process"], found["token"], found["restarts"]) == ("given up", None, 0, 0)
    assert "the trainer of r1 is given up" in status.text(found)
    with wanted.training_lease("r1").hold("a trainer of r1", by=trainer.DETACHED):
        found = status.of(wanted, "r1")
    assert (found["state"], found["process"], found["host"], found["token"]) == ("runs", os.getpid(), HERE, 1)
    assert found["heartbeat_age_seconds"] < 60
    text = status.text(found)
    assert f"process     {os.getpid()} on {HERE}, heartbeat 0 s ago" in text
    assert "token       1, restarts since the last checkpoint 0" in text
    json.dumps(found)


def test_a_foreign_folder_does_not_stop_supervision_and_is_named(wanted: Store) -> None:
    (wanted.home / "trainer" / "r1.old").mkdir()
    shutil.copytree(wanted.path("checkpoints", "r1-s0000000"), wanted.home / "checkpoints" / "r1-s0000000.backup")
    trainer.stop(wanted.home, "r1")
    said = watch.trainer_health_sensor(dg.build_sensor_context(resources={"store": wanted}))
    assert isinstance(said, dg.SkipReason) and said.skip_message.startswith("r1 ")
    found = status.of(wanted, "r1")
    assert found["checkpoints"] == ["r1-s0000000"]
    assert "passed over checkpoints/r1-s0000000.backup, trainer/r1.old" in status.text(found)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["status", "stop"])
def test_to_ask_about_a_run_that_never_began_is_an_error_and_leaves_nothing(
    empty_store: Store, command: str, start_python: Callable
) -> None:
    wanted = empty_store
    worlds.pretend_checkpoint(wanted, "r1", 0)
    # In a process of its own: this command line puts its commands in the place of the library's.
    code = "import sys; from orchestration import cli; sys.argv[0] = 'realm'; cli.main()"
    process = start_python(code, "train", command, "--run", "r9", "--home", str(wanted.home))
    assert process.communicate()[1] == f"error: {wanted.home}: no training run r9; there is r1\n"
    assert process.returncode == 2
    assert wanted.runs() == ["r1"]


def test_looking_at_a_run_writes_nothing(empty_store: Store) -> None:
    key = worlds.pretend_checkpoint(empty_store, "r1", 0)
    assert status.of(empty_store, "r1")["checkpoints"] == [key]
    assert supervisor.look(empty_store, "r1").state == "unwanted"
    assert not (empty_store.home / "trainer").exists()
    with empty_store.training_lease("r1").hold("a trainer of r1"):
        assert empty_store.trainer("r1").is_dir()


@pytest.mark.parametrize(("stalled", "warned"), [(1.9, False), (2.1, True)])
def test_the_status_warns_of_a_trainer_that_stands_still_for_more_than_a_fiftieth_of_its_time(
    wanted: Store, stalled: float, warned: bool
) -> None:
    plan = Plan(stage="pretrain", code="1", config_digest="0" * 64)
    with building(wanted.path("checkpoints", "r1-s0000004"), plan) as build:
        build.commit({"step": 4}, record={"train_seconds": 100.0, "stall_seconds": stalled})
    found = status.of(wanted, "r1")
    assert (found["stalled_share"], found["stalled_too_long"]) == (pytest.approx(stalled / 100), warned)
    assert ("warning     stalled for more than 2% of its time" in status.text(found)) == warned
