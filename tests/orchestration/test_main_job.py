"""The small decisions of the main job: when a refresh has ended, what a failure says, what may not change."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster import DagsterRunStatus

from orchestration import main_job, report
from realm_core.artifacts.store import Store
from realm_core.config import IndexConfig
from realm_core.errors import ConfigError, DataError

KEY = "r1-s0000004"
SUCCESS, FAILURE, STARTED = DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE, DagsterRunStatus.STARTED
RETRY_DUE = {"dagster/will_retry": "true"}
RETRIED = {"dagster/will_retry": "true", "dagster/auto_retry_run_id": "another"}


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def add_run(instance: dg.DagsterInstance, status: DagsterRunStatus, tags: dict[str, str], key: str = KEY) -> str:
    run = dg.DagsterRun(
        job_name="refresh_index", run_id=str(uuid.uuid4()), status=status, tags={"realm/checkpoint": key, **tags}
    )
    instance.add_run(run)
    return run.run_id


@pytest.mark.parametrize(
    ("runs", "settled"),
    [
        ([], False),  # the sensor has not asked yet
        ([(STARTED, {})], False),
        ([(SUCCESS, {})], True),
        ([(FAILURE, {})], True),  # refused
        ([(FAILURE, RETRY_DUE)], False),  # killed; the daemon tries it again in a moment
        ([(FAILURE, RETRIED), (STARTED, {})], False),
        ([(FAILURE, RETRIED), (SUCCESS, {})], True),
    ],
)
def test_a_refresh_is_settled_when_nothing_of_it_goes_on(
    empty_store: Store,
    instance: dg.DagsterInstance,
    runs: list[tuple[DagsterRunStatus, dict[str, str]]],
    settled: bool,
) -> None:
    for status, tags in runs:
        add_run(instance, status, tags)
    add_run(instance, STARTED, {}, "r1-s0000008")  # another checkpoint's
    assert main_job._settled(empty_store, instance, KEY) == settled


def test_what_is_live_is_settled_only_when_its_run_has_ended(empty_store: Store, instance: dg.DagsterInstance) -> None:
    empty_store.move_live(KEY, "a" * 64, "b" * 64, "by hand", None)
    assert main_job._settled(empty_store, instance, KEY)
    add_run(instance, STARTED, {})  # the pointer has moved, the run is about to end
    assert not main_job._settled(empty_store, instance, KEY)


def test_a_first_refresh_that_failed_for_good_ends_the_wait(empty_store: Store, instance: dg.DagsterInstance) -> None:
    first = "r1-s0000000"
    assert main_job._first_refresh_failed(empty_store, instance) is None
    run_id = add_run(instance, FAILURE, RETRIED, first)
    second = add_run(instance, STARTED, {}, first)
    assert main_job._first_refresh_failed(empty_store, instance) is None
    run = instance.get_run_by_id(second)
    assert run is not None
    instance.report_run_failed(run)
    said = main_job._first_refresh_failed(empty_store, instance)
    assert said is not None
    assert second in said or run_id in said


@dg.asset
def broken() -> None:
    try:
        raise OSError("no space left on device")
    except OSError as error:
        raise RuntimeError("the stage failed") from error


@dg.asset
def refused() -> None:
    raise dg.Failure("documents.jsonl:7: not JSON; mend the line")


def test_a_failure_is_told_in_the_words_of_the_step(instance: dg.DagsterInstance) -> None:
    run_id = dg.materialize([refused], instance=instance, raise_on_error=False).run_id
    assert main_job.failure_text(instance, run_id) == "documents.jsonl:7: not JSON; mend the line"
    run_id = dg.materialize([broken], instance=instance, raise_on_error=False).run_id
    assert main_job.failure_text(instance, run_id) == f"broken: OSError: no space left on device (run {run_id})"


def test_the_failure_of_a_command_is_not_that_of_a_refresh_beside_it(instance: dg.DagsterInstance) -> None:
    dg.materialize([refused], instance=instance, raise_on_error=False)
    add_run(instance, FAILURE, {report.SENSOR_TAG: "checkpoint_sensor"})
    assert main_job._failure_since(instance, 0.0) == "documents.jsonl:7: not JSON; mend the line"
    assert main_job._failure_since(instance, 4e9) is None


@pytest.mark.parametrize("source", ["corpus", "questions"])
def test_a_source_that_changed_under_a_home_is_refused(store: Store, source: str) -> None:
    main_job._require_same_sources(store)
    changed = store.home.parent / "changed.jsonl"
    changed.write_bytes(store.source(source).read_bytes() + b"\n")
    values = store.settings()
    values["sources"][source] = str(changed)
    (store.home / "home.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=rf"{changed}: changed since .* was made from it"):
        main_job._require_same_sources(store)


def test_an_index_that_cannot_be_built_is_refused_before_the_home_is_made(store: Store, tmp_path: Path) -> None:
    impossible = store.config().model_copy(update={"index": IndexConfig(params={"chunk": 0})})
    with pytest.raises(ConfigError, match="index exact: chunk=0"):
        main_job.run(tmp_path / "new", impossible, "tiny", store.source("corpus"), store.source("questions"))
    assert not (tmp_path / "new").exists()


def test_a_home_without_a_report_is_not_finished(store: Store) -> None:
    assert main_job._finished_report(store) is None
    (store.home / "report.json").write_text("{}")
    assert main_job._finished_report(store) is None


def test_what_triggered_a_run_is_told_by_its_tags(instance: dg.DagsterInstance) -> None:
    by_sensor = add_run(instance, SUCCESS, {report.SENSOR_TAG: "checkpoint_sensor"})
    by_person = add_run(instance, SUCCESS, {})
    assert report.triggered_by(instance, by_sensor) == "sensor:checkpoint_sensor"
    assert report.triggered_by(instance, by_person) == "person"
    assert report.triggered_by(instance, "nobody knows") is None
    assert report.triggered_by(instance, None) is None
