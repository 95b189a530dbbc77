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

from orchestration import journal, refreshes, report, services, supervisor, trainer
from orchestration.progress import LogProgress
from realm_core.artifacts import corpora
from realm_core.artifacts.keys import checkpoint_of
from realm_core.artifacts.lease import Lease
from realm_core.artifacts.manifest import file_sha256, read_manifest
from realm_core.artifacts.publish import operator_error, storage_trouble
from realm_core.artifacts.store import Store, checkpoint_key
from realm_core.config import Config
from realm_core.errors import ArtifactError, DataError, RealmError
from realm_core.evaluate.report import JSON, write_report
from realm_core.stages import CODE
from realm_core.stages.questions import require_readable
from realm_core.stages.requirements import require_possible

RUN = "r1"
_STOPPED = f"the trainer of {RUN} was asked to stop; run the same command again to go on"
_IDLE_SECONDS = 300.0  # how long no refresh may be under way before the last checkpoint counts as forgotten


def run(
    home: Path, config: Config, profile: str, corpus: Path, questions: Path, pretrain_corpus: Path | None = None
) -> dict[str, Any]:
    """Do the main job in `home`, resuming what is there; returns the report that is also written to `home`.

    Masked queries are drawn from `pretrain_corpus`, or from `corpus` where that is None.
    Where everything is done already, the report of that time is returned. Raises RealmError with one line for everything
    an operator can mend. No process that the call starts outlives it.
    """
    began = time.monotonic()
    sources = {"corpus": str(corpus.resolve()), "questions": str(questions.resolve())}
    if pretrain_corpus is not None:
        sources["pretrain_corpus"] = str(pretrain_corpus.resolve())
    if not (home / "home.json").exists():
        require_possible(config)
        require_readable(config, questions)
    held = _alone_in(home)
    try:
        store = Store.create(home, config, sources, profile)
        _require_same_sources(store)
        services.prepare(home)
        if (done := _finished_report(store)) is not None:
            _say(f"all done before: {done['live']['checkpoint']} is live, {len(done['index_versions'])} index versions")
            return done
        require_possible(config)  # a home that was begun elsewhere goes on here
        os.environ.update(services.environment(home))
        with dg.DagsterInstance.get() as instance:
            _loop(store, instance)
            result = report.collect(store, RUN, instance, time.monotonic() - began)
        write_report(home, result, report.steps_of(store, RUN))
        return result
    except RealmError:
        raise
    except Exception as error:  # what databases say of a full disk names no place
        if trouble := storage_trouble(error, home):
            raise ArtifactError(trouble) from error
        raise
    finally:
        os.close(held)


def _alone_in(home: Path) -> int:
    """Take the lease of the main job on a home, which is created for it. Raises BusyError if another one runs there."""
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise operator_error(error, home) from None
    lease = Lease(home / ".main.json")
    held = lease.take("the main job", patience=0.2)
    lease.sign(held, os.getpid())
    return held


def _require_same_sources(store: Store) -> None:
    """A training run stands on one corpus: a source that changed under a home is an error, not half a new home."""
    from realm_core.stages.corpus import require_same_source

    if store.names("corpus"):
        require_same_source(corpora.first(store), store.source("corpus"), store.home)
    roles = {"pretrain_corpus": "documents", "questions": "questions"}
    for kind, role in roles.items():
        if not store.names(kind) or not store.has_source(kind):
            continue
        path = store.source(kind)
        if read_manifest(store.newest(kind)).sources[role] != file_sha256(path):
            raise DataError(f"{path}: changed since {store.home} was made from it; restore it or pass another --home")


def _finished_report(store: Store) -> dict[str, Any] | None:
    """The report in the home, if nothing is left to do there for the code that runs now."""
    try:
        found = json.loads((store.home / JSON).read_text(encoding="utf-8"))
        live, last = store.require_live(), checkpoint_key(RUN, store.config().pretrain.steps)
        needed = [("checkpoints", last), *(("results", key) for key in ("bm25", checkpoint_key(RUN, 0), live.index))]
        made = [store.manifest(kind, name) for kind, name in needed]
        made += [read_manifest(store.newest(kind)) for kind in ("corpus", "questions", "ict", "sparse_readers")]
        current = all(manifest.code == CODE[manifest.stage] for manifest in made)
        settled = store.has("verdicts", last) and trainer.alive(store.home, RUN) is None
        return found if current and settled and found["live"]["index_digest"] == live.index_digest else None
    except (OSError, ValueError, KeyError, TypeError, RealmError):
        return None


def _loop(store: Store, instance: dg.DagsterInstance) -> None:
    home = store.home
    services.end_orphaned_job(home)
    daemon = services.KeptDaemon(home)
    with services.running(daemon):
        try:
            _say("bootstrap: corpus shards, questions, ICT checkpoint, sparse baseline")
            execute(home, instance, ["dagster", "job", "execute", "-j", "bootstrap"])
            _retry_failed_refresh(store, instance)
            _say(trainer.start(home, RUN))
            _follow(store, instance, daemon)
        finally:
            with services.undisturbed():
                trainer.stop(home, RUN)
    for key in dict.fromkeys((checkpoint_key(RUN, 0), store.require_live().index)):
        _say(f"fine-tune and score on {key}")
        select = "qa_reader,qa_result"
        try:
            instance.add_dynamic_partitions("realm_ckpt", [key])  # that of an index which a command made
            execute(home, instance, ["dagster", "asset", "materialize", "--select", select, "--partition", key])
        except RealmError as problem:  # a start too weak to be tuned costs its row of the report, not the report
            _say(f"warning: no reader on {key}: {problem}")


def execute(home: Path, instance: dg.DagsterInstance, command: list[str]) -> None:
    """Run a Dagster command to its end. A failure is reported in the words of the step that failed."""
    before = time.time()
    service = services.job(home, command)
    progress = LogProgress(service.log, _say)
    with services.running(service):
        while service.process.poll() is None:
            progress.tell()
            time.sleep(0.2)
    if service.process.returncode != 0:
        raise RealmError(_failure_since(instance, before) or f"{' '.join(command)} failed; see {service.log}")


def _failure_since(instance: dg.DagsterInstance, since: float) -> str | None:
    """What the newest failed run since `since` (seconds since the epoch) said; those of the sensor are not ours."""
    filters = dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE])
    for record in instance.get_run_records(filters, limit=20):
        run = record.dagster_run
        if record.create_timestamp.timestamp() >= since - 1 and report.SENSOR_TAG not in run.tags:
            return failure_text(instance, run.run_id)
    return None


def failure_text(instance: dg.DagsterInstance, run_id: str) -> str | None:
    """What the first failed step of a run said."""
    return refreshes.failure(instance, run_id)[1]


def _follow(store: Store, instance: dg.DagsterInstance, daemon: services.KeptDaemon) -> None:
    """Wait until the trainer is done and its last checkpoint is settled: live, refused, or failed for good."""
    seen = {f"{alert['time']} {alert['message']}" for alert in journal.alerts(store)}
    progress = LogProgress(store.trainer(RUN) / trainer.LOG, _say)
    deadline: float | None = None
    dead_since: float | None = None
    while True:
        if news := daemon.keep():
            _say(news)
        _tell_news(store, seen)
        progress.tell()
        running = trainer.alive(store.home, RUN) is not None
        outcome = trainer.outcome(store.home, RUN)  # after the look at the process: it writes this before it ends
        if outcome and outcome["error"]:
            raise RealmError(outcome["error"])
        dead_since = _wait_for_restart(store, dead_since) if outcome is None and not running else None
        if outcome is not None:
            if not outcome["finished"]:
                raise RealmError(_STOPPED)
            last = store.checkpoints(RUN)[-1]
            if _settled(store, instance, last) and not _tried_again(store, instance, last):
                return
            # A refresh takes as long as the corpus is large; only a loop in which nothing happens is given up.
            deadline = time.monotonic() + _IDLE_SECONDS if deadline is None or _refreshing(instance) else deadline
            if time.monotonic() > deadline:
                raise RealmError(
                    f"no refresh of the last checkpoint began in {_IDLE_SECONDS:.0f} s; see {daemon.log}, "
                    "then run the same command again"
                )
        elif (failed := _first_refresh_failed(store, instance)) and not _tried_again(
            store, instance, checkpoint_key(RUN, 0)
        ):
            raise RealmError(failed)
        time.sleep(0.5)


def _wait_for_restart(store: Store, since: float | None) -> float | None:
    """When the trainer was first found dead; None if it is meant to be dead. Raises RealmError if nobody starts it again."""
    now, state = time.monotonic(), supervisor.look(store, RUN).state
    if state in ("waits", "finished"):  # between two segments
        return None
    if state == "stopped":  # in the middle of a step that took too long, or by segments
        raise RealmError(_STOPPED)
    if since is None:
        _say("the trainer is down; trainer_health_sensor starts it again from its last checkpoint")
        return now
    if state == "given up" or now - since > _IDLE_SECONDS:
        raise RealmError(f"the trainer died; see {store.trainer(RUN) / trainer.LOG}, then run the same command again")
    return since


def _tried_again(store: Store, instance: dg.DagsterInstance, key: str) -> bool:
    """Whether the sensor will ask for this refresh once more."""
    runs = refreshes.history(instance).get(key, [])
    return refreshes.stands(store, instance, key, runs).state == "failed"


def _retry_failed_refresh(store: Store, instance: dg.DagsterInstance) -> None:
    """The sensor asks for a checkpoint once. When a person starts the job again, what failed before gets another try."""
    keys = store.checkpoints(RUN)
    if not keys or store.has("verdicts", keys[-1]):
        return
    runs = instance.get_runs(dg.RunsFilter(tags={"realm/checkpoint": keys[-1]}))
    if runs and not any(refreshes.goes_on(run) for run in runs):
        _say(f"refresh {keys[-1]} again")
        tags = {"dagster/partition": keys[-1], "realm/checkpoint": keys[-1]}
        execute(store.home, instance, ["dagster", "job", "execute", "-j", "refresh_index", "--tags", json.dumps(tags)])


def _settled(store: Store, instance: dg.DagsterInstance, key: str) -> bool:
    """Whether the refresh of this checkpoint has ended; the last run too, whose end comes after the pointer's move."""
    live = store.live()
    runs = instance.get_runs(dg.RunsFilter(tags={"realm/checkpoint": key}))
    asked = bool(runs) or (live is not None and checkpoint_of(live.index) == key)
    return asked and not any(refreshes.goes_on(run) for run in runs)


def _refreshing(instance: dg.DagsterInstance) -> bool:
    """Whether some refresh is queued, running, or due for another try."""
    return any(refreshes.goes_on(run) for run in instance.get_runs(dg.RunsFilter(job_name="refresh_index"), limit=5))


def _first_refresh_failed(store: Store, instance: dg.DagsterInstance) -> str | None:
    """Without a first live index training cannot begin: its failure ends the job instead of a long wait."""
    key = checkpoint_key(RUN, 0)
    if store.live() is not None:
        return None
    runs = instance.get_runs(dg.RunsFilter(tags={"realm/checkpoint": key}))
    if runs and not any(refreshes.goes_on(run) or run.is_success for run in runs):
        return failure_text(instance, runs[0].run_id) or f"the first refresh failed: run {runs[0].run_id}"
    return None


def _tell_news(store: Store, seen: set[str]) -> None:
    """Say what went live, and what alerts were raised since `seen` was begun."""
    live = store.live()
    for alert in journal.alerts(store):
        if (mark := f"{alert['time']} {alert['message']}") not in seen:
            seen.add(mark)
            _say(f"alert: {alert['message']}")
    if live is not None and live.index_digest not in seen:
        seen.add(live.index_digest)
        scored = store.has("evaluations", live.index)
        facts = store.manifest("evaluations", live.index).facts["metrics"] if scored else {}
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
