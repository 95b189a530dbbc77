"""Training without a process of its own (`supervise.mode: segments`): one Dagster run after the other, each up to the next
checkpoint. For small machines, for CI, and for machines that are taken away at any time: what is lost is part of a segment.

A segment leaves the manifests of the detached trainer and takes the same lease, so that the mode may change in mid-run.
"""

import json
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import dagster as dg

from orchestration import refreshes, supervisor, trainer
from realm_core.artifacts.keys import checkpoint_key, parse_key
from realm_core.artifacts.publish import write_durably
from realm_core.artifacts.store import Store
from realm_core.errors import BusyError

JOB = "train_segment"
_MEMORY = 200  # runs looked at


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The next thing to train of one training run, or why there is none now."""

    run: str
    reason: str
    key: str | None = None  # the checkpoint it ends with
    run_key: str | None = None


def following(store: Store, run: str) -> str:
    """Key of the checkpoint after the newest one: step 0, then the grid of `pretrain.checkpoint_every`, then the last step."""
    keys, settings = store.checkpoints(run), store.config().pretrain
    if not keys:
        return checkpoint_key(run, 0)
    step = parse_key(keys[-1])[1]
    return checkpoint_key(run, min((step // settings.checkpoint_every + 1) * settings.checkpoint_every, settings.steps))


def take_turn(store: Store, instance: dg.DagsterInstance, run: str) -> Segment:
    """What is to be asked for now. A segment that dies is asked for again, `supervise.max_restarts` times; then an alert."""
    with trainer.one_at_a_time(store.trainer(run)):
        found, known = supervisor.look(store, run), supervisor.supervision(store, run)
        if found.state == "finished":
            _conclude(store, run, None)
        if found.state != "waits" or known is None:
            return Segment(run=run, reason=f"{found.state}: {found.message}")
        key = following(store, run)
        runs = _segments(instance, run)
        if any(refreshes.goes_on(each) for each in runs):
            return Segment(run=run, reason="a segment is queued or runs")
        known = supervisor.since(store, run, known)
        if known.restarts and (why := _hopeless(store, instance, known, runs)):
            _conclude(store, run, why)
            return Segment(run=run, reason=supervisor.give_up(store, run, known, why).message)
        supervisor.remember(store, run, replace(known, restarts=known.restarts + 1))
        (store.trainer(run) / trainer.DONE).unlink(missing_ok=True)
        return Segment(run=run, reason=f"{key} is next", key=key, run_key=f"segment:{key}:{uuid.uuid4().hex[:8]}")


def _segments(instance: dg.DagsterInstance, run: str) -> list[dg.DagsterRun]:
    """Segments of a training run that were asked for, newest first."""
    found = instance.get_runs(dg.RunsFilter(job_name=JOB), limit=_MEMORY)
    return [each for each in found if each.tags.get("dagster/partition", "").rpartition("-s")[0] == run]


def _hopeless(
    store: Store, instance: dg.DagsterInstance, known: supervisor.Supervision, runs: Sequence[dg.DagsterRun]
) -> str | None:
    """Why the segment is not tried again; None if it is. `known.restarts` counts what was asked for already."""
    if runs and runs[0].status == dg.DagsterRunStatus.CANCELED:
        return f"run {runs[0].run_id} was cancelled"
    error, said = refreshes.failure(instance, runs[0].run_id) if runs else (None, None)
    if error not in (None, BusyError.__name__):  # one of the library's own: it would say the same again
        return said
    if known.restarts <= store.config().supervise.max_restarts:
        return None
    return f"its segment after {known.checkpoint} died {known.restarts} times; {said or 'see its runs in Dagster'}"


def _conclude(store: Store, run: str, error: str | None) -> None:
    """Leave the word that a detached trainer leaves when it ends."""
    path = store.trainer(run) / trainer.DONE
    with suppress(OSError):
        if not path.exists():
            write_durably(path, json.dumps({"finished": error is None, "error": error}) + "\n")
