"""A new training run by the calendar: only if something changed, and never two at once."""

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest

from orchestration import retraining
from orchestration.defs import schedules
from orchestration.defs.jobs import bootstrap
from realm_core.artifacts import corpora
from realm_core.artifacts.store import Store
from realm_core.config import Config
from realm_core.errors import DataError
from realm_core.ports import NullSink
from realm_core.stages import CODE, corpus, grow


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def tick(store: Store, instance: dg.DagsterInstance) -> Any:
    when = datetime.datetime(2030, 1, 6, 3, tzinfo=datetime.UTC)
    context = dg.build_schedule_context(instance=instance, scheduled_execution_time=when, resources={"store": store})
    return schedules.retrain_schedule(context)


def add_a_document(store: Store) -> None:
    """The source changes, later than everything that was made of it."""
    path = store.home.parent / "grown.jsonl"
    row = {"id": "new", "title": "New", "text": "Nobody knew this before. It happened in 1987 in Bern."}
    path.write_bytes(store.source("corpus").read_bytes() + json.dumps(row).encode() + b"\n")
    values = store.settings()
    values["sources"]["corpus"] = str(path)
    (store.home / "home.json").write_text(json.dumps(values))


def test_nothing_changed_is_the_reason_for_no_new_run(store: Store, instance: dg.DagsterInstance) -> None:
    assert tick(store, instance).skip_message == "neither corpus nor code changed since r1 began"


def test_a_file_that_was_touched_and_says_the_same_is_no_change(store: Store) -> None:
    now = datetime.datetime.now(datetime.UTC).timestamp()
    os.utime(store.source("corpus"), (now + 60, now + 60))
    assert retraining.due(store).run is None


def test_a_changed_source_starts_the_next_run_with_new_inputs_first(
    store: Store, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_a_document(store)
    request = tick(store, instance)
    assert isinstance(request, dg.RunRequest)
    assert request.run_key == "retrain:r2"
    assert request.tags["realm/retrain"] == "r2"
    assert request.tags["realm/reason"] == "since r1: grown.jsonl changed"
    assert tick(store, instance).run_key == request.run_key  # a replayed tick


def test_a_new_version_of_the_corpus_is_a_change(store: Store) -> None:
    add_a_document(store)
    corpus.run(store.config(), source=store.source("corpus"), out=store.path("corpus", "v0002"), sink=NullSink())
    assert retraining.due(store) == retraining.Due("r2", "since r1: corpus v0002 is new")


def test_other_code_is_a_change(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = CODE["pretrain"]
    monkeypatch.setitem(CODE, "pretrain", "99")
    assert retraining.due(store).reason == f"since r1: code of pretrain {before} became 99"


def test_a_run_that_is_still_being_trained_is_not_overtaken(store: Store, instance: dg.DagsterInstance) -> None:
    add_a_document(store)
    with store.training_lease("r1").hold("a trainer of r1"):
        assert tick(store, instance).skip_message == "r1 is still being trained"
    assert retraining.due(store).run == "r2"


def test_without_a_first_run_there_is_nothing_to_repeat(empty_store: Store, instance: dg.DagsterInstance) -> None:
    assert "no training run has begun yet" in tick(empty_store, instance).skip_message


def test_names_somebody_chose_and_runs_that_never_began_do_not_confuse_the_count(store: Store) -> None:
    add_a_document(store)
    for name in ("r7", "ablation", "r8.old"):
        (store.home / "trainer" / name).mkdir(parents=True)
    assert retraining.due(store).run == "r8"  # r7 is taken, and r1 the last that began


@pytest.mark.parametrize(("tags", "run"), [({"realm/retrain": "r2"}, "r2"), ({}, None)])
def test_the_trainer_starts_when_the_inputs_are_there_and_only_then(
    instance: dg.DagsterInstance, tags: dict[str, str], run: str | None
) -> None:
    @dg.job(name=bootstrap.name)
    def inputs() -> None:
        pass

    result = inputs.execute_in_process(instance=instance, tags=tags)
    context = dg.build_run_status_sensor_context(
        sensor_name="retrain_sensor",
        dagster_instance=instance,
        dagster_run=result.dagster_run,
        dagster_event=result.get_run_success_event(),
    )
    found = schedules.retrain_sensor(context)
    if run is None:
        assert isinstance(found, dg.SkipReason)
    else:
        assert found.run_config == {"ops": {"start_detached_trainer": {"config": {"run": "r2"}}}}
        assert found.run_key == "retrain:r2"


def test_the_schedule_is_off_unless_a_cron_is_set() -> None:
    assert Config().retrain.cron is None
    assert schedules.retrain_schedule.default_status == dg.DefaultScheduleStatus.STOPPED


def test_an_expression_that_never_comes_stops_the_schedule_and_nothing_else(
    empty_store: Store,
) -> None:
    values = empty_store.settings()
    values["config"]["retrain"]["cron"] = "99 99 * * *"
    empty_store.write_settings(values)
    code = """
from orchestration.definitions import defs
schedule = defs.get_schedule_def("retrain_schedule")
print(schedule.default_status.value, schedule.description, len(defs.get_repository_def().sensor_defs) > 3)
"""
    environment = {**os.environ, "REALM_HOME": str(empty_store.home)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.startswith("STOPPED Off: retrain.cron: [99 99 * * *] is not acceptable") and "True" in done.stdout
    )


def test_a_grown_corpus_whose_source_changed_is_told_what_to_do_and_starts_no_run_that_fails(
    store: Store, instance: dg.DagsterInstance
) -> None:
    with corpora.growing(store):
        grow.apply(store.config(), store=store, change=grow.Remove(ids=[a_document(store)]), sink=NullSink())
    assert retraining.due(store) == retraining.Due("r2", "since r1: corpus v0002 is new")
    add_a_document(store)
    said = tick(store, instance).skip_message
    assert said.startswith("since r1: grown.jsonl changed, corpus v0002 is new; but ")
    assert "changed since" in said and said.endswith("restore it and bring the change with realm corpus add")
    with pytest.raises(DataError):  # what the job would have met
        corpus.of_home(store.config(), store=store, sink=NullSink())


def a_document(store: Store) -> str:
    return str(json.loads(store.source("corpus").read_text("utf-8").splitlines()[3])["id"])
