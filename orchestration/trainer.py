"""The long trainer: a process of its own, outside any Dagster run, that keeps its model warm and follows the live index.

`start` detaches it and returns; a file lock held by the process for as long as it lives makes a second trainer of one run
impossible; a file named `stop` ends it at the next step border.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from realm_core.artifacts.publish import write_durably
from realm_core.artifacts.store import Store
from realm_core.errors import BusyError, RealmError

LEASE, LOG, STOP, DONE = "lease.json", "trainer.log", "stop", "done.json"


def start(home: Path, run: str) -> str:
    """Start the trainer of `run` detached from this process; says what it did. A live trainer is left alone."""
    store = Store.open(home)
    folder = store.trainer(run)
    folder.mkdir(parents=True, exist_ok=True)
    if process := alive(home, run):
        return f"trainer of {run} already runs as process {process}"
    for leftover in (STOP, DONE):
        (folder / leftover).unlink(missing_ok=True)
    with (folder / LOG).open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "orchestration.trainer", str(home.resolve()), run],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return f"started the trainer of {run} as process {child.pid}, log in {folder / LOG}"


def alive(home: Path, run: str) -> int | None:
    """Process id of the trainer that holds the lease of `run`, or None."""
    folder = Store(home).trainer(run)
    if not folder.is_dir():
        return None
    lock = FileLock(folder / ".lease.lock")
    try:
        with lock.acquire(timeout=0):
            return None
    except Timeout:
        with suppress(OSError, ValueError, KeyError):
            return int(json.loads((folder / LEASE).read_text(encoding="utf-8"))["pid"])
        return -1


def stop(home: Path, run: str, timeout: float = 30.0) -> None:
    """Ask the trainer to end at the next step border; after `timeout` seconds end it by signal."""
    folder = Store(home).trainer(run)
    process = alive(home, run)
    if process is None:
        return
    (folder / STOP).touch()
    deadline = time.monotonic() + timeout
    while alive(home, run) is not None:
        if time.monotonic() > deadline and process > 0:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.2)


def outcome(home: Path, run: str) -> dict | None:
    """What the trainer left when it ended: {"finished": bool, "error": str | None}; None while it runs or if it was killed."""
    with suppress(OSError, ValueError):
        return json.loads((Store(home).trainer(run) / DONE).read_text(encoding="utf-8"))
    return None


def main(home: Path, run: str) -> int:
    """Body of the detached process."""
    from orchestration.resources.tracking import tracker_for
    from realm_core.stages import pretrain

    store = Store.open(home)
    folder = store.trainer(run)
    lock = FileLock(folder / ".lease.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(f"{folder}: another trainer holds the lease; wait for it or stop it") from None
    write_durably(folder / LEASE, json.dumps({"pid": os.getpid(), "started": time.time()}) + "\n")
    tracker = tracker_for(home)
    if run_id := tracker.run_id(run):
        os.environ["REALM_MLFLOW_RUN_ID"] = run_id
    error = None
    try:
        pretrain.run(
            store.config(),
            store=store,
            training_run=run,
            corpus=store.newest("corpus"),
            start=store.newest("ict"),
            sink=tracker.sink(run),
            should_stop=(folder / STOP).exists,
        )
    except RealmError as problem:
        error = str(problem)
        print(f"error: {problem}", file=sys.stderr, flush=True)
    tracker.finish(run)
    stopped = (folder / STOP).exists()
    write_durably(folder / DONE, json.dumps({"finished": error is None and not stopped, "error": error}) + "\n")
    return 2 if error else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
