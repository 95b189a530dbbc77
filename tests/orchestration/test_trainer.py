"""The detached trainer: a real process on a small home."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from orchestration import supervisor, trainer
from orchestration.report import steps_of
from realm_core.artifacts.publish import read_json_lines, write_durably
from realm_core.artifacts.store import Store
from realm_core.errors import BusyError, RealmError
from realm_core.ports import NullSink
from realm_core.stages import index, promote, qualify, reembed
from tests.orchestration import worlds

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(900)]
PATIENCE = 240.0  # seconds; a process that imports torch takes ten times longer on a busy machine


def make_live(store: Store, key: str = "r1-s0000000") -> None:
    """Embed, build, qualify and promote, as a refresh does."""
    config = store.config()
    made = {kind: store.path(kind, key) for kind in ("checkpoints", "snapshots", "indexes", "verdicts")}
    base = {"checkpoint": made["checkpoints"], "corpus": store.newest("corpus")}
    reembed.run(config, **base, out=made["snapshots"], sink=NullSink())
    index.run(config, **base, snapshot=made["snapshots"], out=made["indexes"], sink=NullSink())
    qualify.run(config, **base, snapshot=made["snapshots"], index=made["indexes"], out=made["verdicts"])
    promote.run(config, store=store, name=key)


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def wait_for_step(store: Store, step: int) -> None:
    wait_for(lambda: [row for row in steps_of(store, "r1") if row["step"] >= step], f"step {step} was not reached")


def of_home(home: Path) -> list[psutil.Process]:
    """Trainer processes of a home, whoever started them."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if "orchestration.trainer" in words and str(home) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bootstrapped home whose training is too long to end during a test."""
    return prepared(tmp_path_factory, steps=1_000_000, every=4)


@pytest.fixture(scope="module")
def of_100_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bootstrapped home with a live index and a training of 100 steps, a checkpoint every 10."""
    home = prepared(tmp_path_factory, steps=100, every=10)
    make_live(Store(home))
    return home


def prepared(tmp_path_factory: pytest.TempPathFactory, steps: int, every: int) -> Path:
    settings = (f"pretrain.steps={steps}", f"pretrain.checkpoint_every={every}")
    store = worlds.create(tmp_path_factory.mktemp("trainer") / "home", settings)
    worlds.bootstrap(store)
    return store.home


@pytest.fixture(autouse=True)
def no_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making MLflow's database takes longer than these tests; training goes on without it, as it must."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")


@pytest.fixture
def waiting(endless: Path, tmp_path: Path) -> Iterator[Store]:
    """A home without a live index: its trainer starts and then waits for one. Nothing is left of it afterwards."""
    yield from lent(endless, tmp_path)


@pytest.fixture
def training(waiting: Store) -> Store:
    """A home whose trainer has an index to train with."""
    make_live(waiting)
    return waiting


@pytest.fixture
def short(of_100_steps: Path, tmp_path: Path) -> Iterator[Store]:
    """A home with 100 steps to go."""
    yield from lent(of_100_steps, tmp_path)


def lent(template: Path, folder: Path) -> Iterator[Store]:
    store = Store(shutil.copytree(template, folder / "home"))
    yield store
    for process in of_home(store.home):
        process.kill()


def test_a_second_start_is_a_no_op_and_the_stop_file_ends_the_first(waiting: Store) -> None:
    home = waiting.home
    assert trainer.alive(home, "r1") is None
    assert "started" in trainer.start(home, "r1")
    process = trainer.alive(home, "r1")
    assert process is not None
    assert "already runs" in trainer.start(home, "r1")
    with pytest.raises(BusyError):
        waiting.training_lease("r1").take("another trainer", patience=0)
    assert [found.pid for found in of_home(home)] == [process]
    assert os.getsid(process) == process  # a session of its own: a terminal's Ctrl-C does not reach it

    trainer.stop(home, "r1", timeout=PATIENCE)
    assert trainer.alive(home, "r1") is None
    assert trainer.outcome(home, "r1") == {"finished": False, "error": None}
    assert of_home(home) == []


def test_two_starts_at_once_leave_one_trainer(waiting: Store) -> None:
    command = [sys.executable, "-m", "orchestration.cli", "train", "start", "--home", str(waiting.home)]
    starts = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [start.communicate(timeout=PATIENCE)[0] for start in starts]
    assert [start.returncode for start in starts] == [0, 0], said
    assert len(of_home(waiting.home)) == 1
    assert trainer.alive(waiting.home, "r1") == of_home(waiting.home)[0].pid


def test_the_stop_file_ends_training_at_a_step_border(training: Store) -> None:
    trainer.start(training.home, "r1")
    wait_for_step(training, 6)
    trainer.stop(training.home, "r1", timeout=PATIENCE)
    rows = steps_of(training, "r1")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    newest = training.manifest("checkpoints", training.checkpoints("r1")[-1])
    assert newest.facts["step"] == len(rows) // 4 * 4
    assert trainer.outcome(training.home, "r1") == {"finished": False, "error": None}


def test_a_trainer_hands_over_to_segments_at_a_checkpoint_when_the_mode_changes(training: Store) -> None:
    trainer.start(training.home, "r1")
    wait_for_step(training, 2)
    values = training.settings()
    values["config"]["supervise"]["mode"] = "segments"
    write_durably(training.home / "home.json", json.dumps(values))
    wait_for(lambda: trainer.alive(training.home, "r1") is None, "the trainer goes on")
    assert trainer.outcome(training.home, "r1") is None
    assert supervisor.look(training, "r1").state == "waits"
    newest = training.manifest("checkpoints", training.checkpoints("r1")[-1])
    assert newest.facts["step"] == len(steps_of(training, "r1"))  # no step has to be done twice


def test_a_killed_trainer_frees_its_lease_and_the_next_start_ends_where_it_would_have_ended(
    short: Store, tmp_path: Path
) -> None:
    undisturbed = Store(shutil.copytree(short.home, tmp_path / "undisturbed"))
    home = short.home
    trainer.start(home, "r1")
    wait_for(lambda: len(short.checkpoints("r1")) >= 3, "no second checkpoint")
    process = trainer.alive(home, "r1")
    assert process is not None, "it ended before it could be killed"
    os.kill(process, signal.SIGKILL)
    wait_for(lambda: trainer.alive(home, "r1") is None, "the lease outlived its process")
    assert trainer.outcome(home, "r1") is None
    reached = int(short.manifest("checkpoints", short.checkpoints("r1")[-1]).facts["step"])
    assert 20 <= reached < 100

    trainer.start(home, "r1")
    wait_for(lambda: trainer.outcome(home, "r1"), "the resumed trainer did not end")
    assert trainer.outcome(home, "r1") == {"finished": True, "error": None}
    repeated = [row["step"] for row in read_json_lines(short.trainer("r1") / "steps.jsonl")]
    assert repeated.count(reached) == 1  # what a checkpoint holds is not trained again
    assert sorted(set(repeated)) == list(range(1, 101))

    worlds.train(undisturbed, "r1", 100)
    last = "r1-s0000100"
    assert short.manifest("checkpoints", last).digest == undisturbed.manifest("checkpoints", last).digest


def test_a_finished_run_starts_and_ends_at_once(store: Store) -> None:
    make_live(store)
    trainer.start(store.home, "r1")
    wait_for(lambda: trainer.outcome(store.home, "r1"), "the trainer did not end")
    assert trainer.outcome(store.home, "r1") == {"finished": True, "error": None}
    assert store.checkpoints("r1")[-1] == "r1-s0000012"
    wait_for(lambda: trainer.alive(store.home, "r1") is None, "the trainer left its outcome and stayed")
    assert "started" in trainer.start(store.home, "r1")
    wait_for(lambda: trainer.outcome(store.home, "r1"), "the trainer did not end")
    assert trainer.outcome(store.home, "r1") == {"finished": True, "error": None}
    wait_for(lambda: of_home(store.home) == [], "a trainer is left")


def test_an_operators_error_is_the_outcome(store: Store) -> None:
    for name in store.names("ict"):
        (store.path("ict", name) / "manifest.json").unlink()
    trainer.start(store.home, "r1")
    wait_for(lambda: trainer.outcome(store.home, "r1"), "the trainer did not end")
    outcome = trainer.outcome(store.home, "r1")
    assert outcome is not None
    assert "no ict yet" in outcome["error"]


def test_a_trainer_that_cannot_start_is_an_error_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestration.trainer.sys.executable", shutil.which("false"))
    with pytest.raises(RealmError, match=r"ended at once; see .*trainer\.log"):
        trainer.start(store.home, "r1")
