"""A lease: at most one process does a job, others can tell which, and the lease is free the moment that process dies."""

import fcntl
import json
import os
import time
from contextlib import suppress
from pathlib import Path

import psutil

from realm_core.artifacts.publish import operator_error
from realm_core.errors import BusyError

UNSIGNED = -1  # the lease is held, but its holder has not written its id yet


class Lease:
    """A file that is locked for as long as its holder lives and that holds the holder's process id."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def take(self, what: str, patience: float = 5.0) -> int:
        """Lock the file; returns its descriptor, which may be handed to a child, who then holds the lease.

        Waits a moment, because an onlooker may be looking just now. Raises BusyError naming the holder.
        """
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise operator_error(error, self.path) from None
        deadline = time.monotonic() + patience
        while not _locked(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise BusyError(f"{self.path}: {what} already runs as process {self._signed()}; wait for it or stop it")
            time.sleep(0.02)
        os.ftruncate(descriptor, 0)
        return descriptor

    def sign(self, descriptor: int, process: int) -> None:
        """Write down who holds the lease, and that this process gave it to them."""
        content = {"pid": process, "owner": os.getpid(), "since": time.time()}
        try:
            os.pwrite(descriptor, json.dumps(content).encode() + b"\n", 0)
        except OSError as error:
            raise operator_error(error, self.path) from None

    def holder(self) -> int | None:
        """Process id of the holder, UNSIGNED if it is not known yet, None if the lease is free."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            # A shared lock: two onlookers do not take each other for the holder.
            return None if _locked(descriptor, fcntl.LOCK_SH) else self._signed()
        finally:
            os.close(descriptor)

    def orphan(self) -> int | None:
        """Process id of a holder whose owner, the process that started it, is gone; None otherwise."""
        holder, owner = self.holder(), self._signed("owner")
        if holder is None or UNSIGNED in (holder, owner) or psutil.pid_exists(owner):
            return None
        return holder

    def _signed(self, name: str = "pid") -> int:
        with suppress(OSError, ValueError, KeyError):
            return int(json.loads(self.path.read_text(encoding="utf-8"))[name])
        return UNSIGNED


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
