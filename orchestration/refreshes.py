"""How the refreshes of checkpoints stand, from Dagster's runs and the store: under way, done, refused, failed, given up.

A refusal is for good: the same vectors get the same verdict. A failure is tried again, `refresh.max_attempts` times in all.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import dagster as dg
from filelock import FileLock, Timeout

from realm_core.artifacts.keys import checkpoint_of, parse_key
from realm_core.artifacts.manifest import read_manifest
from realm_core.artifacts.store import Store
from realm_core.errors import ConfigError, DataError, GateError, RealmError

JOB, TAG = "refresh_index", "realm/checkpoint"
SUPERSEDED_BY = "realm/superseded_by"
ERROR = "error"  # metadata of a failed step: the name of the library's error
_FOR_GOOD = {error.__name__ for error in (GateError, ConfigError, DataError)}
UNDER_WAY = [
    status
    for status in dg.DagsterRunStatus
    if status not in (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
]
_MEMORY = 200  # runs looked at: more than any two ticks leave between them


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """How the refresh of one checkpoint stands."""

    state: Literal["new", "under way", "done", "refused", "failed", "given up", "cancelled"]
    why: str = ""
    attempts: int = 0  # that were asked for; the daemon's own second try of a killed run belongs to its first


def history(instance: dg.DagsterInstance) -> dict[str, list[dg.DagsterRun]]:
    """Checkpoint key -> its refresh runs, newest first."""
    runs: dict[str, list[dg.DagsterRun]] = defaultdict(list)
    for run in instance.get_runs(dg.RunsFilter(job_name=JOB), limit=_MEMORY):
        if key := run.tags.get("dagster/partition") or run.tags.get(TAG):
            runs[key].append(run)
    return runs


def runs_being_refreshed(instance: dg.DagsterInstance) -> set[str]:
    """Training runs with a refresh that is queued or running."""
    under_way = instance.get_runs(dg.RunsFilter(job_name=JOB, statuses=UNDER_WAY))
    return {run.tags.get("dagster/partition", "").rpartition("-s")[0] for run in under_way}


def goes_on(run: dg.DagsterRun) -> bool:
    """Whether the run is under way, or failed and will be tried once more by the daemon."""
    retry_is_due = run.tags.get("dagster/will_retry") == "true" and "dagster/auto_retry_run_id" not in run.tags
    return not run.is_finished or retry_is_due


def stands(store: Store, instance: dg.DagsterInstance, key: str, runs: Sequence[dg.DagsterRun]) -> Refresh:
    """How the refresh of `key` stands, given its runs, newest first."""
    attempts = sum("dagster/parent_run_id" not in run.tags for run in runs)
    if any(goes_on(run) for run in runs):
        return Refresh(state="under way", attempts=attempts)
    if refused := refusal(store, key):
        return Refresh(state="refused", why=refused, attempts=attempts)
    if any(run.is_success for run in runs) or _was_promoted(store, key):
        return Refresh(state="done", attempts=attempts)
    if not runs:
        return Refresh(state="done" if store.has("evaluations", key) else "new")
    last = runs[0]
    if last.status == dg.DagsterRunStatus.CANCELED:
        return Refresh(state="cancelled", why=f"run {last.run_id} was cancelled", attempts=attempts)
    error, said = failure(instance, last.run_id)
    why = said or f"run {last.run_id} died"
    if error in _FOR_GOOD:
        return Refresh(state="refused", why=why, attempts=attempts)
    given_up = attempts >= store.config().refresh.max_attempts
    return Refresh(state="given up" if given_up else "failed", why=why, attempts=attempts)


def refusal(store: Store, key: str) -> str | None:
    """What the verdict holds against the index of `key`; None if there is no verdict, or it passed."""
    with suppress(RealmError):
        if store.has("verdicts", key) and not (facts := store.manifest("verdicts", key).facts)["passed"]:
            findings = facts.get("findings", {}).items()
            failed = [f"{name} {finding['found']}" for name, finding in findings if not finding["passed"]]
            return f"its verdict: {', '.join(failed)}"
    return None


def failure(instance: dg.DagsterInstance, run_id: str) -> tuple[str | None, str | None]:
    """(name of the library's error if it was one, what the first failed step said) of a run."""
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_FAILURE):
        data = entry.dagster_event.step_failure_data if entry.dagster_event else None
        if data and data.user_failure_data and data.user_failure_data.description:
            named = data.user_failure_data.metadata.get(ERROR)
            return (str(named.value) if named else None), data.user_failure_data.description
        if data and data.error:
            error = data.error
            while error.cause is not None:
                error = error.cause
            return None, f"{entry.step_key}: {error.message.strip()} (run {run_id})"
    return None, None


def pays_to_supersede(store: Store, running: str, newest: str) -> bool:
    """Whether cancelling the refresh of `running` for `newest` makes the served index younger on average.

    With L the live step, R the running one, N the newest, and a share p of the blocks embedded: letting R finish serves L
    for (1-p)T and R for T more; cancelling serves L for T and then N. The second is younger if p < (N-R)/(N-L). Every
    further checkpoint raises N-L, so that a run cannot be put off for ever. False once all blocks are embedded.
    """
    live = store.live()
    (run, old), (_, new) = parse_key(running), parse_key(newest)
    if live is None or parse_key(live.index)[0] != run or store.has("snapshots", running):
        return False
    return embedded_share(store, running) < (new - old) / (new - parse_key(live.index)[1])


def embedded_share(store: Store, key: str) -> float:
    """Share of the newest corpus' shards that a pass under way has behind it."""
    with suppress(OSError, ValueError, KeyError, RealmError):
        done = json.loads((store.home / "snapshots" / f".{key}.partial" / ".done.json").read_text(encoding="utf-8"))
        return len(done["shards"]) / max(1, len(read_manifest(store.newest("corpus")).facts["shards"]))
    return 0.0


def drop_partial_snapshots(store: Store, keys: Iterable[str]) -> None:
    """Remove what superseded passes had embedded: nobody will go on with it."""
    for key in keys:
        scratch = store.home / "snapshots" / f".{key}.partial"
        with suppress(Timeout, OSError), FileLock(scratch.with_name(f".{key}.lock"), timeout=0):
            shutil.rmtree(scratch, ignore_errors=True)


def superseded(runs: Mapping[str, Sequence[dg.DagsterRun]]) -> list[str]:
    """Keys whose last refresh was cancelled for a newer checkpoint."""
    return [
        key
        for key, group in runs.items()
        if group[0].status == dg.DagsterRunStatus.CANCELED and SUPERSEDED_BY in group[0].tags
    ]


def _was_promoted(store: Store, key: str) -> bool:
    live = store.live()
    return live is not None and checkpoint_of(live.index) == key
