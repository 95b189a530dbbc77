"""Ctrl-C, kill -9 and impatience in the middle of the main job: nothing is left behind, nothing is done twice."""

import json
import os
import signal
import time
from collections import Counter

import dagster as dg
import psutil
import pytest
from dagster import AssetKey, DagsterRunStatus

from orchestration import services, trainer
from orchestration.report import steps_of
from realm_core.artifacts.publish import read_json_lines
from tests.e2e.conftest import Home

pytestmark = [pytest.mark.e2e, pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(2400)]
LAST = "r1-s0000300"


@pytest.fixture
def long_home(home: Home) -> Home:
    home.settings = ("pretrain.steps=300", "pretrain.checkpoint_every=20", "pretrain.batch=16", "pretrain.keep=40")
    return home


def test_interrupted_twice_and_robbed_of_its_daemon_the_main_job_ends_live(long_home: Home) -> None:
    home = long_home
    # Ctrl-C, twice as people do, while trainer, daemon and a refresh are at work.
    job = home.start(*home.main_job())
    home.wait_for(lambda: home.live() and steps_of(home.store, "r1"), "training did not begin", job)
    refused = home.start(*home.main_job())
    assert refused.wait(timeout=120) == 2
    assert "the main job already runs" in home.last_error()
    assert str(job.pid) in home.last_error()
    job.send_signal(signal.SIGINT)
    time.sleep(1)
    assert home.interrupt(job) == 130
    assert home.last_error() == "error: interrupted"
    assert home.processes() == []
    assert trainer.alive(home.path, "r1") is None

    # The next run loses its daemon to kill -9 and goes on with a new one.
    job = home.start(*home.main_job())
    began = len(read_json_lines(home.store.trainer("r1") / "steps.jsonl"))
    home.wait_for(
        lambda: len(read_json_lines(home.store.trainer("r1") / "steps.jsonl")) > began, "training did not go on", job
    )
    daemon = services.daemon_process(home.path)
    assert daemon is not None
    os.kill(daemon, signal.SIGKILL)
    home.wait_for(lambda: services.daemon_process(home.path) not in (None, daemon), "no new daemon", job)
    output, _ = job.communicate(timeout=600)
    assert job.returncode == 0, home.errors.read_text()
    assert "started it again" in home.errors.read_text()
    report = json.loads(output)
    assert home.processes() == []

    # What is there is what an undisturbed run would have left.
    assert report["live"]["checkpoint"] == LAST
    keys = [f"r1-s{step:07d}" for step in range(0, 301, 20)]
    assert home.store.names("checkpoints") == keys
    assert [row["step"] for row in steps_of(home.store, "r1")] == list(range(1, 301))
    generations = [live.generation for live in home.store.live_history()]
    assert generations == list(range(1, len(generations) + 1))
    with home.instance() as instance:
        reported = instance.fetch_materializations(AssetKey("realm_checkpoint"), limit=1000).records
        assert Counter(record.partition_key for record in reported) == Counter(keys)
        runs = instance.get_runs()
        assert all(run.is_finished for run in runs)
        asked = [
            run.tags["dagster/run_key"] for run in runs if "dagster/retry_number" not in run.tags and is_refresh(run)
        ]
        assert len(asked) == len(set(asked))
        promoted = instance.get_materialized_partitions(AssetKey("promoted_index"))
        assert promoted == {live.index for live in home.store.live_history()}
        assert [run.status for run in runs if run.tags.get("dagster/partition") == LAST].count(
            DagsterRunStatus.SUCCESS
        ) == 2  # the refresh, and the reader tuned on it


def is_refresh(run: dg.DagsterRun) -> bool:
    return run.job_name == "refresh_index" and "dagster/run_key" in run.tags


def test_after_a_crash_of_the_whole_machine_the_same_command_ends_live(long_home: Home) -> None:
    home = long_home
    home.settings = ("pretrain.steps=12", "pretrain.checkpoint_every=4")
    job = home.start(*home.main_job())
    # While the first refresh runs, everything dies at once: command, daemon, code server, run worker, trainer.
    home.wait_for(lambda: started_refreshes(home), "no refresh was started", job)
    crash(home)
    with home.instance() as instance:
        assert [run.status for run in instance.get_runs() if is_refresh(run)] == [DagsterRunStatus.STARTED]

    report = json.loads(home.run(*home.main_job()))
    assert report["live"]["checkpoint"] == "r1-s0000012"
    assert home.processes() == []
    with home.instance() as instance:
        assert all(run.is_finished for run in instance.get_runs())


def started_refreshes(home: Home) -> list[str]:
    if not (home.path / "dagster" / "dagster.yaml").exists():
        return []
    with home.instance() as instance:
        found = instance.get_runs(dg.RunsFilter(job_name="refresh_index", statuses=[DagsterRunStatus.STARTED]))
        # Dead runs are told from living ones by the process that they wrote down first.
        return [run.run_id for run in found if instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_START)]


def crash(home: Home) -> None:
    victims = [process for process, _ in home._living()]
    for process in victims:
        process.suspend()  # so that none sees another die
    for process in victims:
        process.kill()
    psutil.wait_procs(victims, timeout=60)
