"""The main job, end to end: documents and questions in, a live index with its lineage and a scored reader out.

A real Dagster instance runs beside a detached trainer. Every refresh after the bootstrap is caused by the checkpoint sensor.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
from filelock import FileLock, Timeout

from orchestration import report, services, trainer
from realm_core.artifacts.store import Store, checkpoint_key
from realm_core.config import Config
from realm_core.errors import BusyError, RealmError
from realm_core.evaluate.report import write_report

RUN = "r1"
_SETTLE_SECONDS = 900.0  # how long the last refresh may take after the trainer's last step


def run(home: Path, config: Config, profile: str, corpus: Path, questions: Path) -> dict[str, Any]:
    """Do the main job in `home`, resuming what is there; returns the report that is also written to `home`.

    Raises RealmError with one line for everything an operator can mend. No process outlives the call.
    """
    began = time.monotonic()
    sources = {"corpus": str(corpus.resolve()), "questions": str(questions.resolve())}
    store = Store.create(home, config, sources, profile)
    services.prepare(home)
    lock = FileLock(home / ".main.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(f"{home}: the main job already runs here; wait for it, or pass another --home") from None
    with lock:
        os.environ.update(services.environment(home))
        with dg.DagsterInstance.get() as instance:
            _loop(store, instance)
            result = report.collect(store, RUN, instance, time.monotonic() - began)
        write_report(home, result, report.steps_of(store, RUN))
    return result


def _loop(store: Store, instance: dg.DagsterInstance) -> None:
    home = store.home
    daemon = services.daemon(home)
    with services.running(daemon):
        try:
            _say("bootstrap: corpus shards, questions, ICT checkpoint, sparse baseline")
            execute(home, instance, ["dagster", "job", "execute", "-j", "bootstrap"])
            _retry_failed_refresh(store, instance)
            _say(trainer.start(home, RUN))
            _follow(store, instance, daemon)
        finally:
            trainer.stop(home, RUN)
    for key in dict.fromkeys((checkpoint_key(RUN, 0), store.require_live().index)):
        _say(f"fine-tune and score on {key}")
        select = "qa_reader,qa_result"
        execute(home, instance, ["dagster", "asset", "materialize", "--select", select, "--partition", key])


def execute(home: Path, instance: dg.DagsterInstance, command: list[str]) -> None:
    """Run a Dagster command to its end. A failure is reported in the words of the step that failed."""
    before = time.time()
    service = services.Service("jobs", services.dagster(*command), home)
    with services.running(service):
        while service.process.poll() is None:
            time.sleep(0.2)
    if service.process.returncode != 0:
        raise RealmError(failure_text(instance, before) or f"{' '.join(command)} failed; see {service.log}")


def failure_text(instance: dg.DagsterInstance, since: float) -> str | None:
    """What the first failed step of the newest failed run since `since` (seconds since the epoch) said."""
    filters = dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE])
    for record in instance.get_run_records(filters, limit=1):
        if record.create_timestamp.timestamp() < since - 1:
            continue
        for entry in instance.all_logs(record.dagster_run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE):
            data = entry.dagster_event.step_failure_data if entry.dagster_event else None
            if data and data.user_failure_data and data.user_failure_data.description:
                return data.user_failure_data.description
            if data and data.error:
                error = data.error
                while error.cause is not None:
                    error = error.cause
                return f"{entry.step_key}: {error.message.strip()} (run {record.dagster_run.run_id})"
    return None


def _follow(store: Store, instance: dg.DagsterInstance, daemon: services.Service) -> None:
    """Wait until the trainer is done and its last checkpoint is settled: live, refused, or failed."""
    seen: set[str] = set()
    deadline: float | None = None
    while True:
        daemon.require_alive()
        _tell_news(store, seen)
        running = trainer.alive(store.home, RUN) is not None or not _was_started(store)
        outcome = trainer.outcome(store.home, RUN)  # after the look at the process: it writes this before it ends
        if outcome and outcome["error"]:
            raise RealmError(outcome["error"])
        if outcome is None and not running:
            raise RealmError(
                f"the trainer died; see {store.trainer(RUN) / trainer.LOG}, then run the same command again"
            )
        if outcome is not None:
            deadline = deadline or time.monotonic() + _SETTLE_SECONDS
            if _settled(store, instance, store.names("checkpoints")[-1]):
                return
            if time.monotonic() > deadline:
                raise RealmError(f"the last checkpoint was not refreshed in {_SETTLE_SECONDS:.0f} s; see {daemon.log}")
        elif failed := _first_refresh_failed(store, instance):
            raise RealmError(failed)
        time.sleep(0.5)


def _retry_failed_refresh(store: Store, instance: dg.DagsterInstance) -> None:
    """The sensor asks for a checkpoint once. When a person starts the job again, what failed before gets another try."""
    keys = store.checkpoints(RUN)
    if not keys or store.has("verdicts", keys[-1]):
        return
    runs = instance.get_runs(dg.RunsFilter(tags={"realm/checkpoint": keys[-1]}))
    if runs and all(run.is_finished for run in runs):
        _say(f"refresh {keys[-1]} again")
        tags = {"dagster/partition": keys[-1], "realm/checkpoint": keys[-1]}
        execute(store.home, instance, ["dagster", "job", "execute", "-j", "refresh_index", "--tags", json.dumps(tags)])


def _was_started(store: Store) -> bool:
    lease = store.trainer(RUN) / trainer.LEASE
    return lease.exists() and time.time() - lease.stat().st_mtime > 5


def _settled(store: Store, instance: dg.DagsterInstance, key: str) -> bool:
    live = store.live()
    if live is not None and live.index == key:
        return True
    runs = instance.get_runs(dg.RunsFilter(tags={"realm/checkpoint": key}))
    return bool(runs) and all(run.is_finished for run in runs)


def _first_refresh_failed(store: Store, instance: dg.DagsterInstance) -> str | None:
    """Without a first live index training cannot begin: its failure ends the job instead of a long wait."""
    key = checkpoint_key(RUN, 0)
    if store.live() is not None:
        return None
    runs = instance.get_runs(dg.RunsFilter(tags={"realm/checkpoint": key}))
    if runs and all(run.status == dg.DagsterRunStatus.FAILURE for run in runs):
        return failure_text(instance, 0.0) or f"the first refresh failed: run {runs[0].run_id}"
    return None


def _tell_news(store: Store, seen: set[str]) -> None:
    live = store.live()
    if live is not None and live.index_digest not in seen:
        seen.add(live.index_digest)
        facts = store.manifest("evaluations", live.index).facts["metrics"]
        shown = ", ".join(f"{name} {facts[name]:.3f}" for name in ("recall_at_5", "exact_match") if name in facts)
        _say(f"live: index {live.index} {live.index_digest[:12]} ({shown} on dev)")


def _say(message: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def next_steps(home: Path) -> Mapping[str, str]:
    """Where to look after the job."""
    option = "" if home == Path(".realm") else f" --home {home}"
    return {
        f'realm ask "…"{option}': "an answer with its passage and the index version it came from",
        f"realm lineage{option}": "from the live index down to corpus shards and code",
        f"realm up{option}": "Dagster, its daemon and MLflow in the browser",
    }
