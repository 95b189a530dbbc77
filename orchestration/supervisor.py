"""Looks after training: a detached trainer that died is started again from its last checkpoint, a few times, then somebody is
told. Segments (`orchestration.segments`) are counted by the same book.

What it knows is in `trainer/RUN/supervision.json`, so that neither a restart of the daemon nor a replayed tick forgets how
often a trainer was started already. A new checkpoint is progress and starts the count anew.
"""

import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Literal

from orchestration import journal, trainer
from realm_core.artifacts.keys import parse_key
from realm_core.artifacts.lease import UNSIGNED, Holder
from realm_core.artifacts.publish import write_durably
from realm_core.artifacts.store import Store
from realm_core.errors import RealmError

_PATIENCE = 40.0  # seconds a restart may take: less than a sensor's own limit of 60


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """What is remembered of one wanted trainer."""

    restarts: int = 0  # since the checkpoint below
    checkpoint: str | None = None  # the newest one at the last start
    gave_up: str | None = None  # why nobody starts it any more


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a look at one trainer found, and what was done."""

    run: str
    state: Literal["runs", "restarted", "killed", "stopped", "finished", "given up", "down", "waits", "unwanted"]
    message: str
    restarts: int = 0
    news: bool = False  # worth an entry in Dagster's event log


def look(store: Store, run: str) -> Finding:
    """State of the trainer of `run`; changes nothing."""
    holder = trainer.state(store.home, run)
    known = supervision(store, run)
    if holder is not None:
        age = f", heartbeat {holder.age(time.time()):.0f} s ago" if holder.heartbeat is not None else ""
        by = holder.by or "a segment or command"
        where = "" if holder.here else f" of {holder.host}"
        process = "a process that begins or ends" if holder.pid == UNSIGNED else f"{by} as process {holder.pid}"
        return Finding(run=run, state="runs", message=f"{process}{where}{age}")
    if known is None:
        return Finding(run=run, state="unwanted", message="no training was started here")
    restarts = since(store, run, known).restarts
    outcome = trainer.outcome(store.home, run)
    if (outcome and outcome["finished"]) or _reached_its_end(store, run):
        return Finding(run=run, state="finished", message="reached its last step", restarts=restarts)
    if trainer.stop_requested(store.home, run):
        return Finding(run=run, state="stopped", message="stopped on request", restarts=restarts)
    if known.gave_up:
        return Finding(run=run, state="given up", message=known.gave_up, restarts=restarts)
    if store.config().supervise.mode == "segments":
        return Finding(run=run, state="waits", message="between two segments", restarts=restarts)
    return Finding(run=run, state="down", message="ended without having been asked to", restarts=restarts)


def tend(store: Store, run: str, beats: dict[str, float]) -> Finding:
    """Look at the trainer of `run` and do what is due. `beats` holds the heartbeats that the last look found too
    old, and is updated.

    A dead trainer is started again; one that died too often is given up with an alert; one whose heart stands still, over
    two looks and for `supervise.stale_seconds`, is killed and started again by the next look.
    """
    if supervision(store, run) is None:
        return look(store, run)
    holder = trainer.state(store.home, run)
    if holder is not None:
        found = _heart(store, run, holder, beats)
        return found or look(store, run)
    beats.pop(run, None)
    found = look(store, run)
    return _restart(store, run) if found.state == "down" else found


def supervision(store: Store, run: str) -> Supervision | None:
    """What is remembered of the trainer of `run`; None if none was ever started."""
    with suppress(OSError, ValueError, TypeError):
        return Supervision(**json.loads((store.trainer(run) / trainer.STARTED).read_text(encoding="utf-8")))
    return None


def since(store: Store, run: str, known: Supervision) -> Supervision:
    """What is known, with the count begun anew if there is a newer checkpoint. A collapse leads back to an older one."""
    keys = store.checkpoints(run)
    newest = keys[-1] if keys else None
    progress = newest is not None and (known.checkpoint is None or newest > known.checkpoint)
    return Supervision(checkpoint=newest) if progress else known


def give_up(store: Store, run: str, known: Supervision, why: str) -> Finding:
    """Nobody starts the training of `run` any more, and somebody is told."""
    message = f"the trainer of {run} is given up: {why}"
    journal.alert(store, "trainer", run, message, restarts=known.restarts, checkpoint=known.checkpoint)
    remember(store, run, replace(known, gave_up=why))
    return Finding(run=run, state="given up", message=message, restarts=known.restarts, news=True)


def remember(store: Store, run: str, known: Supervision) -> None:
    """Write down what is known, before it is acted upon."""
    write_durably(store.trainer(run) / trainer.STARTED, json.dumps(asdict(known)) + "\n")


def _heart(store: Store, run: str, holder: Holder, beats: dict[str, float]) -> Finding | None:
    before, now = beats.pop(run, None), holder.heartbeat
    if now is None or holder.age(time.time()) <= store.config().supervise.stale_seconds:
        return None
    beats[run] = now
    # Too old at two looks: a machine that was asleep, or whose clock was put forward, finds an old heartbeat and a
    # trainer that is well, and that has beaten by the second look.
    ours = holder.by == trainer.DETACHED or store.config().supervise.mode == "segments"
    if before != now or not holder.here or not ours:
        return None
    with suppress(ProcessLookupError):
        os.kill(holder.pid, signal.SIGKILL)
    message = f"process {holder.pid} was alive without a heartbeat for {holder.age(time.time()):.0f} s; killed it"
    return Finding(run=run, state="killed", message=message, news=True)


def _restart(store: Store, run: str) -> Finding:
    folder, limit = store.trainer(run), store.config().supervise.max_restarts
    with trainer.one_at_a_time(folder):
        found, known = look(store, run), supervision(store, run)
        if found.state != "down" or known is None:  # somebody was quicker
            return found
        known = since(store, run, known)
        outcome = trainer.outcome(store.home, run)
        if outcome and outcome["error"]:
            return give_up(store, run, known, f"{outcome['error']} (starting it again does not mend that)")
        if known.restarts >= limit:
            return give_up(
                store, run, known, f"died {limit + 1} times after {known.checkpoint}; see {folder / trainer.LOG}"
            )
        known = replace(known, restarts=known.restarts + 1)
        remember(store, run, known)  # before the start: one that kills this very process is counted too
        try:
            message = trainer.launch(store, run, _PATIENCE)
        except RealmError as problem:
            message = f"could not be started: {problem}"
        message = f"died after {known.checkpoint}; restart {known.restarts} of {limit}: {message}"
        return Finding(run=run, state="restarted", message=message, restarts=known.restarts, news=True)


def _reached_its_end(store: Store, run: str) -> bool:
    """Segments leave no word of their own: the last checkpoint says it."""
    keys = store.checkpoints(run)
    return bool(keys) and parse_key(keys[-1])[1] >= store.config().pretrain.steps
