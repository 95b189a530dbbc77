"""A lease: at most one process does a job, others can tell which, and the lease is free the moment that process dies.

A lock of the operating system decides on one machine. Where machines share a home, the heartbeat in the file speaks for a
holder that the lock does not reach; and a fencing token, one higher with every holder, tells a holder that was given up for
dead, and was only asleep, that its place is taken.
"""

import fcntl
import json
import os
import platform
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from realm_core.artifacts.publish import operator_error, write_durably
from realm_core.errors import BusyError

UNSIGNED = -1  # the lease is held, but its holder has not written its id yet
HEARTBEAT_SECONDS, STALE_SECONDS = 10.0, 120.0
HERE = platform.node()
_WIDTH = 512  # bytes of a record: one write of constant length replaces the whole of the one before


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lease, as far as it is known."""

    pid: int = UNSIGNED
    owner: int = UNSIGNED  # the process that gave the lease to `pid`
    host: str = HERE
    by: str = ""  # in which way the holder does it, where there are several
    since: float | None = None  # seconds since the epoch, as is the next
    heartbeat: float | None = None  # None: this holder does not beat
    token: int = 0

    @property
    def here(self) -> bool:
        return self.host == HERE

    def age(self, now: float) -> float:
        """Seconds since the last heartbeat; 0 for a holder that does not beat and under a clock that went back."""
        return 0.0 if self.heartbeat is None else max(0.0, now - self.heartbeat)


class Lease:
    """A file that is locked for as long as its holder lives and that says who the holder is."""

    def __init__(
        self,
        path: Path,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        *,
        makes_folder: bool = False,
    ) -> None:
        self.path, self.heartbeat_seconds, self.stale_seconds = path, heartbeat_seconds, stale_seconds
        self.makes_folder = makes_folder  # when it is taken, not when somebody looks
        self.token_path = path.with_suffix(".token")

    def take(self, what: str, patience: float | int = 5.0) -> int:
        """Lock the file; returns its descriptor, which may be handed to a child, who then holds the lease.

        Waits a moment, because an onlooker may be looking just now. Raises BusyError naming the holder.
        """
        try:
            if self.makes_folder:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise operator_error(error, self.path) from None
        deadline = time.monotonic() + patience
        while not _locked(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise BusyError(
                    f"{self.path}: {what} already runs as process {self._read().pid}; wait for it or stop it"
                )
            time.sleep(0.02)
        if (other := self._elsewhere()) is not None:
            os.close(descriptor)
            raise BusyError(
                f"{self.path}: {what} already runs as process {other.pid} of {other.host}, heartbeat "
                f"{other.age(time.time()):.0f} s ago; stop it there, or wait until it is {self.stale_seconds:.0f} s old"
            )
        os.ftruncate(descriptor, 0)
        return descriptor

    def sign(self, descriptor: int, process: int) -> None:
        """Write down who holds the lease, and that this process gave it to them."""
        self._write(descriptor, {"pid": process, "owner": os.getpid(), "host": HERE, "since": time.time()})

    def hold(self, what: str, patience: float | int = 5.0, by: str = "") -> "Held":
        """Take the lease for this process, with the next token, and beat until it is released.

        Raises BusyError naming the holder.
        """
        last = max(self.token(), self._read().token)
        descriptor = self.take(what, patience)
        try:
            token = max(last, self.token()) + 1
            write_durably(self.token_path, f"{token}\n")  # before anybody may see the new holder
            return Held(self, descriptor, token, by)
        except BaseException:
            os.close(descriptor)
            raise

    def token(self) -> int:
        """The newest token that was given out; 0 if none was."""
        with suppress(OSError, ValueError):
            return int(self.token_path.read_text(encoding="utf-8"))
        return 0

    def state(self) -> Holder | None:
        """The holder, whose id may be UNSIGNED; None if the lease is free."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            # A shared lock: two onlookers do not take each other for the holder.
            return self._elsewhere() if _locked(descriptor, fcntl.LOCK_SH) else self._read()
        finally:
            os.close(descriptor)

    def holder(self) -> int | None:
        """Process id of the holder, UNSIGNED if it is not known yet, None if the lease is free."""
        state = self.state()
        return None if state is None else state.pid

    def orphan(self) -> int | None:
        """Process id of a holder whose owner, the process that started it, is gone; None otherwise."""
        state = self.state()
        if state is None or not state.here or UNSIGNED in (state.pid, state.owner) or psutil.pid_exists(state.owner):
            return None
        return state.pid

    def _elsewhere(self) -> Holder | None:
        """The holder on another machine, as long as its heart beats: our lock says nothing about it."""
        found = self._read()
        beats = found.heartbeat is not None and found.age(time.time()) < self.stale_seconds
        return found if beats and not found.here else None

    def _read(self) -> Holder:
        with suppress(OSError, ValueError, TypeError):
            values = json.loads(self.path.read_text(encoding="utf-8"))
            return Holder(**{key: values[key] for key in Holder.__dataclass_fields__ if key in values})
        return Holder()

    def _write(self, descriptor: int, content: dict[str, Any]) -> None:
        try:
            os.pwrite(descriptor, json.dumps(content).encode().ljust(_WIDTH) + b"\n", 0)
        except OSError as error:
            raise operator_error(error, self.path) from None


class Held:
    """A lease in the hands of this process. Leaving the block releases it; so does the end of the process."""

    def __init__(self, lease: Lease, descriptor: int, token: int, by: str) -> None:
        self.lease, self.token, self.by = lease, token, by
        self._descriptor, self._since = descriptor, time.time()
        self._ended = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def newest(self) -> bool:
        """Whether nobody was given the lease since."""
        return self.lease.token() == self.token

    def require_newest(self) -> None:
        """Raise BusyError if somebody was given the lease since: this holder was taken for dead, and must change nothing."""
        if not self.newest:
            raise BusyError(
                f"{self.lease.path}: this process had token {self.token} and token {self.lease.token()} was given to another, "
                "which has taken over; nothing more is written here"
            )

    def release(self) -> None:
        """Let the next one in."""
        if not self._ended.is_set():
            self.retire()
            os.close(self._descriptor)

    def retire(self) -> None:
        """Tell other machines that this holder is done; on this one the lease stays taken until the process has ended."""
        self._ended.set()
        self._thread.join()
        if self.newest:
            with suppress(Exception):
                self.lease._write(self._descriptor, {"token": self.token, "host": HERE})

    def __enter__(self) -> "Held":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _beat(self) -> None:
        content = {"pid": os.getpid(), "owner": os.getpid(), "host": HERE, "by": self.by, "since": self._since}
        self.lease._write(self._descriptor, {**content, "heartbeat": time.time(), "token": self.token})

    def _keep_beating(self) -> None:
        while not self._ended.wait(self.lease.heartbeat_seconds):
            if not self.newest:
                return  # the file is the successor's now
            with suppress(Exception):  # a disk that cannot be written says so when there is something to lose
                self._beat()


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
