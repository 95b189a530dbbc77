"""The sensors that look at the pointer and at failed refreshes."""

import json
import os
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import dagster as dg
import pytest

from assets.checkpoint import LIVE_POINTER
from orchestration import journal
from orchestration.defs import growth, sensors, watch
from orchestration.defs.jobs import refresh_index
from orchestration.resources import spool, tracking
from realm_core.artifacts.publish import append_durably
from realm_core.artifacts.store import Store
from tests.assets.test_materialisation import MemoryTracker
from tests.orchestration import worlds


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def index(store: Store, key: str) -> str:
    """An index of which there is a manifest and nothing more; its digest."""
    values = {"stage": "index", "code": "1", "config_digest": key, "parents": {}, "sources": {}, "files": {}}
    worlds.write_manifest(store.path("indexes", key), values)
    return store.manifest("indexes", key).digest


@pytest.fixture
def live(empty_store: Store) -> Store:
    """A home whose pointer moved twice."""
    for step in (0, 4):
        key = f"r1-s{step:07d}"
        empty_store.move_live(key, index(empty_store, key), "c" * 64, "a promotion", None)
    return empty_store


def tick(store: Store, instance: dg.DagsterInstance, cursor: str | None = None) -> Any:
    """One look; what it returns is told to Dagster."""
    context = dg.build_sensor_context(instance=instance, cursor=cursor, resources={"store": store})
    result = watch.pointer_sensor(context)
    if isinstance(result, dg.SensorResult):
        for event in result.asset_events:
            instance.report_runless_asset_event(event)
    return result


def edit(store: Store, **values: Any) -> None:
    path = store.home / "live.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_promotion_is_observed_once_whoever_made_it(live: Store, instance: dg.DagsterInstance) -> None:
    (event,) = tick(live, instance).asset_events
    assert event.asset_key == LIVE_POINTER
    assert event.metadata["index"].value == "r1-s0000004" and event.metadata["generation"].value == 2
    assert "was observed" in tick(live, instance).skip_message
    live.move_live("r1-s0000000", live.manifest("indexes", "r1-s0000000").digest, "c" * 64, "a roll-back", None)
    (event,) = tick(live, instance).asset_events
    assert event.metadata["reason"].value == "a roll-back"
    assert journal.alerts(live) == []


def test_nothing_live_yet_is_a_reason_for_silence(empty_store: Store, instance: dg.DagsterInstance) -> None:
    assert tick(empty_store, instance).skip_message == "no index is live yet"


@pytest.mark.parametrize(
    "hand", ["another index", "an index that is gone", "another digest", "torn", "removed", "a word"]
)
def test_a_pointer_that_no_promotion_moved_is_an_alert_told_once(
    live: Store, instance: dg.DagsterInstance, hand: str
) -> None:
    first = live.manifest("indexes", "r1-s0000000").digest
    match hand:
        case "another index":
            edit(live, index="r1-s0000000", index_digest=first)
            text = "r1-s0000000 was not made live by a promotion: somebody edited it"
        case "an index that is gone":
            edit(live, index="r1-s0000099")
            text = "names an index that cannot be read"
        case "another digest":
            edit(live, index_digest=first)
            text = f"says r1-s0000004 has digest {first[:12]}"
        case "torn":
            (live.home / "live.json").write_text('{"index')
            text = "live.json: damaged"
        case "removed":
            (live.home / "live.json").unlink()
            text = "live.json: gone, r1-s0000004 was live"
        case _:
            edit(live, reason="because I can")
            text = "somebody edited it"
    result = tick(live, instance)
    (event,) = result.asset_events
    assert text in event.description
    (alert,) = journal.alerts(live)
    assert alert["kind"] == "pointer" and text in alert["message"]
    assert "told before" in tick(live, instance, result.cursor).skip_message
    assert len(journal.alerts(live)) == 1


def test_a_pointer_that_was_mended_is_observed_and_the_next_hand_is_told_anew(
    live: Store, instance: dg.DagsterInstance
) -> None:
    good = (live.home / "live.json").read_text()
    edit(live, reason="by hand")
    cursor = tick(live, instance).cursor
    (live.home / "live.json").write_text(good)
    result = tick(live, instance, cursor)
    assert isinstance(result, dg.SensorResult) and result.cursor == ""
    edit(live, reason="by hand")
    tick(live, instance, result.cursor)
    assert len(journal.alerts(live)) == 2


def test_a_crash_between_history_and_pointer_is_not_somebodys_hand(live: Store, instance: dg.DagsterInstance) -> None:
    last = json.loads((live.home / "live.history.jsonl").read_text().splitlines()[-1])
    append_durably(live.home / "live.history.jsonl", {**last, "generation": 3})
    assert isinstance(tick(live, instance), dg.SensorResult)
    assert journal.alerts(live) == []


@pytest.mark.slow
def test_what_ended_processes_left_in_the_spool_is_sent_by_a_sensor_that_does_not_wait_for_it(
    empty_store: Store, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, waited = threading.Event(), threading.Event()

    class Slow(tracking.MlflowTracker):
        def _connect(self) -> None:
            waited.wait(60)

        def _send(self, run: str, rows: list[dict[str, Any]]) -> None:
            assert (run, [row["step"] for row in rows]) == ("r1", [1])
            sent.set()

    monkeypatch.setattr(watch, "tracker_for", lambda home: Slow("sqlite://", home / "mlflow" / "spool"))
    monkeypatch.setattr(watch, "_tracker", cache(watch._tracker.__wrapped__))
    context = dg.build_sensor_context(instance=instance, resources={"store": empty_store})
    assert "nothing waits" in watch.spool_sensor(context).skip_message
    rows = spool.Spool(empty_store.home / "mlflow" / "spool")
    rows.append("r1", {"step": 1})
    assert "nothing waits" in watch.spool_sensor(context).skip_message  # whoever wrote it may be about to send it
    os.utime(rows.path("r1"), (0, 0))
    assert watch.spool_sensor(context).skip_message == "sending what waits for MLflow: r1"
    assert not sent.is_set()
    waited.set()
    assert sent.wait(60)


@dg.op
def broken() -> None:
    raise dg.Failure("the disk is full", metadata={"error": "ArtifactError"}, allow_retries=False)


@dg.job(name=refresh_index.name)
def failing() -> None:
    broken()


def test_a_failed_refresh_is_recorded_with_its_reason_and_what_stays_live(
    live: Store, instance: dg.DagsterInstance
) -> None:
    tags, tracker = {"dagster/partition": "r1-s0000008"}, MemoryTracker()
    result = failing.execute_in_process(instance=instance, raise_on_error=False, tags=tags)
    context = dg.build_run_status_sensor_context(
        sensor_name="refresh_failure_sensor",
        dagster_instance=instance,
        dagster_run=result.dagster_run,
        dagster_event=result.get_run_failure_event(),
        resources={"store": live, "tracker": tracker},
    ).for_run_failure()
    said = watch.refresh_failure_sensor(context)
    assert said.skip_message == "r1-s0000008: the disk is full; r1-s0000004 stays live"
    (row,) = journal.decisions(live)
    assert (row["decision"], row["reason"], row["error"]) == ("failed", "the disk is full", "ArtifactError")
    assert (row["live"], row["run_id"]) == ("r1-s0000004", result.run_id)
    (record,) = instance.fetch_observations(dg.AssetKey("mips_index"), limit=5).records
    assert record.partition_key == "r1-s0000008"
    assert record.asset_observation.metadata["still_live"].value == "r1-s0000004"
    assert tracker.tags["r1"] == {
        "last_failed_refresh": "r1-s0000008",
        "last_failed_refresh_reason": "the disk is full",
        "last_failed_refresh_run": result.run_id,
    }


@pytest.mark.parametrize("content", ["garbage", '{"schema": 1}', "an index that is gone"])
def test_sensors_say_why_they_do_nothing_when_the_pointer_cannot_be_read(
    live: Store, instance: dg.DagsterInstance, content: str
) -> None:
    worlds.pretend_checkpoint(live, "r1", 8)
    worlds.write_manifest(live.path("corpus", "v0001"), corpus_values())
    if content == "an index that is gone":
        edit(live, index="r1-s0000099")
    else:
        (live.home / "live.json").write_text(content)
    for sensor in (sensors.checkpoint_sensor, growth.growth_sensor):
        said = sensor(dg.build_sensor_context(instance=instance, resources={"store": live}))
        if sensor is growth.growth_sensor or content != "an index that is gone":
            assert isinstance(said, dg.SkipReason)
            assert "nothing is refreshed: " in said.skip_message and str(live.home) in said.skip_message


def corpus_values() -> dict[str, Any]:
    return {"stage": "corpus", "code": "1", "config_digest": "c", "parents": {}, "sources": {}, "files": {}}


def failed_run(name: str, instance: dg.DagsterInstance, tags: dict[str, str]) -> Any:
    """The context of the sensor after a job of this name has failed."""

    @dg.job(name=name)
    def job() -> None:
        broken()

    result = job.execute_in_process(instance=instance, raise_on_error=False, tags=tags)
    return dg.build_run_status_sensor_context(
        sensor_name="training_failure_sensor",
        dagster_instance=instance,
        dagster_run=instance.get_run_by_id(result.run_id),
        dagster_event=result.get_run_failure_event(),
    ).for_run_failure()


@pytest.mark.parametrize(
    ("job", "tags", "about"),
    [
        ("bootstrap", {"realm/retrain": "r2"}, "r2"),
        ("start_training", {}, "start_training"),
        ("train_segment", {"dagster/partition": "r1-s0000008"}, "r1-s0000008"),
    ],
)
def test_somebody_is_told_of_training_that_fails_before_or_in_a_run_of_dagster(
    live: Store, instance: dg.DagsterInstance, job: str, tags: dict[str, str], about: str
) -> None:
    said = watch.training_failure_sensor(failed_run(job, instance, tags), store=live)
    assert said.skip_message == f"{job} for {about} failed: the disk is full"
    (alert,) = journal.alerts(live)
    assert (alert["kind"], alert["about"], alert["error"]) == ("training", about, "ArtifactError")
    (record,) = instance.fetch_observations(dg.AssetKey("realm_checkpoint"), limit=5).records
    assert record.asset_observation.metadata["failed"].value == "the disk is full"


def test_a_failure_that_the_daemon_tries_again_is_no_alert(live: Store, instance: dg.DagsterInstance) -> None:
    tags = {"dagster/will_retry": "true"}
    said = watch.training_failure_sensor(failed_run("train_segment", instance, tags), store=live)
    assert said.skip_message.endswith("is tried again")
    assert journal.alerts(live) == []


def test_a_segment_that_the_sensor_asks_for_again_is_no_alert(live: Store, instance: dg.DagsterInstance) -> None:
    values = live.settings()
    values["config"]["supervise"]["mode"] = "segments"
    (live.home / "home.json").write_text(json.dumps(values))
    tags = {"dagster/partition": "r1-s0000008"}
    said = watch.training_failure_sensor(failed_run("train_segment", instance, tags), store=live)
    assert "segment_sensor asks for it again" in said.skip_message
    assert journal.alerts(live) == []


def test_every_job_that_training_needs_is_watched_for_failures() -> None:
    jobs = {job.name for sensor in watch.ALL if "failure" in sensor.name for job in sensor._monitored_jobs}
    assert jobs == {"refresh_index", "bootstrap", "start_training", "train_segment"}
