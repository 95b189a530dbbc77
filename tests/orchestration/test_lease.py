"""A lease belongs to one process and is free the moment that process dies."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from realm_core.artifacts.lease import HERE, UNSIGNED, Lease
from realm_core.errors import ArtifactError, BusyError

HOLD = """
import os, sys, time
from pathlib import Path
from realm_core.artifacts.lease import Lease
lease = Lease(Path(sys.argv[1]))
lease.sign(lease.take("a holder"), os.getpid())
print("held", flush=True)
time.sleep(600)
"""


def hold(path: Path) -> subprocess.Popen:
    """A process that holds the lease."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lease_nobody_took_is_free(tmp_path: Path) -> None:
    assert Lease(tmp_path / "lease.json").holder() is None


def test_the_holder_is_named_and_a_second_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    process = hold(path)
    try:
        assert Lease(path).holder() == process.pid
        with pytest.raises(BusyError, match=rf"a second one already runs as process {process.pid}"):
            Lease(path).take("a second one", patience=0.1)
        assert Lease(path).holder() == process.pid
    finally:
        process.kill()
        process.wait()


def test_a_holder_whose_owner_was_killed_is_an_orphan(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    code = f"""
import subprocess, sys, time
from pathlib import Path
from realm_core.artifacts.lease import Lease
lease = Lease(Path({str(path)!r}))
held = lease.take("a holder")
child = subprocess.Popen(["sleep", "600"], pass_fds=[held])
lease.sign(held, child.pid)
print(child.pid, flush=True)
time.sleep(600)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    try:
        assert Lease(path).holder() == child
        assert Lease(path).orphan() is None
        owner.kill()
        owner.wait()
        assert Lease(path).orphan() == child
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lease_in_a_folder_that_is_gone_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gone/lease\.json: cannot be written"):
        Lease(tmp_path / "gone" / "lease.json").take("a holder")


def test_a_lease_dies_with_its_process_however_it_dies(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    process = hold(path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert Lease(path).holder() is None
    os.close(Lease(path).take("the next", patience=0))


def test_a_lease_handed_to_a_child_outlives_its_taker_and_dies_with_the_child(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "lease.json")
    held = lease.take("a child")
    child = subprocess.Popen(["sleep", "600"], pass_fds=[held])
    lease.sign(held, child.pid)
    os.close(held)
    try:
        assert lease.holder() == child.pid
    finally:
        child.kill()
        child.wait()
    assert lease.holder() is None


def test_a_holder_that_has_not_signed_yet_is_not_taken_for_the_one_before(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "lease.json")
    held = lease.take("a holder")
    lease.sign(held, 4321)
    os.close(held)
    held = lease.take("the next")
    assert lease.holder() == UNSIGNED
    os.close(held)


def test_onlookers_neither_see_each_other_nor_keep_a_taker_out(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "lease.json")
    os.close(lease.take("first"))
    end = time.monotonic() + 0.5
    seen: list[int | None] = []

    def look() -> None:
        while time.monotonic() < end:
            seen.append(lease.holder())

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    for looker in lookers:
        looker.join()
    assert set(seen) == {None}

    end = time.monotonic() + 0.5
    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    held = lease.take("a taker")  # never refused because somebody looks
    for looker in lookers:
        looker.join()
    os.close(held)


# --- heartbeats and tokens ---------------------------------------------------------------------------------------------


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_holder_shows_place_token_and_a_heart_that_beats(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "lease.json", heartbeat_seconds=0.01)
    with lease.hold("a holder", by="the test") as held:
        first = lease.state()
        assert first is not None and first.heartbeat is not None
        assert (first.pid, first.host, first.by, first.token) == (os.getpid(), HERE, "the test", 1)
        wait_for(lambda: lease.state().heartbeat > first.heartbeat)  # type: ignore[union-attr, operator]
        held.require_newest()
    assert lease.state() is None
    with lease.hold("the next") as held:
        assert held.token == 2


def test_tokens_grow_over_deaths_and_over_a_lease_file_that_was_deleted(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    code = HOLD.replace('lease.sign(lease.take("a holder"), os.getpid())', 'held = lease.hold("a holder")')
    sleeper = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert sleeper.stdout is not None and sleeper.stdout.readline() == "held\n"
        path.unlink()  # and with it what the lock is on
        with Lease(path).hold("a successor") as successor:
            assert successor.token == 2
            successor.require_newest()
    finally:
        sleeper.kill()
        sleeper.wait()
    path.write_text('{"torn')
    with Lease(path).hold("the third") as third:
        assert third.token == 3


def test_a_holder_that_was_replaced_is_told_and_leaves_the_file_to_its_successor(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "lease.json", heartbeat_seconds=0.01)
    with lease.hold("a holder") as held:
        lease.token_path.write_text("2\n")
        other = json.dumps({"pid": 7, "host": "elsewhere", "heartbeat": time.time(), "token": 2})
        wait_for(lambda: not held._thread.is_alive())
        lease.path.write_text(other)
        with pytest.raises(BusyError, match="had token 1 and token 2 was given to another"):
            held.require_newest()
    assert lease.path.read_text() == other


@pytest.mark.parametrize(("age", "free"), [(0.0, False), (100.0, False), (130.0, True), (-1e6, False)])
def test_a_holder_on_another_machine_counts_as_long_as_its_heart_beats(tmp_path: Path, age: float, free: bool) -> None:
    lease = Lease(tmp_path / "lease.json", stale_seconds=120.0)
    there = {"pid": 7, "host": "elsewhere", "heartbeat": time.time() - age, "token": 4}
    lease.path.write_text(json.dumps(there))
    assert lease.holder() == (None if free else 7)
    assert lease.orphan() is None
    if free:
        with lease.hold("a holder here") as held:
            assert held.token == 5
    else:
        with pytest.raises(
            BusyError, match=r"already runs as process 7 of elsewhere, heartbeat \d+ s ago; stop it there"
        ):
            lease.hold("a holder here", patience=0)
        assert json.loads(lease.path.read_text()) == there


def test_a_holder_elsewhere_that_let_go_is_gone_at_once(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "lease.json")
    lease.hold("a holder").release()
    content = json.loads(lease.path.read_text())
    lease.path.write_text(json.dumps({**content, "host": "elsewhere"}))
    assert lease.state() is None
    with lease.hold("the next") as held:
        assert held.token == 2
