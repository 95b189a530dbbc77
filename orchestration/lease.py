"""A lease: at most one process does a job, others can tell which, and the lease is free the moment that process dies."""

import fcntl
import json
import os
import time
from contextlib import suppress
from pathlib import Path

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
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + patience
        while not _locked(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise BusyError(f"{self.path}: {what} already runs as process {self._signed()}; wait for it or stop it")
            time.sleep(0.02)
        os.ftruncate(descriptor, 0)
        return descriptor

    def sign(self, descriptor: int, process: int) -> None:
        """Write down who holds the lease."""
        os.pwrite(descriptor, json.dumps({"pid": process, "since": time.time()}).encode() + b"\n", 0)

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

    def _signed(self) -> int:
        with suppress(OSError, ValueError, KeyError):
            return int(json.loads(self.path.read_text(encoding="utf-8"))["pid"])
        return UNSIGNED


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
