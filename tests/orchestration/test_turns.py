"""What the checkpoint sensor does about failures, policies and checkpoints that come faster than they are refreshed."""

import json
import uuid
from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest
from dagster import DagsterRunStatus

from orchestration import journal, refreshes, turn
from realm_core.artifacts.manifest import Plan
from realm_core.artifacts.publish import append_durably, building
from realm_core.artifacts.store import Store, checkpoint_key
from realm_core.stages import CODE
from tests.orchestration import worlds
from tests.orchestration.test_sensors import Daemon, requested, settle

FAILURE, SUCCESS, CANCELED = DagsterRunStatus.FAILURE, DagsterRunStatus.SUCCESS, DagsterRunStatus.CANCELED


@pytest.fixture
def daemon(empty_store: Store) -> Iterator[Daemon]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Daemon(empty_store, instance)


def operate(store: Store, **settings: Any) -> None:
    """Change when this home refreshes."""
    values = store.settings()
    values["config"]["refresh"].update(settings)
    (store.home / "home.json").write_text(json.dumps(values))


def checkpoint(daemon: Daemon, step: int, run: str = "r1") -> str:
    return worlds.pretend_checkpoint(daemon.store, run, step)


def end_all(daemon: Daemon, status: DagsterRunStatus, error: str | None = None) -> None:
    worlds.end_runs(daemon.instance, status, error)


def make_live(store: Store, key: str, digest: str = "d" * 64) -> None:
    store.move_live(key, digest, "c" * 64, "a test", None)


def decisions(store: Store) -> list[tuple[str, str]]:
    return [(row["checkpoint"][-2:], row["decision"]) for row in journal.decisions(store)]


def reason(result: dg.SensorResult | dg.SkipReason) -> str:
    assert isinstance(result, dg.SkipReason)
    return str(result.skip_message)


# --- retention ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_waits_for_its_refresh_outlives_those_that_come_meanwhile(daemon: Daemon) -> None:
    store, waiting = daemon.store, checkpoint(daemon, 4)
    assert requested(daemon.tick()) == [waiting]
    later = [checkpoint(daemon, step) for step in (8, 12, 16)]
    assert store.prune_checkpoints("r1", keep=1, spare=set()) == later[:2]
    daemon.tick()  # its run waits in the queue
    assert store.prune_checkpoints("r1", keep=1, spare=set()) == []
    end_all(daemon, FAILURE)
    assert requested(daemon.tick()) == [later[-1]]
    assert store.refreshing() == [later[-1]]
    assert store.prune_checkpoints("r1", keep=1, spare=set()) == [waiting]


# --- failures ----------------------------------------------------------------------------------------------------------


def test_a_refresh_that_fails_is_tried_a_bounded_number_of_times_and_then_reported_once(daemon: Daemon) -> None:
    key, keys = checkpoint(daemon, 4), []
    for _ in range(3):
        result = daemon.tick()
        assert requested(result) == [key]
        keys += [request.run_key for request in result.run_requests]
        assert key in reason(daemon.tick())  # no second one while it runs
        end_all(daemon, FAILURE)
    digest = daemon.store.manifest("checkpoints", key).digest
    assert keys == [f"refresh:{key}:{digest}" + suffix for suffix in ("", ":try2", ":try3")]
    daemon.tick()
    assert "given up" in reason(daemon.tick())
    (alert,) = journal.alerts(daemon.store)
    assert alert["message"].startswith(f"{key} does not go live, given up: run ")
    assert alert["message"].endswith("nothing stays live")
    assert decisions(daemon.store) == [("04", "refresh")] * 3 + [("04", "given up")]
    assert requested(daemon.tick()) == [] and requested_after_next(daemon) == ["r1-s0000008"]


def requested_after_next(daemon: Daemon) -> list[str]:
    checkpoint(daemon, 8)
    return requested(daemon.tick())


@pytest.mark.parametrize(
    ("error", "again"), [("GateError", False), ("ConfigError", False), ("DataError", False), ("ArtifactError", True)]
)
def test_a_refusal_is_for_good_and_a_failure_is_not(daemon: Daemon, error: str, again: bool) -> None:
    key = checkpoint(daemon, 4)
    daemon.tick()
    end_all(daemon, FAILURE, error)
    assert requested(daemon.tick()) == ([key] if again else [])
    assert len(journal.alerts(daemon.store)) == (0 if again else 1)


def test_a_verdict_that_refuses_is_not_asked_for_again(daemon: Daemon) -> None:
    key = checkpoint(daemon, 4)
    daemon.tick()
    with building(daemon.store.path("verdicts", key), Plan(stage="qualify", code="1", config_digest="0" * 64)) as build:
        build.commit({"passed": False, "findings": {"checksum": {"passed": False, "found": "a flipped byte"}}})
    end_all(daemon, FAILURE)
    daemon.tick()
    assert "refused (its verdict: checksum a flipped byte)" in reason(daemon.tick())
    assert [row["kind"] for row in journal.alerts(daemon.store)] == ["refresh"]


def test_a_refresh_that_died_after_its_verdict_is_tried_again(daemon: Daemon) -> None:
    key = checkpoint(daemon, 4)
    daemon.tick()
    settle(daemon.store, key)
    end_all(daemon, FAILURE)
    assert requested(daemon.tick()) == [key]


def test_the_daemons_own_second_try_is_waited_for_and_counts_as_the_first(daemon: Daemon) -> None:
    key = checkpoint(daemon, 4)
    daemon.tick()
    end_all(daemon, FAILURE)
    (first,) = daemon.instance.get_runs()
    daemon.instance.add_run_tags(first.run_id, {"dagster/will_retry": "true"})
    assert "is being refreshed" in reason(daemon.tick())
    daemon.instance.add_run_tags(first.run_id, {"dagster/auto_retry_run_id": "second"})
    second = dg.DagsterRun(
        job_name="refresh_index",
        run_id=str(uuid.uuid4()),
        status=FAILURE,
        tags={**first.tags, "dagster/parent_run_id": first.run_id, "dagster/retry_number": "1"},
    )
    daemon.instance.add_run(second)
    (request,) = daemon.tick().run_requests  # type: ignore[union-attr]
    assert request.partition_key == key and request.run_key.endswith(":try2")


def test_what_a_person_cancelled_is_left_alone(daemon: Daemon) -> None:
    checkpoint(daemon, 4)
    daemon.tick()
    end_all(daemon, CANCELED)
    assert "cancelled" in reason(daemon.tick())


def test_of_a_backlog_only_failures_that_can_still_go_live_are_tried_again(daemon: Daemon) -> None:
    operate(daemon.store, backlog="all")
    keys = [checkpoint(daemon, step) for step in (4, 8, 12)]
    assert requested(daemon.tick()) == keys
    end_all(daemon, FAILURE)
    make_live(daemon.store, keys[1])
    assert requested(daemon.tick()) == keys[2:]


# --- checkpoints faster than refreshes ----------------------------------------------------------------------------------


def test_intermediate_checkpoints_are_passed_over_in_writing(daemon: Daemon) -> None:
    for step in (0, 4, 8, 12):
        checkpoint(daemon, step)
        daemon.tick()
    daemon.finish()
    assert requested(daemon.tick()) == ["r1-s0000012"]
    assert decisions(daemon.store) == [
        ("00", "refresh"),
        ("12", "refresh"),
        ("04", "passed over"),
        ("08", "passed over"),
    ]
    assert journal.decisions(daemon.store)[-1]["reason"] == "r1-s0000012 is newer"


@pytest.mark.parametrize(
    ("live", "running", "newest", "share", "pays"),
    [
        (0, 4, 8, 0.25, True),  # p < (8-4)/(8-0) = 0.5
        (0, 4, 8, 0.5, False),
        (0, 4, 12, 0.5, True),
        (0, 16, 20, 0.25, False),  # put off often already: 4/20
        (0, 16, 20, 0.0, True),
    ],
)
def test_a_newer_checkpoint_supersedes_a_refresh_when_the_index_gets_younger_by_it(
    daemon: Daemon, live: int, running: int, newest: int, share: float, pays: bool
) -> None:
    store = daemon.store
    running_key, newest_key = checkpoint_key("r1", running), checkpoint_key("r1", newest)
    assert not refreshes.pays_to_supersede(
        store, running_key, newest_key
    )  # nothing is live: the first one is waited for
    make_live(store, checkpoint_key("r1", live))
    with building(
        store.path("corpus", "v0001"), Plan(stage="corpus", code=CODE["corpus"], config_digest="0" * 64)
    ) as build:
        build.commit({"shards": {str(number): {} for number in range(4)}})
    scratch = store.home / "snapshots" / f".{running_key}.partial"
    scratch.mkdir(parents=True)
    (scratch / ".done.json").write_text(json.dumps({"shards": {str(i): "" for i in range(int(4 * share))}}))
    assert refreshes.pays_to_supersede(store, running_key, newest_key) == pays
    assert not refreshes.pays_to_supersede(store, running_key, checkpoint_key("r2", newest)) or pays


def test_superseding_cancels_the_run_drops_what_it_embedded_and_asks_for_the_newest(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    operate(daemon.store, supersede=True)
    make_live(daemon.store, "r1-s0000000")
    checkpoint(daemon, 4)
    daemon.tick()
    scratch = daemon.store.home / "snapshots" / ".r1-s0000004.partial"
    scratch.mkdir(parents=True)
    checkpoint(daemon, 8)
    cancelled: list[str] = []
    monkeypatch.setattr(daemon.instance.run_coordinator, "cancel_run", lambda run_id: cancelled.append(run_id) or True)
    daemon.tick()
    assert "r1-s0000004 was cancelled for r1-s0000008" in reason(daemon.tick())
    assert cancelled == [run.run_id for run in daemon.instance.get_runs() for _ in range(2)]
    end_all(daemon, CANCELED)
    assert requested(daemon.tick()) == ["r1-s0000008"]
    assert not scratch.exists()
    assert ("04", "superseded") in decisions(daemon.store)


# --- policies ------------------------------------------------------------------------------------------------------------


def test_every_so_many_steps(daemon: Daemon) -> None:
    operate(daemon.store, policy="every_steps", every_steps=6)
    asked = []
    for step in (0, 4, 8, 10, 12):  # 12 is the last of a tiny run
        checkpoint(daemon, step)
        asked += requested(daemon.tick())
        daemon.finish()
    assert asked == ["r1-s0000000", "r1-s0000008", "r1-s0000012"]
    passed = [row for row in journal.decisions(daemon.store) if row["decision"] == "passed over"]
    assert [row["checkpoint"] for row in passed] == ["r1-s0000004", "r1-s0000010"]
    assert passed[0]["reason"] == "4 steps after the last one, refresh.every_steps=6"
    assert passed[0]["policy"] == "every_steps"


def test_every_so_many_steps_of_a_backlog(daemon: Daemon) -> None:
    operate(daemon.store, policy="every_steps", every_steps=6, backlog="all")
    for step in (0, 4, 8, 10):
        checkpoint(daemon, step)
    assert requested(daemon.tick()) == ["r1-s0000000", "r1-s0000008"]
    assert requested(daemon.tick()) == []


@pytest.fixture
def drifting(daemon: Daemon) -> Daemon:
    """A home that refreshes by drift, with step 0 live."""
    operate(daemon.store, policy="drift", drift_threshold=0.1)
    checkpoint(daemon, 0)
    assert requested(daemon.tick()) == ["r1-s0000000"]  # without an estimate
    daemon.finish()
    make_live(daemon.store, "r1-s0000000")
    return daemon


def asked_for(result: dg.SensorResult | dg.SkipReason) -> list[tuple[str | None, str | None]]:
    return [] if isinstance(result, dg.SkipReason) else [(r.job_name, r.partition_key) for r in result.run_requests]


def estimated(store: Store, step: int, overlap: float, live: str = "d" * 64) -> None:
    row = {"checkpoint": checkpoint_key("r1", step), "step": step, "live_digest": live, "top_k_overlap": overlap}
    store.trainer("r1").mkdir(parents=True, exist_ok=True)
    append_durably(store.trainer("r1") / turn.ESTIMATES, row)


def test_by_drift_an_estimate_comes_first_and_then_decides(drifting: Daemon) -> None:
    store = drifting.store
    checkpoint(drifting, 4)
    (request,) = drifting.tick(apply=False).run_requests  # type: ignore[union-attr]
    assert (request.job_name, request.partition_key) == ("estimate_refresh", "r1-s0000004")
    assert request.tags["realm/checkpoint"] == "r1-s0000004"
    estimated(store, 4, overlap=0.95)
    result = drifting.tick()
    assert asked_for(result) == []
    assert "passed over: 0.050 of the top k changed by step 4, threshold 0.1" in reason(drifting.tick())
    checkpoint(drifting, 8)
    assert asked_for(drifting.tick(apply=False)) == [("estimate_refresh", "r1-s0000008")]
    estimated(store, 8, overlap=0.7)
    assert asked_for(drifting.tick()) == [("refresh_index", "r1-s0000008")]
    last = journal.decisions(store)[-1]
    assert (last["decision"], last["estimate"]["top_k_overlap"]) == ("refresh", 0.7)
    assert [row["decision"] for row in journal.decisions(store)] == ["refresh", "passed over", "refresh"]


def test_by_drift_checkpoints_faster_than_estimates_are_refreshed_all_the_same(drifting: Daemon) -> None:
    checkpoint(drifting, 4)
    drifting.tick(apply=False)
    checkpoint(drifting, 8)
    estimated(drifting.store, 4, overlap=0.5)
    assert asked_for(drifting.tick()) == [("refresh_index", "r1-s0000008")]


def test_by_drift_the_last_checkpoint_needs_no_estimate_and_an_old_one_counts_for_nothing(drifting: Daemon) -> None:
    estimated(drifting.store, 4, overlap=0.1, live="e" * 64)
    checkpoint(drifting, 4)
    assert asked_for(drifting.tick(apply=False)) == [("estimate_refresh", "r1-s0000004")]
    checkpoint(drifting, 12)
    assert asked_for(drifting.tick(apply=False)) == [("refresh_index", "r1-s0000012")]


def test_by_drift_an_estimate_that_fails_does_not_keep_the_index_old(drifting: Daemon) -> None:
    key = checkpoint(drifting, 4)
    (request,) = drifting.tick(apply=False).run_requests  # type: ignore[union-attr]
    tags = {**request.tags, "dagster/run_key": request.run_key}
    run = dg.DagsterRun("estimate_refresh", str(uuid.uuid4()), tags=tags, status=DagsterRunStatus.STARTED)
    drifting.instance.add_run(run)
    drifting.tick()
    assert "is being estimated" in reason(drifting.tick())
    end_all(drifting, FAILURE)
    assert asked_for(drifting.tick()) == [("refresh_index", key)]
    assert "could not be estimated" in journal.decisions(drifting.store)[-1]["reason"]


# --- checkpoints that are set aside ------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_set_aside_does_not_hide_the_good_one_before_it(daemon: Daemon) -> None:
    keys = [checkpoint(daemon, step) for step in (4, 8, 12)]
    for key in keys[1:]:
        daemon.store.quarantine(key, "collapsed")
    assert requested(daemon.tick()) == keys[:1]
    daemon.finish()
    assert "r1-s0000012: it is set aside; r1-s0000004: done" in reason(daemon.tick())


@pytest.mark.parametrize("live", [4, 8])
def test_a_good_checkpoint_that_could_not_go_live_any_more_is_not_refreshed(daemon: Daemon, live: int) -> None:
    keys = [checkpoint(daemon, step) for step in (0, 4, 8)]
    make_live(daemon.store, checkpoint_key("r1", live))
    daemon.store.quarantine(keys[-1], "collapsed")
    assert requested(daemon.tick()) == []
    assert "it is set aside" in reason(daemon.tick())


def test_a_run_of_which_everything_is_set_aside_says_so(daemon: Daemon) -> None:
    daemon.store.quarantine(checkpoint(daemon, 0), "collapsed")
    assert requested(daemon.tick()) == []
    assert "it is set aside" in reason(daemon.tick())
