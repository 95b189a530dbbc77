"""Dagster's processes under SIGKILL: the daemon alone, and all of them at once as when the machine crashes. In one test,
because a daemon takes many seconds to start."""

import json
import os
import random
import signal
from collections import Counter
from contextlib import suppress
from pathlib import Path

import dagster as dg
import pytest
from dagster import AssetKey

from orchestration import services, trainer
from realm_core.artifacts.publish import write_durably
from tests.faults.loops import RUN_WORKER, Loop
from tests.orchestration import worlds

pytestmark = [pytest.mark.faults, pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1500)]


def test_killed_services_leave_a_queue_that_drains_and_nothing_is_done_twice_nor_left_undone(tmp_path: Path) -> None:
    store = worlds.create(tmp_path / "home", ("pretrain.checkpoint_every=4", "refresh.sensor_seconds=1"))
    worlds.bootstrap(store)
    services.prepare(store.home)
    loop = Loop(store.home, random.Random(0))
    loop.daemon = services.KeptDaemon(store.home, lives=10)
    try:
        everything_dies_while_a_refresh_is_at_work(loop)
        loop.until(lambda: loop.store.live() is not None, "the queue does not drain")
        worlds.train(store, "r1", 4)
        the_daemon_dies_as_soon_as_it_has_asked(loop)
        loop.until(lambda: loop.store.require_live().index == "r1-s0000004", "the later one does not go live")
        loop.until(lambda: not loop._under_way(), "runs hang")
        loop.watch(3.0)  # ticks that find everything done
        nothing_was_done_twice(loop)
        segments_take_over_and_one_of_them_is_killed(loop)
    finally:
        loop.end()


def nothing_was_done_twice(loop: Loop) -> None:
    store = loop.store
    with dg.DagsterInstance.from_config(str(services.dagster_home(store.home))) as instance:
        runs = instance.get_runs(dg.RunsFilter(job_name="refresh_index"))
        asked = Counter(run.tags["dagster/run_key"] for run in runs if "dagster/parent_run_id" not in run.tags)
        assert set(asked.values()) == {1}
        assert Counter(run.status.value for run in runs)["SUCCESS"] == 2
        reported = instance.fetch_materializations(AssetKey("realm_checkpoint"), limit=100).records
        assert Counter(record.partition_key for record in reported) == {"r1-s0000000": 1, "r1-s0000004": 1}
        promoted = instance.fetch_materializations(AssetKey("promoted_index"), limit=100).records
        assert Counter(record.partition_key for record in promoted) == {"r1-s0000000": 1, "r1-s0000004": 1}
    assert [moved.index for moved in store.live_history()] == ["r1-s0000000", "r1-s0000004"]


def segments_take_over_and_one_of_them_is_killed(loop: Loop) -> None:
    store, last = loop.store, "r1-s0000012"
    values = store.settings()
    values["config"]["supervise"]["mode"] = "segments"
    write_durably(store.home / "home.json", json.dumps(values))
    trainer.start(store.home, "r1")
    loop.until(lambda: inside_a_step(loop), "no segment is asked for")
    for process in loop._found(RUN_WORKER):
        os.kill(process, signal.SIGKILL)
    loop.until(lambda: store.checkpoints("r1")[-1] == last, "the segments do not go on")
    loop.until(lambda: store.require_live().index == last, "the last one does not go live")
    loop.until(lambda: trainer.outcome(store.home, "r1") is not None, "nobody finds that it is finished")
    assert trainer.outcome(store.home, "r1") == {"finished": True, "error": None}
    with dg.DagsterInstance.from_config(str(services.dagster_home(loop.home))) as instance:
        segments = instance.get_runs(dg.RunsFilter(job_name="train_segment"))
        assert Counter((run.tags["dagster/partition"], run.status.value) for run in segments) == {
            ("r1-s0000008", "FAILURE"): 1,
            ("r1-s0000008", "SUCCESS"): 1,
            (last, "SUCCESS"): 1,
        }
        assert instance.get_materialized_partitions(AssetKey("realm_checkpoint")) == set(store.checkpoints("r1"))


def everything_dies_while_a_refresh_is_at_work(loop: Loop) -> None:
    loop.until(lambda: inside_a_step(loop), "no refresh was started")
    victims = [*loop._found(RUN_WORKER), *loop._found("grpc")]
    victims += [process for process in [services.daemon_process(loop.home)] if process]
    assert len(victims) >= 3
    for signum in (signal.SIGSTOP, signal.SIGKILL):  # so that none sees another die
        for process in victims:
            with suppress(ProcessLookupError):
                os.kill(process, signum)


def inside_a_step(loop: Loop) -> bool:
    """A run that has not said where it runs is left to Dagster's own time-out, which is minutes."""
    started = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])
    with dg.DagsterInstance.from_config(str(services.dagster_home(loop.home))) as instance:
        return any(
            instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_START) for run in instance.get_runs(started)
        )


def the_daemon_dies_as_soon_as_it_has_asked(loop: Loop) -> None:
    def asked() -> bool:
        with dg.DagsterInstance.from_config(str(services.dagster_home(loop.home))) as instance:
            return bool(instance.get_runs(dg.RunsFilter(tags={"dagster/partition": "r1-s0000004"})))

    loop.until(asked, "the later one is not asked for")
    daemon = services.daemon_process(loop.home)
    assert daemon is not None
    os.kill(daemon, signal.SIGKILL)
