"""The sensor that closes the loop, called directly; the daemon's part is played by the test."""

import itertools
import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import dagster as dg
import pytest
from dagster import AssetKey, DagsterRunStatus

from assets.reporting import DATA_VERSION_TAG
from orchestration.defs import sensors
from realm_core.artifacts.manifest import Plan
from realm_core.artifacts.publish import building
from realm_core.artifacts.store import PRUNED, Store
from realm_core.config import RefreshConfig
from tests.orchestration import worlds


@dataclass
class Daemon:
    """Calls the sensor as Dagster's daemon does and applies what it returns."""

    store: Store
    instance: dg.DagsterInstance
    cursor: str | None = None

    def tick(self, apply: bool = True) -> dg.SensorResult | dg.SkipReason:
        context = dg.build_sensor_context(instance=self.instance, cursor=self.cursor, resources={"store": self.store})
        result = sensors.checkpoint_sensor(context)
        if isinstance(result, dg.SkipReason) or not apply:
            return result
        for request in result.dynamic_partitions_requests:
            self.instance.add_dynamic_partitions("realm_ckpt", request.partition_keys)
        for event in result.asset_events:
            self.instance.report_runless_asset_event(event)
        asked = {run.tags["dagster/run_key"] for run in self.instance.get_runs()}
        for request in result.run_requests:
            if request.run_key not in asked:
                self.run(request.partition_key, DagsterRunStatus.STARTED, request.run_key)
        self.cursor = result.cursor
        return result

    def run(self, key: str, status: DagsterRunStatus, run_key: str = "") -> None:
        tags = {"dagster/partition": key, "dagster/run_key": run_key}
        run = dg.DagsterRun(job_name="refresh_index", run_id=str(uuid.uuid4()), status=status, tags=tags)
        self.instance.add_run(run)

    def finish(self) -> None:
        """Every refresh under way succeeds, and its checkpoint gets a verdict."""
        for run in self.instance.get_runs(dg.RunsFilter(statuses=[DagsterRunStatus.STARTED])):
            settle(self.store, run.tags["dagster/partition"])
            self.instance.delete_run(run.run_id)
            self.run(run.tags["dagster/partition"], DagsterRunStatus.SUCCESS, run.tags["dagster/run_key"])

    def reported(self) -> list[str]:
        records = self.instance.fetch_materializations(AssetKey("realm_checkpoint"), limit=1000).records
        return sorted(str(record.partition_key) for record in records)


@pytest.fixture
def daemon(empty_store: Store) -> Iterator[Daemon]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Daemon(empty_store, instance)


def settle(store: Store, key: str) -> None:
    with building(store.path("verdicts", key), Plan(stage="qualify", code="1", config_digest="0" * 64)) as build:
        build.commit({"passed": True})


def requested(result: dg.SensorResult | dg.SkipReason) -> list[str]:
    return [] if isinstance(result, dg.SkipReason) else [str(request.partition_key) for request in result.run_requests]


def set_backlog(store: Store, backlog: str) -> None:
    values = store.settings()
    values["config"]["refresh"]["backlog"] = backlog
    (store.home / "home.json").write_text(json.dumps(values))


def test_an_empty_store_is_a_reason_for_silence(daemon: Daemon) -> None:
    result = daemon.tick()
    assert isinstance(result, dg.SkipReason)
    assert "no checkpoint" in result.skip_message


def test_a_new_checkpoint_is_registered_reported_and_refreshed(daemon: Daemon) -> None:
    key = worlds.pretend_checkpoint(daemon.store, "r1", 4)
    manifest = daemon.store.manifest("checkpoints", key)
    result = daemon.tick()
    assert isinstance(result, dg.SensorResult)
    assert [list(request.partition_keys) for request in result.dynamic_partitions_requests] == [[key]]
    (event,) = result.asset_events
    assert (event.asset_key, event.partition) == (AssetKey("realm_checkpoint"), key)
    assert event.tags[DATA_VERSION_TAG] == manifest.digest
    assert event.tags["dagster/code_version"] == manifest.code
    assert event.metadata["digest"].value == manifest.digest
    assert event.metadata["step"].value == 4
    assert event.metadata["metrics/loss"].value == 7.0
    (request,) = result.run_requests
    assert request.run_key == f"refresh:{key}:{manifest.digest}"
    assert request.partition_key == request.tags["realm/checkpoint"] == key


def test_the_second_look_is_silent_and_says_why(daemon: Daemon) -> None:
    key = worlds.pretend_checkpoint(daemon.store, "r1", 4)
    daemon.tick()
    for _ in range(2):  # while the refresh is queued, and once it has ended
        result = daemon.tick()
        assert isinstance(result, dg.SkipReason)
        assert key in result.skip_message
        daemon.finish()
    assert daemon.reported() == [key]


def test_only_the_newest_of_several_new_checkpoints_is_refreshed(daemon: Daemon) -> None:
    keys = [worlds.pretend_checkpoint(daemon.store, "r1", step) for step in (0, 4, 8)]
    assert requested(daemon.tick()) == keys[-1:]
    assert daemon.reported() == keys
    assert list(daemon.instance.get_dynamic_partitions("realm_ckpt")) == keys


def test_a_lost_cursor_asks_with_the_same_run_keys(daemon: Daemon) -> None:
    for step in (0, 4):
        worlds.pretend_checkpoint(daemon.store, "r1", step)
    first = daemon.tick(apply=False)
    second = daemon.tick()
    daemon.cursor = None
    for run in daemon.instance.get_runs():  # it failed: no verdict, and nothing under way
        daemon.instance.delete_run(run.run_id)
    third = daemon.tick()
    keys = [[request.run_key for request in result.run_requests] for result in (first, second, third)]
    assert keys[0] == keys[1] == keys[2]
    assert daemon.reported() == ["r1-s0000000", "r1-s0000004"]


def test_a_clock_that_goes_back_asks_for_nothing_twice_and_overlooks_nothing(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = worlds.pretend_checkpoint(daemon.store, "r1", 0)
    assert requested(daemon.tick()) == [first]
    daemon.finish()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 7 * 86400)
    for cursor in (daemon.cursor, None):  # a replayed tick, and one by a daemon that lost its cursor
        daemon.cursor = cursor
        assert isinstance(daemon.tick(), dg.SkipReason)
    later = worlds.pretend_checkpoint(daemon.store, "r1", 4)
    assert requested(daemon.tick()) == [later]
    assert requested(daemon.tick()) == []
    monkeypatch.setattr(time, "time", now)
    assert requested(daemon.tick()) == []
    daemon.finish()
    assert isinstance(daemon.tick(), dg.SkipReason)
    keys = [run.tags["dagster/run_key"].split(":")[1] for run in daemon.instance.get_runs()]
    assert sorted(keys) == daemon.reported() == [first, later]


def test_while_a_refresh_is_under_way_the_run_waits_and_then_asks_for_what_is_newest_by_then(daemon: Daemon) -> None:
    worlds.pretend_checkpoint(daemon.store, "r1", 0)
    assert requested(daemon.tick()) == ["r1-s0000000"]
    for step in (4, 8):
        worlds.pretend_checkpoint(daemon.store, "r1", step)
        result = daemon.tick()
        assert requested(result) == []
        assert daemon.reported()[-1] == f"r1-s{step:07d}"  # reported all the same
    daemon.finish()
    assert requested(daemon.tick()) == ["r1-s0000008"]


def test_a_refresh_that_died_does_not_silence_the_sensor(daemon: Daemon) -> None:
    worlds.pretend_checkpoint(daemon.store, "r1", 0)
    daemon.tick()
    for run in daemon.instance.get_runs():
        daemon.instance.report_run_failed(run)
    worlds.pretend_checkpoint(daemon.store, "r1", 4)
    assert requested(daemon.tick()) == ["r1-s0000004"]


def test_training_runs_do_not_hide_each_other(daemon: Daemon) -> None:
    worlds.pretend_checkpoint(daemon.store, "r2", 100)
    worlds.pretend_checkpoint(daemon.store, "r1", 4)
    assert sorted(requested(daemon.tick())) == ["r1-s0000004", "r2-s0000100"]
    daemon.finish()
    worlds.pretend_checkpoint(daemon.store, "r1", 8)  # sorts before the newest of r2
    assert requested(daemon.tick()) == ["r1-s0000008"]
    daemon.finish()
    assert isinstance(daemon.tick(), dg.SkipReason)


def test_a_backlog_of_all_refreshes_every_checkpoint_once(daemon: Daemon) -> None:
    set_backlog(daemon.store, "all")
    keys = [worlds.pretend_checkpoint(daemon.store, "r1", step) for step in (0, 4, 8)]
    assert requested(daemon.tick()) == keys
    late = worlds.pretend_checkpoint(daemon.store, "r1", 12)
    assert requested(daemon.tick()) == [late]
    assert isinstance(daemon.tick(), dg.SkipReason)


def test_a_checkpoint_whose_weights_are_dropped_is_reported_and_not_refreshed(daemon: Daemon) -> None:
    set_backlog(daemon.store, "all")
    keys = [worlds.pretend_checkpoint(daemon.store, "r1", step) for step in (0, 4)]
    (daemon.store.path("checkpoints", keys[0]) / PRUNED).write_text("{}")
    assert requested(daemon.tick()) == keys[1:]
    assert daemon.reported() == keys


def test_half_written_and_foreign_folders_are_passed_over(daemon: Daemon) -> None:
    key = worlds.pretend_checkpoint(daemon.store, "r1", 4)
    folder = daemon.store.home / "checkpoints"
    (folder / ".r1-s0000008.partial").mkdir()
    (folder / ".r1-s0000008.partial" / "manifest.json").write_text("{}")
    (folder / "r1-s0000012").mkdir()  # no manifest: its writer never committed it
    copied = folder / "r1-s0000004.backup"
    copied.mkdir()
    (copied / "manifest.json").write_text((folder / key / "manifest.json").read_text())
    assert requested(daemon.tick()) == [key]
    assert daemon.reported() == [key]
    assert isinstance(daemon.tick(), dg.SkipReason)


def test_a_damaged_manifest_does_not_stop_the_others(daemon: Daemon) -> None:
    keys = [worlds.pretend_checkpoint(daemon.store, "r1", step) for step in (0, 4, 8)]
    (daemon.store.path("checkpoints", keys[1]) / "manifest.json").write_text('{"torn')
    (daemon.store.path("checkpoints", keys[2]) / "manifest.json").write_text('{"torn')
    assert requested(daemon.tick()) == []  # the newest cannot be refreshed; an older one would be a step back
    assert daemon.reported() == [keys[0]]
    newest = worlds.pretend_checkpoint(daemon.store, "r1", 12)
    assert requested(daemon.tick()) == [newest]


@pytest.mark.slow
def test_a_first_import_is_spread_over_ticks(daemon: Daemon) -> None:
    keys = [worlds.pretend_checkpoint(daemon.store, "r1", step) for step in range(0, 480, 4)]
    asked = []
    for expected in (50, 100, 120):
        asked += requested(daemon.tick())
        assert len(daemon.reported()) == expected
    assert daemon.reported() == keys
    assert asked == keys[-1:]
    assert isinstance(daemon.tick(), dg.SkipReason)


@pytest.mark.slow
def test_a_tick_over_400_checkpoints_takes_less_than_a_fifth_of_a_second(daemon: Daemon) -> None:
    first = worlds.pretend_checkpoint(daemon.store, "r1", 0)
    template = daemon.store.path("checkpoints", first)
    values = json.loads((template / "manifest.json").read_text())
    for step in range(4, 1600, 4):
        values["facts"]["step"] = step
        values.pop("digest", None)
        worlds.write_manifest(daemon.store.path("checkpoints", f"r1-s{step:07d}"), values)
    for _ in itertools.repeat(None, 8):  # 8 x 50 events
        daemon.tick()
    assert len(daemon.reported()) == 400
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        assert isinstance(daemon.tick(), dg.SkipReason)
        seconds.append(time.perf_counter() - began)
    print(f"tick over 400 checkpoints: {min(seconds):.3f} s to {max(seconds):.3f} s")
    assert min(seconds) < 0.2


def test_the_interval_between_ticks_is_the_homes(empty_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALM_HOME", str(empty_store.home))
    assert sensors.seconds_between_ticks() == empty_store.config().refresh.sensor_seconds
    monkeypatch.setenv("REALM_HOME", str(empty_store.home / "nowhere"))
    assert sensors.seconds_between_ticks() == RefreshConfig().sensor_seconds
    monkeypatch.delenv("REALM_HOME")
    assert sensors.seconds_between_ticks() == RefreshConfig().sensor_seconds
