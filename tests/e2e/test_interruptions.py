"""A home that has bad luck: a torn line, a crash of the machine, Ctrl-C, a killed daemon. Nothing is left behind, nothing
is done twice, and the same command brings it to its end. One test, because every chapter needs the one before."""

import json
import os
import signal
import time
from collections import Counter
from typing import Any

import dagster as dg
import psutil
import pytest
from dagster import AssetKey, DagsterRunStatus

from orchestration import services, trainer
from orchestration.report import steps_of
from realm_core.artifacts.publish import read_json_lines
from tests.e2e.homes import PATIENCE, Home

pytestmark = [pytest.mark.e2e, pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(3000)]
STEPS, EVERY = 120, 20


def test_the_same_command_brings_an_unlucky_home_to_its_end(home: Home) -> None:
    home.settings = (*home.settings, f"pretrain.steps={STEPS}", f"pretrain.checkpoint_every={EVERY}")
    a_malformed_line_is_named_with_file_and_number(home)
    everything_dies_during_the_first_refresh(home)
    a_second_command_is_refused_and_ctrl_c_ends_the_first(home)
    a_command_that_is_killed_leaves_a_daemon_and_a_job_and_the_next_one_ends_both(home)
    report = a_killed_daemon_is_replaced(home)
    the_home_is_what_an_undisturbed_run_leaves(home, report)


def a_malformed_line_is_named_with_file_and_number(home: Home) -> None:
    good = home.documents.read_text()
    lines = good.splitlines()
    lines[6] = '{"title": "Torn'
    home.documents.write_text("\n".join(lines) + "\n")
    home.run(*home.main_job(), code=2)
    assert home.last_error().startswith(f"error: {home.documents}:7: not JSON")
    assert home.processes() == []
    assert home.store.names("corpus") == []
    home.documents.write_text(good)


def everything_dies_during_the_first_refresh(home: Home) -> None:
    job = home.start(*home.main_job())
    home.wait_for(lambda: refreshes_at_work(home), "no refresh was started", job)
    victims = [process for process, _ in home.living()]
    assert len(victims) >= 4  # command, daemon, run worker, trainer, and Dagster's code server
    for process in victims:
        process.suspend()  # so that none sees another die
    for process in victims:
        process.kill()
    psutil.wait_procs(victims, timeout=60)
    with home.instance() as instance:
        assert [run.status for run in refreshes(instance)] == [DagsterRunStatus.STARTED]
    assert home.live() is None


def a_second_command_is_refused_and_ctrl_c_ends_the_first(home: Home) -> None:
    job = home.start(*home.main_job())
    home.wait_for(lambda: home.live() and steps_of(home.store, "r1"), "training did not begin", job)
    refused = home.start(*home.main_job())
    assert refused.wait(timeout=PATIENCE) == 2
    assert (
        f"the main job already runs as process {job.pid}" in home.errors.read_text()
    )  # beside the progress of the first
    job.send_signal(signal.SIGINT)
    time.sleep(1)
    assert home.interrupt(job) == 130  # a second time, as impatient people do
    assert home.processes() == []
    assert trainer.alive(home.path, "r1") is None


def a_command_that_is_killed_leaves_a_daemon_and_a_job_and_the_next_one_ends_both(home: Home) -> None:
    job = home.start(*home.main_job())
    running_job = home.wait_for(lambda: [each for each, line in home.living() if "job execute" in line], "no job", job)
    daemon = services.daemon_process(home.path)
    job.kill()
    job.wait()
    assert daemon is not None and psutil.pid_exists(daemon) and running_job[0].is_running()
    job = home.start(*home.main_job())
    home.wait_for(lambda: services.daemon_process(home.path) not in (None, daemon), "the orphan stays", job)
    assert not running_job[0].is_running()
    assert home.interrupt(job) == 130
    assert home.processes() == []


def a_killed_daemon_is_replaced(home: Home) -> dict[str, Any]:
    done = len(step_log(home))
    job = home.start(*home.main_job())
    home.wait_for(lambda: len(step_log(home)) > done, "training did not go on", job)
    daemon = services.daemon_process(home.path)
    assert daemon is not None
    os.kill(daemon, signal.SIGKILL)
    home.wait_for(lambda: services.daemon_process(home.path) not in (None, daemon), "no new daemon", job)
    output, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, home.errors.read_text()
    assert "started it again" in home.errors.read_text()
    return json.loads(output)


def the_home_is_what_an_undisturbed_run_leaves(home: Home, report: dict[str, Any]) -> None:
    keys = [f"r1-s{step:07d}" for step in range(0, STEPS + 1, EVERY)]
    assert home.processes() == []
    assert report["live"]["checkpoint"] == keys[-1]
    assert home.store.names("checkpoints") == keys
    assert [row["step"] for row in steps_of(home.store, "r1")] == list(range(1, STEPS + 1))
    history = home.store.live_history()
    assert [live.generation for live in history] == list(range(1, len(history) + 1))
    assert len({live.index_digest for live in history}) == len(history)
    with home.instance() as instance:
        reported = instance.fetch_materializations(AssetKey("realm_checkpoint"), limit=1000).records
        assert Counter(record.partition_key for record in reported) == Counter(keys)
        assert all(run.is_finished for run in instance.get_runs())
        asked = [run.tags["dagster/run_key"] for run in refreshes(instance) if "dagster/retry_number" not in run.tags]
        assert len(asked) == len(set(asked))
        assert instance.get_materialized_partitions(AssetKey("promoted_index")) == {live.index for live in history}


def refreshes(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    return [run for run in instance.get_runs(dg.RunsFilter(job_name="refresh_index")) if "dagster/run_key" in run.tags]


def refreshes_at_work(home: Home) -> list[dg.DagsterRun]:
    """Refreshes that are inside a step."""
    if not (home.path / "dagster" / "dagster.yaml").exists():
        return []
    with home.instance() as instance:
        return [
            run
            for run in refreshes(instance)
            if run.status == DagsterRunStatus.STARTED
            and instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_START)
        ]


def step_log(home: Home) -> list[dict[str, Any]]:
    return read_json_lines(home.store.trainer("r1") / "steps.jsonl")
