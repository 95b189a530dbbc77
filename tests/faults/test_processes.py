"""Several processes that train together: they agree with one, share one index, stop together and survive each other."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from orchestration import trainer
from realm_core.artifacts.manifest import Manifest
from realm_core.artifacts.publish import read_json_lines
from realm_core.artifacts.store import Store, checkpoint_key
from realm_core.config import Config
from realm_core.errors import RealmError
from realm_core.ports import MemorySink, MetricSink, NullSink
from realm_core.stages import ict, pretrain
from realm_core.train import follower
from tests import training
from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(300)]

LATER = "r1-s0000004"

JOINED = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
from realm_core.artifacts.store import Store
from realm_core.model.world import World

folder, rank, size, home = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(str(folder / "meet"), size), rank=rank, world_size=size)
world, store = World(rank, size), Store.open(home)
"""


def run_in_two(code: str, folder: Path, home: Path) -> list[list[object]]:
    """Run code in two processes that have joined; returns what each printed, as JSON."""
    options = {"cwd": REPOSITORY, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", JOINED + code, str(folder), str(rank), "2", str(home)], **pipes, **options
        )
        for rank in range(2)
    ]
    try:
        ended = [process.communicate(timeout=200) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(problem for _, problem in ended)
    return [json.loads(said) for said, _ in ended]


def train(config: Config, store: Store, sink: MetricSink | None = None, **options: Any) -> Manifest:
    inputs = {"corpus": store.newest("corpus"), "start": store.newest("ict"), "sink": sink or NullSink()}
    return pretrain.run(config, store=store, training_run="r1", **inputs, **options)


def in_processes(config: Config, processes: int = 2) -> Config:
    return config.model_copy(update={"runtime": config.runtime.model_copy(update={"processes": processes})})


def together(store: Store, **options: Any) -> Manifest:
    """Pre-training of a home in two processes, this one leading."""
    return train(in_processes(store.config()), store, **options)


def digests(store: Store) -> dict[str, str]:
    return {key: store.manifest("checkpoints", key).digest for key in store.names("checkpoints")}


def helpers() -> list[psutil.Process]:
    """Live processes that help this one with a stage."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "realm_core.stages.processes" in child.cmdline()]


# --- two are as good as one ------------------------------------------------------------------------------------------

COMPARED = """
from realm_core.index.backends import ExactIndex
from realm_core.index.exact import exact_search
from realm_core.index.sharded import ShardedIndex
from safetensors.torch import save_file
from tests import training

losses, exact = {}, {"dtype": torch.float64}
for name, train, overrides, model in [
    ("ict", training.trained_ict, ["ict.steps=4", "ict.batch=24"], {}),
    ("ict exact", training.trained_ict, ["ict.steps=4", "ict.batch=24"], exact),
    ("ict cached", training.trained_ict, ["ict.steps=4", "ict.batch=24", "ict.micro_batch=3"], exact),
    ("warmup", training.warmed_up, ["warmup.steps=4"], {}),
    ("warmup exact", training.warmed_up, ["warmup.steps=4"], exact),
    ("pretrain", training.pretrained, [], {}),
    ("pretrain exact", training.pretrained, [], exact),
    ("pretrain micro", training.pretrained, ["pretrain.micro_batch=2"], {"dropout": 0.1}),
    ("ict dropout", training.trained_ict, ["ict.steps=3"], {"dropout": 0.1}),
]:
    weights, losses[name] = train(store, training.settings(*overrides), world, **model)
    save_file(weights, folder / f"{name}-{rank}.safetensors")

generator = torch.Generator().manual_seed(1)
vectors = torch.randn(401, 16, generator=generator)
vectors[200:300] = vectors[100:200]  # equal scores in both shares: the lower row wins
vectors[7] = vectors[390]
queries = torch.randn(9, 16, generator=generator)
same = []
for k, own in ((5, slice(0, 9 * rank)), (300, slice(4 * rank, 4 + 5 * rank)), (999, slice(0, 3))):
    found = ShardedIndex(ExactIndex(vectors), world, torch.device("cpu")).search(queries[own], k)
    expected = exact_search(queries[own], vectors, k)
    same.append(all(bool((a == b).all()) and a.shape == b.shape for a, b in zip(found, expected)))
said = {"same": same, "words": world.exchange(f"from {rank}"), "lead": world.lead(lambda: rank)}
print(json.dumps([losses, said]))
"""


@pytest.fixture(scope="module")
def compared(tiny_home: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[object]]]:
    """The folder of the weights that two processes ended with, and what each of them said."""
    folder = tmp_path_factory.mktemp("compared")
    return folder, run_in_two(COMPARED, folder, tiny_home.home)


def test_two_processes_train_as_one_does(tiny_home: Store, compared: tuple[Path, list[list[dict]]]) -> None:
    """Without dropout to rounding; with it to the last bit where both compute the same micro-batches."""
    folder, ((losses, _), _) = compared

    def compare(name: str, alone: tuple[training.Tensors, list[float]], tolerance: float) -> None:
        first, second = (load_file(folder / f"{name}-{rank}.safetensors") for rank in range(2))
        assert training.farthest(first, second) == 0.0, name
        assert training.farthest(first, alone[0]) <= tolerance, name
        assert losses[name] == pytest.approx(alone[1], rel=1e-5), name

    settings, exact = training.settings("ict.steps=4", "ict.batch=24", "warmup.steps=4"), {"dtype": torch.float64}
    for stage, train in (
        ("ict", training.trained_ict),
        ("warmup", training.warmed_up),
        ("pretrain", training.pretrained),
    ):
        compare(stage, train(tiny_home, settings), 1e-5)  # of steps that move weights by up to 1e-2
        compare(f"{stage} exact", alone := train(tiny_home, settings, **exact), 1e-10)
        if stage == "ict":
            compare("ict cached", alone, 1e-10)
    same_parts = training.pretrained(tiny_home, training.settings("pretrain.micro_batch=2"), dropout=0.1)
    compare("pretrain micro", same_parts, 0.0)
    assert len(losses["ict dropout"]) == 3


def test_an_index_in_shares_finds_what_the_whole_index_finds_bit_for_bit(
    compared: tuple[Path, list[list[dict]]],
) -> None:
    said = {"same": [True] * 3, "words": ["from 0", "from 1"], "lead": 0}
    assert [found for _, found in compared[1]] == [said, said]


# --- one index, one stop ---------------------------------------------------------------------------------------------

REFUSED = """
import time
from realm_core.errors import ArtifactError, RealmError
from realm_core.model.device import resolve
from realm_core.stages import promote
from realm_core.train import follower as module

warnings = []
follower = module.IndexFollower(store, folder, resolve(store.config().runtime), warnings.append, world)
follower.resume(0, 0)
assert follower.wait_for_first(5.0, lambda: False)
served, read = [follower.at(0).name], follower._open

def fails(name):
    time.sleep(0.1)
    raise ArtifactError(f"{name}: torn") if rank else RealmError("never")

follower._open = fails if rank else read
if rank == 0:
    promote.run(store.config(), store=store, name="r1-s0000004")
world.exchange("promoted")
for step in range(1, 8):
    served.append(follower.at(step).name)
    time.sleep(0.05)
assert follower._loading is None
follower._open = read
follower._refused.clear()  # mended
for step in range(8, 15):
    served.append(follower.at(step).name)
    time.sleep(0.05)
print(json.dumps([served, warnings]))
"""


def test_a_version_that_one_process_cannot_open_serves_none_and_one_all_can_open_serves_all_at_once(
    home: Store, tmp_path: Path
) -> None:
    (served, said), (also_served, _) = run_in_two(REFUSED, tmp_path, home.home)
    assert served == also_served
    assert served[:8] == ["r1-s0000000"] * 8 and served[-1] == LATER
    assert len(said) == 1 and said[0].endswith(
        f"index {LATER} refused, the old one stays: process 1 of 2: {LATER}: torn"
    )
    swaps = [(row["step"], row["index"]) for row in read_json_lines(tmp_path / follower.SWAPS)]
    assert swaps == [(0, "r1-s0000000"), (served.index(LATER), LATER)]


@pytest.fixture(scope="module")
def by_torchrun(tiny_home: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, str]:
    """The tiny home after an uninterrupted run in two processes that torchrun started, and what they said."""
    home = shutil.copytree(tiny_home.home, tmp_path_factory.mktemp("whole") / "home")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "realm_core.cli"]
    ended = subprocess.run(
        [*command, "pretrain", "--home", str(home), "--json"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert ended.returncode == 0, ended.stderr
    return Store.open(Path(home)), ended.stdout


@pytest.fixture
def whole(by_torchrun: tuple[Store, str]) -> Store:
    return by_torchrun[0]


def test_of_the_processes_that_torchrun_started_one_writes_and_one_speaks(by_torchrun: tuple[Store, str]) -> None:
    store, said = by_torchrun
    assert json.loads(said)["step"] == 12
    assert store.manifest("checkpoints", checkpoint_key("r1", 12)).record["processes"] == 2
    steps = [row["step"] for row in read_json_lines(store.trainer("r1") / pretrain.STEPS)]
    assert steps == list(range(1, 13))


def test_a_run_in_two_processes_that_is_stopped_and_resumed_is_the_run_in_one_go(home: Store, whole: Store) -> None:
    sink = MemorySink()
    made = together(home, sink=sink, should_stop=lambda: bool(sink.rows) and sink.rows[-1][0] >= 6)
    assert made.facts["step"] == 4 and [step for step, _ in sink.rows] == [5, 6]
    assert helpers() == []
    together(home)
    assert digests(home) == digests(whole)


# --- deaths ----------------------------------------------------------------------------------------------------------

LEADER = """
import sys, time, os, signal
from pathlib import Path
from realm_core.artifacts.store import Store
from realm_core.stages import pretrain

store = Store.open(Path(sys.argv[1]))

class Sink:
    def log(self, step, values):
        if step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

config = store.config()
config = config.model_copy(update={"runtime": config.runtime.model_copy(update={"processes": 2})})
pretrain.run(
    config, store=store, training_run="r1", corpus=store.newest("corpus"), start=store.newest("ict"), sink=Sink()
)
"""


def test_helpers_end_with_a_killed_leader_and_the_detached_trainer_ends_where_it_would_have_ended(
    home: Store, whole: Store, start_python: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    leader = start_python(LEADER, home.home, 7)
    seen: list[psutil.Process] = []
    while leader.poll() is None:
        seen = psutil.Process(leader.pid).children() or seen if psutil.pid_exists(leader.pid) else seen
        time.sleep(0.05)
    assert leader.returncode == -signal.SIGKILL and len(seen) == 1
    psutil.wait_procs(seen, timeout=20)
    assert not any(process.is_running() for process in seen)
    values = home.settings()
    values["config"]["runtime"]["processes"] = 2
    (home.home / "home.json").write_text(json.dumps(values), encoding="utf-8")
    trainer.start(home.home, "r1")
    deadline = time.monotonic() + 120
    while trainer.alive(home.home, "r1") is not None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert trainer.outcome(home.home, "r1") == {"finished": True, "error": None}
    assert digests(home) == digests(whole)


WARM_START = """
import os, signal, sys
from pathlib import Path
from realm_core.artifacts.store import Store
from tests import training

class Sink:
    def log(self, step, values):
        if (step, *values)[:2] == (3, "warmup/loss"):
            os.kill(os.getpid(), signal.SIGKILL)

store, out = Store.open(Path(sys.argv[1])), Path(sys.argv[2])
training.warm_start(store, out, Sink(), "runtime.processes=2")
"""


def test_a_warm_start_in_two_processes_goes_on_in_both_from_the_state_that_the_killed_leader_saved(
    tiny_home: Store, start_python: Callable, tmp_path: Path
) -> None:
    whole = training.warm_start(tiny_home, tmp_path / "whole", NullSink(), "runtime.processes=2")
    leader = start_python(WARM_START, tiny_home.home, tmp_path / "killed")
    _, problem = leader.communicate()
    assert leader.returncode == -signal.SIGKILL, problem
    # Weights that only one process took up would differ when the next state is saved, which is refused.
    made = training.warm_start(tiny_home, tmp_path / "killed", NullSink(), "runtime.processes=2")
    assert made.record["resumed"] == {"ict": 8, "warmup": 2}
    assert made.digest == whole.digest


def test_a_killed_helper_ends_the_stage_with_one_line(home: Store) -> None:
    class KillHelper(NullSink):
        def log(self, step: int, values: object) -> None:
            if step == 6:
                (helper,) = helpers()
                helper.kill()

    with pytest.raises(RealmError, match=r"process 1 of 2 ended with code -9: .*run the stage again") as caught:
        together(home, sink=KillHelper())
    assert "\n" not in str(caught.value) and helpers() == []
    assert home.names("checkpoints")[-1] == LATER
    alone = train(home.config(), home)  # and a run may go on with another number of processes
    assert alone.facts["step"] == 12


# --- the ways to start -----------------------------------------------------------------------------------------------


def test_the_warm_start_in_two_processes_is_finished_work_for_one(tiny_home: Store, tmp_path: Path) -> None:
    config, sink = training.settings("ict.steps=3", "warmup.steps=2"), MemorySink()
    corpus, out = tiny_home.newest("corpus"), tmp_path / "ict"
    made = ict.run(in_processes(config), corpus=corpus, out=out, sink=sink)
    assert [step for step, _ in sink.rows] == [0, 1, 2, 0, 1]
    assert ict.run(config, corpus=corpus, out=out, sink=NullSink()) == made
