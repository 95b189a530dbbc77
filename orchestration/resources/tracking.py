"""MLflow behind the library's ports: one MLflow run per training run of a home, written by explicit run id, and the registry.

A tracker that is down, or that accepts a connection and never answers, never stops training or refresh: whoever logs only
appends to a spool file beside the trainer, and one thread of the process talks to MLflow and empties the spool in its order.
What is asked of MLflow is waited for a short time. What is to be registered waits in a spool file of its own.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from orchestration import production
from orchestration.resources import registry
from orchestration.resources.mlflow_database import ensure_database
from orchestration.resources.spool import Spool
from realm_core.artifacts.store import Store
from realm_core.ports import MetricSink

EXPERIMENT = "realm"
RUN_TAG, HOME_TAG = "realm.run_id", "realm.home"
_REGISTRY = "_registry"  # a spool file that no training run can have the name of
_RETRY_SECONDS = 30.0  # how long rows are only spooled after the tracker failed
_BUSY_SECONDS = 1.0  # until a look at a spool file that another process is sending
_LOCK_SECONDS = 10.0  # a process that holds a lock and sleeps must not stop the others
_ANSWER_SECONDS = 5.0  # how long an answer is waited for
_END_SECONDS = 15.0  # how long the end of a Dagster run or of training waits for what is unsent
_IMPORT_SECONDS = 30.0  # what is waited besides, once in a process, while MLflow is imported and a database opened
log = logging.getLogger(__name__)
T = TypeVar("T")


class MlflowTracker:
    """Implements the Tracker port on an MLflow tracking store. Its methods may be called from any thread."""

    def __init__(self, uri: str, spool: Path, artifacts: str | None = None) -> None:
        """`spool` is HOME/mlflow/spool; `artifacts` is where a database without a server in front of it keeps files."""
        self.uri = uri
        self.spool = spool
        self.home = spool.parent.parent
        self.artifacts = artifacts
        self._spool = Spool(spool)
        self._client: Any = None
        self._runs: dict[str, str] = {}
        self._told: dict[str, Callable[[str], None]] = {}
        self._not_before = 0.0  # monotonic time of the next attempt after a failure
        self._look_again = 0.0  # and of the next look at a file that another process was sending
        self._unsent: set[str] = set()  # runs with rows of this process that nobody has looked after yet
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._connected = threading.Event()  # or failed to
        self._connected_by = 0.0
        self._thread: threading.Thread | None = None
        self._mutex = threading.Lock()

    def sink(self, run: str) -> MetricSink:
        return _RunSink(self, run)

    def tag(self, run: str, tags: Mapping[str, str]) -> None:
        self._log(run, {"tags": dict(tags)})

    def register(self, run: str, version: Mapping[str, str]) -> None:
        self._log(_REGISTRY, {"run": run, "version": dict(version), "alias": "candidate"})

    def champion(self, run: str, version: Mapping[str, str]) -> None:
        self._log(_REGISTRY, {"run": run, "version": dict(version), "alias": "champion"})

    @property
    def waiting(self) -> bool:
        """Whether something is spooled for the registry."""
        return self._spool.path(_REGISTRY).exists()

    def url(self, run: str) -> str | None:
        """Address of the run on an MLflow server or on the page that `realm up` shows; None without either."""
        page = self.uri if self.uri.startswith("http") else os.environ.get("REALM_MLFLOW_PAGE", "")
        if not page:
            return None

        def address() -> str:
            run_id = self._run_id(run)
            experiment = self._client.get_run(run_id).info.experiment_id
            return f"{page.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"

        return self._ask(address)

    def run_id(self, run: str) -> str | None:
        """MLflow's id of a training run, created on first use; None while MLflow is down."""
        return self._ask(lambda: self._run_id(run))

    def start(self, run: str, known: Callable[[str], None] = lambda run_id: None) -> str | None:
        """Mark the MLflow run as running, also when it ended before and now goes on. Returns its id as `run_id` does.

        `known` is called with the id, from another thread, as soon as MLflow tells it, which may be much later.
        """
        self._told[run] = known
        self._log(run, {"status": "RUNNING"})
        return self.run_id(run)

    def finish(self, run: str, status: str = "FINISHED") -> None:
        """End the MLflow run: FINISHED, FAILED, or KILLED if it can go on later. Waits a short time for what is unsent."""
        self._log(run, {"status": status})
        self.drain()

    def drain(self, seconds: float = _END_SECONDS) -> None:
        """Wait at most so long until what this process logged is sent; what is not stays in the spool."""
        if self._thread is not None:
            known_to_be_down = time.monotonic() < self._not_before
            self._not_before = 0.0
            patience = min(seconds, _ANSWER_SECONDS) if known_to_be_down else seconds
            self._ask(partial(self._send_all, patience), patience)

    def flush(self, seconds: float = 30.0) -> None:
        """Send what any process spooled for any run, if the tracker can be reached; waits at most so long, with 0 not at all."""
        with self._mutex:
            self._unsent.update(self._spool.runs())
        if self._unsent:
            self._not_before = 0.0
            self._do(self._send_unsent)
            if seconds:
                self.drain(seconds)

    def close(self, seconds: float = _END_SECONDS) -> None:
        """`drain`, with 0 without waiting, and the thread ends when it has tried. The tracker may be used again."""
        if seconds:
            self.drain(seconds)
        with self._mutex:
            if self._thread is not None:
                self._jobs.put(None)
                self._thread, self._jobs = None, queue.SimpleQueue()

    # --- what callers wait for ---------------------------------------------------------------------------------------

    def _log(self, run: str, row: dict[str, Any]) -> None:
        self._spool.append(run, {"time": int(time.time() * 1000), **row})
        with self._mutex:
            looked_after = run in self._unsent
            self._unsent.add(run)
        if not looked_after:
            self._do(self._send_unsent)

    def _do(self, job: Callable[[], None]) -> None:
        if self._thread is None:
            _import_mlflow(self.uri)
        with self._mutex:
            if self._thread is None or not self._thread.is_alive():  # not alive: this process was forked
                self._connected_by = time.monotonic() + _IMPORT_SECONDS
                self._thread = threading.Thread(target=self._work, args=(self._jobs,), name="mlflow", daemon=True)
                self._thread.start()
            self._jobs.put(job)

    def _ask(self, question: Callable[[], T], seconds: float = _ANSWER_SECONDS) -> T | None:
        """What MLflow says; None if it fails, is known to be down, or takes too long."""
        if time.monotonic() < self._not_before:
            return None
        answers: list[T] = []
        done = threading.Event()

        def job() -> None:
            try:
                answers.append(question())
            except Exception as error:  # whatever a tracker or its transport raises must not reach the work it observes
                self._note_failure(error)
            finally:
                done.set()

        self._do(job)
        self._connected.wait(max(0.0, self._connected_by - time.monotonic()))
        if not done.wait(seconds):
            self._not_before = time.monotonic() + _RETRY_SECONDS  # nor does the next one wait
        return answers[0] if answers else None

    # --- what the thread does ----------------------------------------------------------------------------------------

    def _work(self, jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
        with suppress(Exception):  # the job says what is wrong
            self._connect()
        self._connected.set()
        while True:
            again = max(self._not_before, self._look_again)
            try:
                job = jobs.get(timeout=max(0.0, again - time.monotonic()) if self._unsent else None)
            except queue.Empty:
                job = self._send_unsent
            if job is None:
                return
            job()

    def _send_all(self, seconds: float) -> None:
        """Send until nothing waits, MLflow fails, or the time is over: another process may be sending just now."""
        deadline = time.monotonic() + seconds
        self._send_unsent()
        while self._unsent and self._not_before < time.monotonic() < deadline:
            time.sleep(0.05)
            self._send_unsent()

    def _send_unsent(self) -> None:
        """Send what waits for the runs that were logged to; what could not be sent is tried again later."""
        with self._mutex:
            runs = sorted(self._unsent)
        for run in runs:
            if time.monotonic() < self._not_before:
                return
            with self._mutex:
                self._unsent.discard(run)  # before the look: a row that comes now asks for another
            try:
                self._spool.send(run, partial(self._send, run))
            except Exception as error:
                with self._mutex:
                    self._unsent.add(run)
                if isinstance(error, Timeout):  # another process sends, and may have overlooked the last row
                    self._look_again = time.monotonic() + _BUSY_SECONDS
                else:
                    self._note_failure(error)

    def _send(self, run: str, rows: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, RunTag

        if run == _REGISTRY:
            for row in rows:
                run_id = self._run_id(row["run"])
                registry.enter(self._client, Store(self.home), run_id, row["version"], row["alias"])
            return
        run_id = self._run_id(run)
        metrics = [
            Metric(name, value, row["time"], row["step"])
            for row in rows
            for name, value in row.get("metrics", {}).items()
        ]
        tags = [RunTag(key, str(value)) for row in rows for key, value in row.get("tags", {}).items()]
        for start in range(0, len(metrics), 900):  # MLflow takes at most 1000 metrics in a batch
            self._client.log_batch(run_id, metrics=metrics[start : start + 900])
        if tags:
            self._client.log_batch(run_id, tags=tags)
        ends = [(row["status"], row["time"]) for row in rows if "status" in row]
        for status, at in ends[-1:]:
            if status == "RUNNING":
                self._client.update_run(run_id, status=status)
            else:
                self._client.set_terminated(run_id, status, at)

    def _run_id(self, run: str) -> str:
        if run not in self._runs:
            self._runs[run] = self._find_or_create(run)
        if known := self._told.pop(run, None):
            known(self._runs[run])
        return self._runs[run]

    def _find_or_create(self, run: str) -> str:
        self.spool.mkdir(parents=True, exist_ok=True)
        # Trainer and refresh look for a run at the same time: unlocked, both would create it.
        with FileLock(self.spool / ".runs.lock", timeout=_LOCK_SECONDS):
            client = self._connect()
            experiment = client.get_experiment_by_name(EXPERIMENT)
            experiment_id = experiment.experiment_id if experiment else self._new_experiment(client)
            home = Store(self.home).identity
            mine = f"tags.`{RUN_TAG}` = '{run}' and tags.`{HOME_TAG}` = '{home}'"
            found = client.search_runs([experiment_id], filter_string=mine, max_results=1)
            if not found:
                found = [client.create_run(experiment_id, run_name=run, tags={RUN_TAG: run, HOME_TAG: home})]
            return str(found[0].info.run_id)

    def _new_experiment(self, client: Any) -> str:
        """A server decides itself where files go; a bare database would put them below the working directory."""
        place = None if self.uri.startswith("http") else self.artifacts
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=place))
        except Exception:  # another home was quicker
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
            return str(found.experiment_id)

    def _connect(self) -> Any:
        if self._client is None:
            for noisy in ("alembic", "mlflow.store.db.utils"):
                logging.getLogger(noisy).setLevel(logging.WARNING)
            from mlflow import MlflowClient

            ensure_database(self.uri, self.artifacts)
            self._client = MlflowClient(self.uri)
        return self._client

    def _note_failure(self, error: Exception) -> None:
        self._not_before = time.monotonic() + _RETRY_SECONDS
        self._runs.clear()  # somebody may have deleted them
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("MLflow at %s: %s; metrics are spooled in %s and sent later", self.uri, first_line, self.spool)


def _import_mlflow(uri: str) -> None:
    """Import what the thread will need in the caller's: two threads that import SQLAlchemy at once, as Dagster does too, may see
    half of it. What is wrong with an import is said by the job that needs it."""
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("PGCONNECT_TIMEOUT", "10")
    with suppress(Exception):
        import mlflow.entities
        import mlflow.pyfunc

        if not uri.startswith("http"):
            import mlflow.store.model_registry.sqlalchemy_store
            import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


class _RunSink:
    def __init__(self, tracker: MlflowTracker, run: str) -> None:
        self.tracker, self.run = tracker, run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        metrics = {name: float(value) for name, value in values.items() if value is not None}
        self.tracker._log(self.run, {"step": step, "metrics": metrics})


def tracker_for(home: Path) -> MlflowTracker:
    """The tracker of a home: at MLFLOW_TRACKING_URI if that is set, else PostgreSQL in the production profile, else a SQLite
    database in the home."""
    home = home.resolve()
    uri = os.environ.get("MLFLOW_TRACKING_URI", "") or default_uri(home)
    return MlflowTracker(uri, home / "mlflow" / "spool", artifacts=default_artifacts(home))


def default_uri(home: Path) -> str:
    """Where runs are logged if nobody says otherwise."""
    profile = production.chosen()
    return profile.mlflow_uri() if profile else f"sqlite:///{home.resolve() / 'mlflow' / 'mlflow.db'}"


def default_artifacts(home: Path) -> str:
    """Where files of runs and models go if nobody says otherwise."""
    profile = production.chosen()
    if profile is not None:
        return profile.mlflow_artifacts()
    folder = home.resolve() / "mlflow" / "artifacts"
    with suppress(OSError):  # a home that cannot be written loses files of the tracker, not its work
        folder.mkdir(parents=True, exist_ok=True)
    return folder.as_uri()
