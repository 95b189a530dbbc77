"""The long trainer: a process of its own, outside any Dagster run, that keeps its model warm and follows the live index.

`start` detaches it and returns; a lease held by the process for as long as it lives makes a second trainer of one run
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
from typing import Any

from orchestration.lease import UNSIGNED, Lease
from realm_core.artifacts import corpora
from realm_core.artifacts.publish import operator_error, write_durably
from realm_core.artifacts.store import Store
from realm_core.errors import BusyError, RealmError

LEASE, LOG, STOP, DONE = "lease.json", "trainer.log", "stop", "done.json"


def start(home: Path, run: str, patience: float = 120.0) -> str:
    """Start the trainer of `run` detached from this process; says what it did. A live trainer is left alone.

    Returns when the new process holds its lease or has ended already, so that `alive` and `outcome` speak of this start.
    Raises RealmError if it fails before that.
    """
    store = Store.open(home)
    folder = store.trainer(run)
    try:
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
    except OSError as error:
        raise operator_error(error, folder) from None
    try:
        _wait_for_lease(home, run, child, patience)
    except BaseException:
        child.kill()
        raise
    return f"started the trainer of {run} as process {child.pid}, log in {folder / LOG}"


def alive(home: Path, run: str) -> int | None:
    """Process id of the trainer that holds the lease of `run`, UNSIGNED while it is just starting, or None."""
    return Lease(Store(home).trainer(run) / LEASE).holder()


def stop(home: Path, run: str, timeout: float = 30.0) -> None:
    """Ask the trainer to end at the next step border; after `timeout` seconds end it by signal."""
    folder = Store(home).trainer(run)
    deadline = time.monotonic() + timeout
    while (process := alive(home, run)) is not None:
        (folder / STOP).touch()
        if time.monotonic() > deadline and process != UNSIGNED:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)


def outcome(home: Path, run: str) -> dict[str, Any] | None:
    """What the trainer left when it ended: {"finished": bool, "error": str | None}; None while it runs or if it was killed."""
    with suppress(OSError, ValueError):
        return json.loads((Store(home).trainer(run) / DONE).read_text(encoding="utf-8"))
    return None


def main(home: Path, run: str) -> int:
    """Body of the detached process."""
    store = Store.open(home)
    folder = store.trainer(run)
    lease = Lease(folder / LEASE)
    try:
        lease.sign(lease.take(f"a trainer of {run}"), os.getpid())  # never let go: it ends with this process
    except BusyError as problem:
        print(f"error: {problem}", file=sys.stderr, flush=True)
        return 2
    # Imported under the lease: this takes seconds, and the starter waits for the lease.
    from orchestration.resources.tracking import tracker_for
    from realm_core.stages import pretrain

    tracker, config = tracker_for(home), store.config()
    if run_id := tracker.start(run):
        os.environ["REALM_MLFLOW_RUN_ID"] = run_id
    error, finished = None, False
    try:
        newest = pretrain.run(
            config,
            store=store,
            training_run=run,
            corpus=corpora.of_run(store, run),
            start=store.newest("ict"),
            sink=tracker.sink(run),
            should_stop=(folder / STOP).exists,
        )
        finished = newest.facts["step"] >= config.pretrain.steps
    except RealmError as problem:
        error = str(problem)
        print(f"error: {problem}", file=sys.stderr, flush=True)
    tracker.finish(run, "FINISHED" if finished else "FAILED" if error else "KILLED")
    write_durably(folder / DONE, json.dumps({"finished": finished, "error": error}) + "\n")
    return 2 if error else 0


def _wait_for_lease(home: Path, run: str, child: subprocess.Popen, patience: float) -> None:
    deadline = time.monotonic() + patience
    while alive(home, run) != child.pid:
        if child.poll() is not None:
            if outcome(home, run) is not None or alive(home, run) is not None:
                return  # it had nothing left to do, or another start was quicker
            raise RealmError(f"the trainer of {run} ended at once; see {Store(home).trainer(run) / LOG}")
        if time.monotonic() > deadline:
            raise RealmError(f"the trainer of {run} did not start within {patience:.0f} s; is the machine overloaded?")
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
