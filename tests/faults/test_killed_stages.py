"""Warm start and fine-tuning publish only their end; killed on the way, the next attempt goes on from an interim state."""

import json
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from realm_core.artifacts.manifest import Manifest, read_manifest
from realm_core.artifacts.publish import INTERIM, scratch_of
from realm_core.artifacts.store import Store
from realm_core.errors import RealmError
from realm_core.ports import NullSink
from realm_core.train.update import Updater
from tests import training

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

# Attempts at one artifact, one after another, each in a process of its own that ends itself by SIGKILL at an exact moment.
# They are forked from one that has done nothing but import. Prints exit codes, and the steps that each attempt took.
ATTEMPTS = """
import json, os, sys, traceback
from pathlib import Path
from realm_core.artifacts.publish import git_commit
from realm_core.artifacts.store import Store
from realm_core.train import interim
from tests import training
from tests.faults import kills

store, stage, out, wanted = Store.open(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4])
log = out.with_suffix(".log")

def attempt(moment, place, at):
    class Sink:
        def log(self, step, values):
            loop = next(iter(values)).split("/")[0]
            with log.open("a") as file:
                file.write(f"{loop} {step}\\n")
            if (moment, place, at) == ("step", loop, step):
                kills.die()

    kills.die_publishing(place if at < 0 else f"{place}-{at:07d}", moment, interim)
    getattr(training, stage)(store, out, Sink())

git_commit()  # once for all
codes, steps = [], []
for kill in [*wanted, ("never", "", -1)]:
    log.write_text("")
    child = os.fork()
    if child == 0:
        try:
            attempt(*kill)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    steps.append(log.read_text().splitlines())
print(json.dumps([codes, steps]))
"""
Kill = tuple[str, str, int]


@pytest.fixture
def attempts(tiny_home: Store, start_python: Callable) -> Callable:
    """`attempts(stage, out, kills)`: the first step of every attempt, those that are killed and the one that is not."""

    def run(stage: str, out: Path, *kills: Kill) -> list[str | None]:
        process = start_python(ATTEMPTS, tiny_home.home, stage, out, json.dumps(kills))
        said, problem = process.communicate()
        assert process.returncode == 0, problem
        codes, steps = json.loads(said)
        assert codes == [-signal.SIGKILL] * len(kills) + [0], problem
        return [taken[0] if taken else None for taken in steps]

    return run


@pytest.fixture(scope="module")
def whole(tiny_home: Store, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Manifest]:
    """What undisturbed runs make."""
    folder = tmp_path_factory.mktemp("whole")
    stages = (training.warm_start, training.dense_reader)
    return {stage.__name__: stage(tiny_home, folder / stage.__name__, NullSink()) for stage in stages}


def require_same(out: Path, whole: Manifest) -> Manifest:
    """The artifact is the undisturbed one to the last bit, and nothing else is there."""
    made = read_manifest(out)
    assert made.digest == whole.digest
    assert sorted(entry.name for entry in out.iterdir()) == sorted(["manifest.json", *whole.files])
    assert not scratch_of(out).exists()
    return made


# Profile tiny: 8 steps of the inverse cloze task saved every 3, 6 of the warm-up every 2; 6 of the reader every 2.
def test_a_killed_inverse_cloze_task_goes_on_from_its_interim_state_and_ends_bit_for_bit_the_same(
    attempts: Callable, whole: Mapping[str, Manifest], tmp_path: Path
) -> None:
    out = tmp_path / "v0001"
    assert attempts(
        "warm_start",
        out,
        ("step", "ict", 1),
        ("step", "ict", 4),
        ("half written", "ict", 6),
        ("before the rename", "ict", 6),
        ("after the rename", "ict", 6),
        ("step", "ict", 6),
    ) == ["ict 0", "ict 0", "ict 3", "ict 3", "ict 3", "ict 6", "ict 6"]
    assert require_same(out, whole["warm_start"]).record["resumed"] == {"ict": 6}


def test_a_killed_warm_up_goes_on_without_the_inverse_cloze_task_and_ends_bit_for_bit_the_same(
    attempts: Callable, whole: Mapping[str, Manifest], tmp_path: Path
) -> None:
    out = tmp_path / "v0001"
    assert attempts(
        "warm_start",
        out,
        ("step", "warmup", 1),
        ("half written", "warmup", 2),
        ("step", "warmup", 3),
        ("after the rename", "warmup", 4),
        ("before the rename", "v0001", -1),
        ("after the rename", "v0001", -1),  # the states are then still in it, and go when it is asked for again
    ) == ["ict 0", "warmup 0", "warmup 0", "warmup 2", "warmup 4", "warmup 4", None]
    assert require_same(out, whole["warm_start"]).record["resumed"] == {"ict": 8, "warmup": 4}


def test_a_killed_fine_tuning_goes_on_with_reader_and_question_tower_and_ends_bit_for_bit_the_same(
    attempts: Callable, whole: Mapping[str, Manifest], tmp_path: Path
) -> None:
    out = tmp_path / "reader"
    assert attempts(
        "dense_reader",
        out,
        ("step", "reader", 1),
        ("step", "reader", 3),
        ("half written", "reader", 4),
        ("after the rename", "reader", 4),
        ("step", "reader", 5),
    ) == ["reader 0", "reader 0", "reader 2", "reader 2", "reader 4", "reader 4"]
    assert require_same(out, whole["dense_reader"]).record["resumed"] == {"reader": 4}


# --- states that are not taken up -------------------------------------------------------------------------------------


class Stop(NullSink):
    """Interrupts a loop at a step."""

    def __init__(self, loop: str, at: int) -> None:
        self.name, self.at = f"{loop}/loss", at

    def log(self, step: int, values: Any) -> None:
        if self.name in values and step == self.at:
            raise KeyboardInterrupt


def interrupted(store: Store, out: Path, *overrides: str) -> Path:
    """A warm start that ends in the middle of the warm-up; returns the folder of its states."""
    with pytest.raises(KeyboardInterrupt):
        training.warm_start(store, out, Stop("warmup", 3), *overrides)
    states = scratch_of(out) / INTERIM
    assert sorted(entry.name for entry in states.iterdir() if entry.name[0] != ".") == ["ict-0000008", "warmup-0000002"]
    return states


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def left(tiny_home: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """States of an interrupted warm start, to be copied."""
    return interrupted(tiny_home, tmp_path_factory.mktemp("left") / "v0001")


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("encoder.safetensors", truncate),
        ("encoder.safetensors", alter),
        ("optimizer.safetensors", Path.unlink),
        ("history.json", alter),
        ("manifest.json", truncate),
    ],
)
def test_a_spoilt_state_is_not_taken_up(
    left: Path, tiny_home: Store, whole: Mapping[str, Manifest], tmp_path: Path, name: str, spoil: Callable
) -> None:
    out = tmp_path / "v0001"
    shutil.copytree(left, scratch_of(out) / INTERIM)
    spoil(scratch_of(out) / INTERIM / "warmup-0000002" / name)
    assert training.warm_start(tiny_home, out, NullSink()).record["resumed"] == {"ict": 8}
    require_same(out, whole["warm_start"])


@pytest.mark.parametrize("other", ["seed=8", "warmup.batch=4"])
def test_a_state_of_other_settings_is_not_taken_up(
    tiny_home: Store, whole: Mapping[str, Manifest], tmp_path: Path, other: str
) -> None:
    out = tmp_path / "v0001"
    interrupted(tiny_home, out, other)
    assert training.warm_start(tiny_home, out, NullSink()).record["resumed"] == {}
    require_same(out, whole["warm_start"])


def test_a_state_of_another_version_of_the_code_is_not_taken_up(
    left: Path, tiny_home: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "v0001"
    shutil.copytree(left, scratch_of(out) / INTERIM)
    monkeypatch.setitem(training.ict.CODE, "ict", "next")
    assert training.warm_start(tiny_home, out, NullSink()).record["resumed"] == {}


def test_how_often_a_state_is_saved_is_no_part_of_the_result_and_may_change_on_the_way(
    left: Path, tiny_home: Store, whole: Mapping[str, Manifest], tmp_path: Path
) -> None:
    out = tmp_path / "v0001"
    shutil.copytree(left, scratch_of(out) / INTERIM)
    made = training.warm_start(tiny_home, out, NullSink(), "ict.checkpoint_every=1", "warmup.checkpoint_every=5")
    assert made.record["resumed"] == {"ict": 8, "warmup": 2}
    require_same(out, whole["warm_start"])


def test_a_warm_up_that_the_probe_ends_early_ends_there_also_after_an_interruption(
    tiny_home: Store, tmp_path: Path
) -> None:
    early = ["warmup.probe_every=4", "warmup.ready_gain=-9.0"]
    whole = training.warm_start(tiny_home, tmp_path / "whole", NullSink(), *early)
    assert whole.facts["metrics"]["warmup/steps"] == 4
    interrupted(tiny_home, tmp_path / "v0001", *early)
    made = training.warm_start(tiny_home, tmp_path / "v0001", NullSink(), *early)
    assert (made.record["resumed"], made.digest) == ({"ict": 8, "warmup": 2}, whole.digest)


# --- losses that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "module", "first", "message"),
    [
        (
            "warm_start",
            "retriever",
            4,
            "step 6: .* 3 times in a row; the last good interim state is that of ict step 3",
        ),
        ("warm_start", "retriever", 0, "step 2: .* no interim state was saved before, the same command begins anew"),
        ("warm_start", "encoder", 1, "step 3: .* the last good interim state is that of ict step 8"),
        ("dense_reader", "reader", 3, "step 5: .* the last good interim state is that of reader step 2"),
    ],
)
def test_a_diverged_stage_names_the_last_good_interim_state_and_the_same_command_goes_on_from_it(
    tiny_home: Store,
    whole: Mapping[str, Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    module: str,
    first: int,
    message: str,
) -> None:
    begin = Updater.begin

    def poisoned(self: Updater, step: int) -> None:
        begin(self, step)
        self.healthy = module not in self.modules or step < first

    out = tmp_path / "v0001"
    with monkeypatch.context() as patch:
        patch.setattr(Updater, "begin", poisoned)
        with pytest.raises(RealmError, match=message) as caught:
            getattr(training, stage)(tiny_home, out, NullSink())
    assert "\n" not in str(caught.value) and "lower" in str(caught.value)
    assert bool(getattr(training, stage)(tiny_home, out, NullSink()).record["resumed"]) == ("good" in message)
    require_same(out, whole[stage])
