"""A lease belongs to one process and is free the moment that process dies."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestration.lease import UNSIGNED, Lease
from realm_core.errors import ArtifactError, BusyError

HOLD = """
import os, sys, time
from pathlib import Path
from orchestration.lease import Lease
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
from orchestration.lease import Lease
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
