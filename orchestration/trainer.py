"""The long trainer: a process of its own, outside any Dagster run, that keeps its model warm and follows the live index.

`start` detaches it and returns; the lease of its run makes a second trainer impossible; a file named `stop` ends it at the
next step border. `orchestration.supervisor` starts it again when it dies.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from realm_core.artifacts import corpora
from realm_core.artifacts.lease import UNSIGNED, Held, Holder
from realm_core.artifacts.publish import operator_error, write_durably
from realm_core.artifacts.store import Store
from realm_core.errors import BusyError, RealmError

LOG, STOP, DONE, STARTED = "trainer.log", "stop", "done.json", "supervision.json"
DETACHED = "the detached trainer"


def start(home: Path, run: str, patience: float = 120.0) -> str:
    """Start the trainer of `run` detached from this process; says what it did. A live trainer is left alone.

    From now on the trainer is wanted: if it dies it is started again, until `stop`. With `supervise.mode: segments` no process
    is started: the sensor of the segments finds that they are wanted.
    Returns when the new process holds its lease or has ended already, so that `alive` and `outcome` speak of this start.
    Raises RealmError if it fails before that.
    """
    store = Store.open(home)
    folder = store.trainer(run)
    with one_at_a_time(folder):
        if (holder := state(home, run)) is not None:
            return f"trainer of {run} already runs as {_place(holder)}"
        try:
            (folder / STOP).unlink(missing_ok=True)
        except OSError as error:
            raise operator_error(error, folder) from None
        keys = store.checkpoints(run)
        write_durably(folder / STARTED, json.dumps({"restarts": 0, "checkpoint": keys[-1] if keys else None}) + "\n")
        if store.config().supervise.mode == "segments":
            (folder / DONE).unlink(missing_ok=True)
            return f"segments of {run} are wanted from {keys[-1] if keys else 'the start'} on; segment_sensor asks for them"
        return launch(store, run, patience)


def launch(store: Store, run: str, patience: float) -> str:
    """Detach a process and wait for its lease; `one_at_a_time` is held by the caller."""
    folder = store.trainer(run)
    try:
        (folder / DONE).unlink(missing_ok=True)
        with (folder / LOG).open("ab") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", "orchestration.trainer", str(store.home.resolve()), run],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
    except OSError as error:
        raise operator_error(error, folder) from None
    try:
        _wait_for_lease(store.home, run, child, patience)
    except BaseException:
        child.kill()
        raise
    return f"started the trainer of {run} as process {child.pid}, log in {folder / LOG}"


def state(home: Path, run: str) -> Holder | None:
    """Who trains `run`: the detached trainer, a segment in a Dagster run, or a command; None if nobody does."""
    return Store(home).training_lease(run).state()


def alive(home: Path, run: str) -> int | None:
    """Process id of whoever holds the lease of `run`, UNSIGNED while it is just starting, or None."""
    holder = state(home, run)
    return None if holder is None else holder.pid


def stop(home: Path, run: str, timeout: float = 30.0) -> str:
    """Ask the trainer to end at the next step border; after `timeout` seconds end it by signal. A segment that Dagster runs
    goes on to its checkpoint and is the last one. Returns what happened, for people.

    Raises BusyError if it runs on another machine and does not end there, and if a segment or a command trains this run.
    """
    store = Store(home)
    folder = store.trainer(run)
    if not folder.is_dir():
        return f"trainer of {run} was not running"
    with one_at_a_time(folder):  # a restart that is under way comes first, and is then ended too
        running = state(home, run) is not None
        (folder / STOP).touch()
        deadline = time.monotonic() + timeout
        while (holder := state(home, run)) is not None:
            if holder.pid != UNSIGNED and holder.by != DETACHED:
                if store.config().supervise.mode == "segments":
                    return f"the segment of {run} under way, {_place(holder)}, goes on to its checkpoint and is the last one"
                raise BusyError(f"{folder}: {run} is trained by {_place(holder)}, no detached trainer; end that one")
            if time.monotonic() > deadline and holder.pid != UNSIGNED:
                if not holder.here:
                    raise BusyError(f"{folder}: the trainer is {_place(holder)} and has not ended; stop it there")
                with suppress(ProcessLookupError):
                    os.kill(holder.pid, signal.SIGKILL)
            time.sleep(0.1)
    return f"trainer of {run} {'has stopped' if running else 'was not running'}"


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Starts, restarts and stops of one run follow each other."""
    lock = FileLock(folder / ".start.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise operator_error(error, folder) from None
    try:
        yield
    finally:
        lock.release()


def stop_requested(home: Path, run: str) -> bool:
    """Whether the last thing anybody wanted of this trainer is that it ends."""
    return (Store(home).trainer(run) / STOP).exists()


def outcome(home: Path, run: str) -> dict[str, Any] | None:
    """What the trainer left when it ended: {"finished": bool, "error": str | None}; None while it runs or if it was killed."""
    with suppress(OSError, ValueError):
        return json.loads((Store(home).trainer(run) / DONE).read_text(encoding="utf-8"))
    return None


def main(home: Path, run: str) -> int:
    """Body of the detached process."""
    store = Store.open(home)
    try:
        lease = store.training_lease(run).hold(f"a trainer of {run}", by=DETACHED)
    except BusyError as problem:
        print(f"error: {problem}", file=sys.stderr, flush=True)
        return 2
    try:
        return _train(store, run, lease)
    finally:
        lease.retire()  # it is let go when this process has ended


def _train(store: Store, run: str, lease: Held) -> int:
    # Imported under the lease: this takes seconds, and the starter waits for the lease.
    from orchestration.resources.tracking import tracker_for
    from realm_core.stages import pretrain

    folder, config, tracker = store.trainer(run), store.config(), tracker_for(store.home)
    # Checkpoints name the run; one that MLflow tells of only later stands in those that are made from then on.
    tracker.start(run, known=lambda run_id: os.environ.update(REALM_MLFLOW_RUN_ID=run_id))
    error, finished, handed_over = None, False, _hand_over(store)
    try:
        newest = pretrain.run(
            config,
            store=store,
            training_run=run,
            corpus=corpora.of_run(store, run),
            start=store.newest("ict"),
            sink=tracker.sink(run),
            should_stop=lambda: (folder / STOP).exists() or handed_over(),
            lease=lease,
        )
        finished = newest.facts["step"] >= config.pretrain.steps
    except RealmError as problem:
        error = str(problem)
        print(f"error: {problem}", file=sys.stderr, flush=True)
    if not lease.newest:
        return 2  # somebody else trains this run now: its outcome is theirs to tell
    if not finished and error is None and not (folder / STOP).exists():
        return 0  # segments go on with it
    tracker.finish(run, "FINISHED" if finished else "FAILED" if error else "KILLED")
    write_durably(folder / DONE, json.dumps({"finished": finished, "error": error}) + "\n")
    return 2 if error else 0


def _hand_over(store: Store) -> Callable[[], bool]:
    """Whether segments are to go on from here; looked at when a checkpoint has landed, so that no step is done twice."""
    folder = store.home / "checkpoints"
    seen = folder.stat().st_mtime_ns if folder.exists() else 0

    def look() -> bool:
        nonlocal seen
        before, seen = seen, folder.stat().st_mtime_ns if folder.exists() else 0
        return seen != before and store.config().supervise.mode == "segments"

    return look


def _place(holder: Holder) -> str:
    return ("a process" if holder.pid == UNSIGNED else f"process {holder.pid}") + (
        "" if holder.here else f" of {holder.host}"
    )


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
