"""The whole loop under random SIGKILLs. REALM_KILLS, REALM_SOAK_MINUTES and REALM_SEED in the environment set how much."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.loops import Loop

pytestmark = [pytest.mark.long, pytest.mark.faults, pytest.mark.timeout(7200)]
KILLS = int(os.environ.get("REALM_KILLS", "100"))
MINUTES = float(os.environ.get("REALM_SOAK_MINUTES", "30"))
SEED = int(os.environ.get("REALM_SEED", "1"))


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    made = Loop.create(tmp_path, SEED)
    yield made
    made.end()


def test_whatever_is_killed_nothing_torn_is_live_no_checkpoint_is_lost_and_the_newest_goes_live(
    loop: Loop, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    loop.begin()
    for number in range(KILLS):
        if number % 10 == 9:
            loop.breathe()
        loop.watch(loop.rng.uniform(0.5, 15.0))
        loop.kill()
    loop.require_whole(loop.settle())
    with capsys.disabled():
        print(f"\n{loop.summary(time.monotonic() - began)}")
    assert loop.kills["trainer"] and (KILLS < 20 or loop.kills["refresh"])


def test_the_loop_runs_for_half_an_hour_with_a_kill_now_and_then(
    loop: Loop, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    loop.begin()
    while time.monotonic() - began < 60 * MINUTES:
        loop.watch(loop.rng.uniform(10.0, 50.0))
        loop.kill()
    loop.require_whole(loop.settle())
    with capsys.disabled():
        print(f"\nsoak: {loop.summary(time.monotonic() - began)}")
    assert len(loop.store.live_history()) > 1
