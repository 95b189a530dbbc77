"""Trainers that die, sleep, or lose their tracker, as real processes on a home of a hundred steps."""

import gc
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestration import journal, report, supervisor, trainer
from orchestration.report import steps_of
from orchestration.resources.tracking import MlflowTracker
from realm_core.artifacts.publish import read_json_lines
from realm_core.artifacts.store import Store
from realm_core.index.version import IndexVersion
from realm_core.ports import MemorySink
from realm_core.stages import pretrain, promote
from realm_core.train import follower, loop
from tests.orchestration import worlds
from tests.orchestration.test_trainer import PATIENCE, make_live, of_home, wait_for, wait_for_step

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """(a home with a live index and 60 steps to go, the digests an undisturbed run leaves)."""
    settings = ("pretrain.steps=60", "pretrain.checkpoint_every=10", "supervise.heartbeat_seconds=0.2")
    store = worlds.create(tmp_path_factory.mktemp("whole") / "home", (*settings, "supervise.stale_seconds=60"))
    worlds.bootstrap(store)
    make_live(store)
    undisturbed = Store(Path(shutil.copytree(store.home, store.home.parent / "undisturbed")))
    worlds.train(undisturbed, "r1", 60)
    return store.home, digests(undisturbed)


def digests(store: Store) -> dict[str, str]:
    return {key: store.manifest("checkpoints", key).digest for key in store.names("checkpoints")}


@pytest.fixture
def store(whole: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    store = Store(Path(shutil.copytree(whole[0], tmp_path / "home")))
    yield store
    for process in of_home(store.home):
        process.kill()


def test_a_trainer_that_is_killed_is_started_again_by_who_looks_after_it_until_it_is_done(
    store: Store, whole: tuple[Path, dict[str, str]]
) -> None:
    trainer.start(store.home, "r1")
    wait_for_step(store, 3)
    states, beats, killed = [], {}, False
    deadline = time.monotonic() + PATIENCE
    while not states or states[-1] != "finished":
        found = supervisor.tend(store, "r1", beats)
        states += [] if states and states[-1] == found.state else [found.state]
        holder = trainer.state(store.home, "r1")
        if not killed and holder is not None and holder.pid > 0:
            assert holder.token == 2  # after that of the bootstrap
            os.kill(holder.pid, signal.SIGKILL)
            wait_for(lambda: trainer.alive(store.home, "r1") is None, "the lease outlived its process")
            killed = True
        assert time.monotonic() < deadline, states
        time.sleep(0.1)
    assert states[-3:] == ["restarted", "runs", "finished"]
    assert store.training_lease("r1").token() == 3
    assert digests(store) == whole[1]
    assert journal.alerts(store) == []


def test_a_trainer_that_was_replaced_while_it_slept_wakes_up_and_leaves_without_a_trace(
    store: Store, whole: tuple[Path, dict[str, str]]
) -> None:
    trainer.start(store.home, "r1")
    wait_for_step(store, 3)
    (sleeper,) = of_home(store.home)
    sleeper.suspend()  # with whatever lock it holds just now, but for that of a checkpoint half written
    while list((store.home / "checkpoints").glob(".r1-*.partial")):
        sleeper.resume()
        time.sleep(0.05)
        sleeper.suspend()
    token = store.training_lease("r1").token()
    (store.trainer("r1") / "lease.json").unlink()  # as on another machine: its lock does not reach here
    trainer.start(store.home, "r1")
    wait_for(lambda: trainer.outcome(store.home, "r1"), "the successor did not end")
    assert trainer.outcome(store.home, "r1") == {"finished": True, "error": None}
    assert store.training_lease("r1").token() == token + 1
    rows = len(read_json_lines(store.trainer("r1") / pretrain.STEPS))
    sleeper.resume()
    psutil.wait_procs([sleeper], timeout=PATIENCE)
    assert (
        f"token {token} and token {token + 1} was given to another" in (store.trainer("r1") / trainer.LOG).read_text()
    )
    assert len(read_json_lines(store.trainer("r1") / pretrain.STEPS)) <= rows + 1  # the step it slept in
    assert trainer.outcome(store.home, "r1") == {"finished": True, "error": None}
    assert digests(store) == whole[1]


@pytest.mark.parametrize("manner", ["nobody listens", "it never answers"])
def test_a_tracker_that_is_down_stops_nothing_and_gets_every_row_later(
    store: Store, whole: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch, manner: str
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if manner == "it never answers":
            server.listen(128)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        trainer.start(store.home, "r1")
        wait_for(lambda: trainer.outcome(store.home, "r1"), "the trainer did not end")
    assert trainer.outcome(store.home, "r1") == {"finished": True, "error": None}
    # Ids of tracker runs are in the record of a manifest, not in its digest: the very same run.
    assert digests(store) == whole[1]
    logged = [row["time"] for row in spooled(store) if "metrics" in row]
    pauses = [(after - before) / 1000 for before, after in pairwise(logged)]
    assert max(pauses) < 10, "a step waited for MLflow, which is asked for 20 seconds"
    assert [row["step"] for row in spooled(store) if "metrics" in row] == list(range(1, 61))
    back = MlflowTracker(f"sqlite:///{store.home / 'mlflow' / 'back.db'}", store.home / "mlflow" / "spool")
    wait_for(lambda: (back.flush(), not spooled(store))[1], "rows stay in the spool")
    run = back._connect().get_run(back.run_id("r1"))
    assert run.info.status == "FINISHED"
    assert run.data.metrics["stalled_share"] == pytest.approx(report.training(store, "r1")["stalled_share"], abs=1e-4)
    history = back._connect().get_metric_history(run.info.run_id, "loss")
    assert sorted(row.step for row in history) == list(range(1, 61))


def spooled(store: Store) -> list[dict[str, Any]]:
    return read_json_lines(store.home / "mlflow" / "spool" / "r1.jsonl")


def test_a_pointer_that_moves_in_the_middle_of_a_step_waits_for_its_border_and_at_most_two_versions_are_held(
    home: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = "r1-s0000004"
    monkeypatch.setattr(follower._Loading, "done", lambda self: (self._thread.join(), True)[1])
    step, held = loop.RealmTrainer.step, []

    def moved_meanwhile(self: Any, number: int, version: IndexVersion) -> dict[str, float]:
        if number == 6:
            promote.run(home.config(), store=home, name=later)
        held.append((number, version.name, sum(isinstance(thing, IndexVersion) for thing in gc.get_objects())))
        return step(self, number, version)

    monkeypatch.setattr(loop.RealmTrainer, "step", moved_meanwhile)
    sink = MemorySink()
    gc.collect()
    made = {"corpus": home.newest("corpus"), "start": home.newest("ict")}
    pretrain.run(home.config(), store=home, training_run="r1", sink=sink, **made)
    served = {number: name for number, name, _ in held}
    assert {number: served[number] for number in (6, 7)} == {6: "r1-s0000000", 7: later}
    assert max(count for _, _, count in held) <= 2
    ages = {row["step"]: row["index_age"] for row in steps_of(home, "r1")}
    assert (ages[7], ages[8]) == (6, 3)  # row 7 is step 6, still with the index of step 0
    swaps = read_json_lines(home.trainer("r1") / follower.SWAPS)
    assert [(swap["step"], swap["index"]) for swap in swaps] == [(0, "r1-s0000000"), (7, later)]


def test_an_index_that_is_torn_after_its_promotion_is_refused_and_the_old_one_serves_on(
    home: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    later = "r1-s0000004"
    promote.run(home.config(), store=home, name=later)
    torn = next(path for path in home.path("indexes", later).iterdir() if path.name != "manifest.json")
    torn.write_bytes(torn.read_bytes()[:-8] + bytes(8))
    made = {"corpus": home.newest("corpus"), "start": home.newest("ict")}
    pretrain.run(home.config(), store=home, training_run="r1", sink=MemorySink(), **made)
    assert "index r1-s0000004 refused, the old one stays" in capsys.readouterr().err
    assert (
        home.manifest("checkpoints", "r1-s0000012").parents["live_index"]
        == home.manifest("indexes", "r1-s0000000").digest
    )
