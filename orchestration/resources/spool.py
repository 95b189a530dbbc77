"""Rows that wait for the tracker: a file a training run, to which any process appends, and which one at a time sends.

The lock of a file is held for the moment of a write and never while rows are on their way: whoever appends waits for no
network. A row is in the file before anybody tries to send it, and leaves the file when it has arrived, so that a process that
is killed loses nothing.
"""

import json
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from realm_core.artifacts.publish import read_json_lines

_APPEND_SECONDS = 1.0  # a process that holds the lock and sleeps must not stop the others
_SENDER_SECONDS = 10.0
log = logging.getLogger(__name__)


def left_behind(folder: Path, before: float) -> list[str]:
    """Training runs whose file was last written to before a time in seconds since the epoch."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        with suppress(OSError):  # sent meanwhile
            if path.stat().st_mtime < before:
                found.append(path.stem)
    return found


class Spool:
    """The spool files of one home."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mutex = threading.Lock()
        self._unwritten: dict[str, list[dict[str, Any]]] = {}
        self._unwritten_before = False

    def path(self, run: str) -> Path:
        return self.folder / f"{run}.jsonl"

    def runs(self) -> list[str]:
        """Training runs for which something waits in a file."""
        return sorted(path.stem for path in self.folder.glob("*.jsonl"))

    def append(self, run: str, *rows: dict[str, Any]) -> None:
        """Write rows to the file. While somebody who sleeps holds its lock they wait in memory, and nobody else does."""
        with self._mutex:
            wanted = [*self._unwritten.pop(run, []), *rows]
            if not wanted:
                return
            try:
                self._write(run, wanted, 0.0 if self._unwritten_before else _APPEND_SECONDS)
                self._unwritten_before = False
            except Timeout:
                self._unwritten[run], self._unwritten_before = wanted, True
            except OSError as error:
                log.warning("%s: %d rows of metrics are lost (%s)", self.path(run), len(wanted), error)

    def send(self, run: str, deliver: Callable[[list[dict[str, Any]]], None]) -> None:
        """Deliver the rows of a run in their order until the file is empty; those that `deliver` returned from are forgotten.

        Raises what `deliver` raises, and Timeout if another process delivers just now or sleeps over a lock; the rows then stay.
        """
        self.append(run)
        if run in self._unwritten:
            raise Timeout(str(self.folder / f".{run}.lock"))
        if not self.path(run).exists():
            return
        with FileLock(self.folder / f".{run}.sending.lock", timeout=_APPEND_SECONDS):
            while True:
                size, rows = self._read(run)
                if not size:
                    return
                deliver(rows)
                self._forget(run, size)

    def _write(self, run: str, rows: list[dict[str, Any]], patience: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        with self._lock(run, patience), self.path(run).open("ab+") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                text = b"\n" + text  # closes a line that a crash left torn
            file.write(text)

    def _read(self, run: str) -> tuple[int, list[dict[str, Any]]]:
        """(length of the file in bytes, its rows)."""
        path = self.path(run)
        with self._lock(run, _SENDER_SECONDS):
            return (path.stat().st_size if path.exists() else 0), read_json_lines(path)

    def _forget(self, run: str, size: int) -> None:
        """Take the first `size` bytes out of the file; what was appended meanwhile stays."""
        path = self.path(run)
        with self._lock(run, _SENDER_SECONDS):
            left = path.read_bytes()[size:]
            if left:
                scratch = path.with_name(f".{run}.left")
                scratch.write_bytes(left)
                scratch.replace(path)
            else:
                path.unlink()

    def _lock(self, run: str, patience: float) -> AcquireReturnProxy:
        """Held for some hundred microseconds by whoever is awake, so that looking again soon is cheaper than a step lost."""
        return FileLock(self.folder / f".{run}.lock").acquire(timeout=patience, poll_interval=0.002)
