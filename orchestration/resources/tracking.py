"""MLflow behind the library's ports: one MLflow run per training run of a home, written by explicit run id, and the registry.

A tracker that is down never stops training or refresh: rows that cannot be sent wait in a spool file beside the trainer and go
out, in order, with the next row that can. What is to be registered waits in a spool file of its own.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg
from filelock import FileLock, Timeout

from orchestration import production
from orchestration.resources import registry
from realm_core.artifacts.publish import read_json_lines
from realm_core.artifacts.store import Store
from realm_core.ports import MetricSink

EXPERIMENT = "realm"
RUN_TAG, HOME_TAG = "realm.run_id", "realm.home"
_REGISTRY = "_registry"  # a spool file that no training run can have the name of
_RETRY_SECONDS = 30.0  # how long rows are only spooled after the tracker failed
_LOCK_SECONDS = 10.0  # a process that holds a lock and sleeps must not stop the others
log = logging.getLogger(__name__)


class MlflowTracker:
    """Implements the Tracker port on an MLflow tracking store."""

    def __init__(self, uri: str, spool: Path, artifacts: str | None = None) -> None:
        """`spool` is HOME/mlflow/spool; `artifacts` is where a database without a server in front of it keeps files."""
        self.uri = uri
        self.spool = spool
        self.home = spool.parent.parent
        self.artifacts = artifacts
        self._client: Any = None
        self._runs: dict[str, str] = {}
        self._down_until = 0.0
        self._unwritten: dict[str, list[dict[str, Any]]] = {}
        self._unwritten_before = False

    def sink(self, run: str) -> MetricSink:
        return _RunSink(self, run)

    def tag(self, run: str, tags: Mapping[str, str]) -> None:
        self._send_or_spool(run, {"tags": dict(tags)})

    def register(self, run: str, version: Mapping[str, str]) -> None:
        self._send_or_spool(_REGISTRY, {"run": run, "version": dict(version), "alias": "candidate"})

    def champion(self, run: str, version: Mapping[str, str]) -> None:
        self._send_or_spool(_REGISTRY, {"run": run, "version": dict(version), "alias": "champion"})

    @property
    def waiting(self) -> bool:
        """Whether something is spooled for the registry."""
        return (self.spool / f"{_REGISTRY}.jsonl").exists()

    def url(self, run: str) -> str | None:
        """Address of the run on an MLflow server or on the page that `realm up` shows; None without either."""
        page = self.uri if self.uri.startswith("http") else os.environ.get("REALM_MLFLOW_PAGE", "")
        if not page:
            return None
        with suppress(Exception):
            run_id = self._run_id(run)
            experiment = self._client.get_run(run_id).info.experiment_id
            return f"{page.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
        return None

    def run_id(self, run: str) -> str | None:
        """MLflow's id of a training run, created on first use; None while MLflow is down."""
        with suppress(Exception):
            return self._run_id(run)
        return None

    def start(self, run: str) -> str | None:
        """Mark the MLflow run as running, also when it ended before and now goes on. Returns its id as `run_id` does."""
        with suppress(Exception):
            run_id = self._run_id(run)
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        return None

    def finish(self, run: str, status: str = "FINISHED") -> None:
        """Send what is spooled and end the MLflow run: FINISHED, FAILED, or KILLED if it can go on later."""
        self._down_until, self._unwritten_before = 0.0, False
        if run in self._unwritten:
            self._spool(run, [])
        self._flush(run)
        with suppress(Exception):
            self._client.set_terminated(self._run_id(run), status)

    def flush(self) -> None:
        """Send what is spooled for any run, if the tracker can be reached."""
        self._down_until = 0.0
        for path in sorted(self.spool.glob("*.jsonl")):
            self._flush(path.stem)

    # --- below: may raise, callers above and `_send_or_spool` catch --------------------------------------------------

    def _send_or_spool(self, run: str, row: dict[str, Any]) -> None:
        row = {"time": int(time.time() * 1000), **row}
        path = self.spool / f"{run}.jsonl"
        waiting = path.exists()
        if not waiting and time.monotonic() >= self._down_until:
            try:
                self._send(run, [row])
                return
            except Exception as error:  # whatever a tracker or its transport raises must not reach training
                self._note_failure(run, error)
        self._spool(run, [row])
        if waiting:
            self._flush(run)

    def _spool(self, run: str, rows: list[dict[str, Any]]) -> None:
        """Write rows to the spool file. While somebody who sleeps holds its lock they wait in memory, and nobody else does."""
        path, rows = self.spool / f"{run}.jsonl", [*self._unwritten.pop(run, []), *rows]
        patience = 0.0 if self._unwritten_before else _LOCK_SECONDS
        try:
            self.spool.mkdir(parents=True, exist_ok=True)
            with FileLock(self.spool / f".{run}.lock", timeout=patience), path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
            self._unwritten_before = False
        except Timeout:
            self._unwritten[run], self._unwritten_before = rows, True
        except OSError as error:
            log.warning("%s: %d rows of metrics are lost (%s)", path, len(rows), error)

    def _flush(self, run: str) -> None:
        path = self.spool / f"{run}.jsonl"
        if not path.exists() or time.monotonic() < self._down_until:
            return
        try:
            with FileLock(self.spool / f".{run}.lock", timeout=0):
                self._send(run, read_json_lines(path))
                path.unlink()
        except Timeout:
            return  # somebody else flushes
        except Exception as error:
            self._note_failure(run, error)

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

    def _run_id(self, run: str) -> str:
        if run in self._runs:
            return self._runs[run]
        self.spool.mkdir(parents=True, exist_ok=True)
        # Trainer and refresh look for a run at the same time: unlocked, both would create it, and a new database too.
        with FileLock(self.spool / ".runs.lock", timeout=_LOCK_SECONDS):
            client = self._connect()
            experiment = client.get_experiment_by_name(EXPERIMENT)
            experiment_id = experiment.experiment_id if experiment else self._new_experiment(client)
            home = Store(self.home).identity
            mine = f"tags.`{RUN_TAG}` = '{run}' and tags.`{HOME_TAG}` = '{home}'"
            found = client.search_runs([experiment_id], filter_string=mine, max_results=1)
            if not found:
                found = [client.create_run(experiment_id, run_name=run, tags={RUN_TAG: run, HOME_TAG: home})]
            self._runs[run] = found[0].info.run_id
        return self._runs[run]

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
            os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
            for noisy in ("alembic", "mlflow.store.db.utils"):
                logging.getLogger(noisy).setLevel(logging.WARNING)
            from mlflow import MlflowClient

            self._client = MlflowClient(self.uri)
        return self._client

    def _note_failure(self, run: str, error: Exception) -> None:
        self._down_until = time.monotonic() + _RETRY_SECONDS
        self._runs.clear()  # somebody may have deleted them
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("MLflow at %s: %s; metrics are spooled in %s and sent later", self.uri, first_line, self.spool)


class _RunSink:
    def __init__(self, tracker: MlflowTracker, run: str) -> None:
        self.tracker, self.run = tracker, run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        metrics = {name: float(value) for name, value in values.items() if value is not None}
        self.tracker._send_or_spool(self.run, {"step": step, "metrics": metrics})


@dg.resource(config_schema={"home": dg.StringSource}, description="MLflow; see tracker_for for the address.")
def tracking_resource(context: dg.InitResourceContext) -> MlflowTracker:
    """The tracker of the home."""
    return tracker_for(Path(context.resource_config["home"]))


def tracker_for(home: Path) -> MlflowTracker:
    """The tracker of a home: at MLFLOW_TRACKING_URI if that is set, else PostgreSQL in the production profile, else a SQLite
    database in the home."""
    home = home.resolve()
    uri = os.environ.get("MLFLOW_TRACKING_URI", "") or default_uri(home)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
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
