"""A trainer that is killed outright, at any step and in the middle of a checkpoint, ends where it would have ended."""

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from realm_core.artifacts.publish import read_json_lines
from realm_core.artifacts.store import Store, checkpoint_key
from realm_core.stages.pretrain import STEPS

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

LATER = "r1-s0000004"

# A trainer that ends itself by SIGKILL at an exact moment: no handler runs, nothing is flushed or cleaned up.
TRAINER = """
import sys, time
from pathlib import Path
from realm_core.artifacts.store import Store
from realm_core.stages import pretrain, promote
from realm_core.train import follower
from tests.faults.kills import die, die_publishing

home, moment, at, promote_after = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
store = Store.open(home)

class Sink:
    def log(self, step, values):
        if step == promote_after:
            promote.run(store.config(), store=store, name="r1-s0000004")
        if moment == "step" and step == at:
            die()
        if moment == "slow":
            time.sleep(0.03)

die_publishing(f"r1-s{at:07d}", moment, pretrain)
# A version is ready at the step at which it is noticed: which step it serves first is then no race.
follower._Loading.done = lambda self: (self._thread.join(), True)[1]
pretrain.run(
    store.config(), store=store, training_run="r1", corpus=store.newest("corpus"), start=store.newest("ict"), sink=Sink()
)
"""
NEVER = -1


@pytest.fixture
def train(start_python: Callable) -> Callable:
    """`train(store, moment, at, promote_after)`: a trainer process up to its end; returns its exit code."""

    def run(store: Store, moment: str = "never", at: int = NEVER, promote_after: int = NEVER) -> int:
        process = start_python(TRAINER, store.home, moment, at, promote_after)
        _, problem = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), problem
        return process.returncode

    return run


def digests(store: Store) -> dict[str, str]:
    """Every checkpoint's digest: weights, optimiser, metrics, parents, and which index served which step."""
    return {key: store.manifest("checkpoints", key).digest for key in store.names("checkpoints")}


@pytest.fixture(scope="module")
def whole(tiny_home: Store, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """`whole(promote_after)`: the digests of a run that nothing interrupted."""
    import subprocess
    import sys

    known: dict[int, dict[str, str]] = {}

    def run(promote_after: int) -> dict[str, str]:
        if promote_after not in known:
            home = Path(shutil.copytree(tiny_home.home, tmp_path_factory.mktemp("whole") / "home"))
            arguments = [str(home), "never", str(NEVER), str(promote_after)]
            subprocess.run([sys.executable, "-c", TRAINER, *arguments], check=True, capture_output=True)
            known[promote_after] = digests(Store.open(home))
        return known[promote_after]

    return run


# Where a swap is awaited, the later index goes live after step 6: it serves the steps from then on.
@pytest.mark.parametrize(
    ("moment", "at", "promote_after"),
    [
        ("step", 5, NEVER),
        ("step", 5, 6),
        ("step", 7, 6),
        ("step", 8, 6),
        ("step", 11, 6),
        ("half written", 8, 6),
        ("before the rename", 8, 6),
        ("after the rename", 8, 6),
        ("before the rename", 12, 6),
    ],
)
def test_a_killed_trainer_ends_where_it_would_have_ended_to_the_last_bit(
    home: Store, train: Callable, whole: Callable, moment: str, at: int, promote_after: int
) -> None:
    assert train(home, moment, at, promote_after) == -signal.SIGKILL
    left = 8 if (moment, at) in {("step", 11), ("after the rename", 8), ("before the rename", 12)} else 4
    assert home.names("checkpoints")[-1] == checkpoint_key("r1", left)
    assert train(home, promote_after=promote_after) == 0
    assert digests(home) == whole(promote_after)
    assert not [entry for entry in (home.home / "checkpoints").iterdir() if entry.name.endswith(".partial")]


def test_a_trainer_killed_twice_in_the_same_steps_still_does(home: Store, train: Callable, whole: Callable) -> None:
    for at in (7, 6, 11):
        assert train(home, "step", at, promote_after=6) == -signal.SIGKILL
    assert train(home) == 0
    assert digests(home) == whole(6)


def test_a_trainer_killed_at_random_moments_from_outside_gets_there(
    home: Store, start_python: Callable, whole: Callable
) -> None:
    rng, killed = random.Random(5), 0
    while True:
        process = start_python(TRAINER, home.home, "slow", NEVER, NEVER)
        deadline = time.monotonic() + 60
        rows = len(read_json_lines(home.trainer("r1") / STEPS))
        while process.poll() is None and len(read_json_lines(home.trainer("r1") / STEPS)) <= rows:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.1 * (killed + 1)))  # longer and longer: it must arrive some day
        process.kill()
        process.wait()
        if process.returncode == 0:
            break
        killed += 1
        assert killed < 30
    assert killed > 1
    assert digests(home) == whole(NEVER)
