"""The whole loop on a tiny home, with real processes, and somebody who kills them at random."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg
import psutil

from orchestration import journal, services, trainer
from realm_core.artifacts.manifest import open_artifact
from realm_core.artifacts.publish import read_json_lines
from realm_core.artifacts.store import PRUNED, Store, parse_key
from realm_core.errors import ArtifactError
from tests.orchestration import worlds

SETTINGS = (
    "pretrain.steps=1000000",
    "pretrain.checkpoint_every=25",
    "pretrain.keep=5",
    "pretrain.index_wait_seconds=900",
    "supervise.max_restarts=1000",
    "supervise.heartbeat_seconds=1",
    "supervise.stale_seconds=60",
    "refresh.max_attempts=1000",
)
RUN = "r1"
RUN_WORKER = "--multiprocessing-fork"  # the code server forks off what executes a run
PATIENCE = 900.0  # seconds until the loop must have settled; the machine may be busy


@dataclass
class Loop:
    """A home, its daemon, and what was seen of it."""

    home: Path
    rng: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    seen: dict[str, str] = field(default_factory=dict)  # checkpoint -> digest
    lived: list[str] = field(default_factory=list)  # index digests that were live when we looked
    looks: int = 0

    @classmethod
    def create(cls, folder: Path, seed: int) -> "Loop":
        store = worlds.create(folder / "home", SETTINGS)
        worlds.bootstrap(store)
        services.prepare(store.home)
        return cls(store.home, random.Random(seed))

    @property
    def store(self) -> Store:
        return Store(self.home)

    def begin(self) -> None:
        """Start the daemon, which refreshes step 0, and the trainer, which waits for that index."""
        self.daemon = services.KeptDaemon(self.home, lives=100_000)
        trainer.start(self.home, RUN)

    def check(self) -> None:
        """Nothing torn is live or published, and no checkpoint has disappeared or changed."""
        self.looks += 1
        store = self.store
        live = store.live()
        if live is not None:
            assert open_artifact(store.path("indexes", live.index), "index").digest == live.index_digest
            if live.index_digest not in self.lived[-1:]:
                self.lived.append(live.index_digest)
        names = store.names("checkpoints")
        for key in names:
            digest = store.manifest("checkpoints", key).digest
            assert self.seen.setdefault(key, digest) == digest, f"{key} changed"
        assert set(self.seen) <= set(names), "a checkpoint was lost"
        newest = store.path("checkpoints", names[-1])
        with suppress(ArtifactError if (newest / PRUNED).exists() else ()):
            open_artifact(newest, "pretrain")

    def kill(self) -> str:
        """SIGKILL something that works on this home; what it was."""
        victims = {
            "trainer": self._trainer(),
            "refresh": self._found(RUN_WORKER),
            "code server": self._found("grpc"),
            "daemon": [process for process in [services.daemon_process(self.home)] if process],
        }
        victims["everything"] = [process for group in victims.values() for process in group]
        there = [name for name, group in victims.items() if group]
        # A refresh lasts seconds where a trainer and a daemon last for ever: it is hit when there is one.
        kind = "refresh" if "refresh" in there and self.rng.random() < 0.3 else self.rng.choice(there or ["nothing"])
        for process in victims.get(kind, []):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.kills[kind] += 1
        return kind

    def watch(self, seconds: float) -> None:
        """Let it run for a while, with a look every now and then; a dead daemon is replaced, as `realm up` does."""
        deadline = time.monotonic() + seconds
        while True:
            self.daemon.keep()
            self.check()
            if time.monotonic() > deadline:
                return
            time.sleep(min(0.5, max(0.05, deadline - time.monotonic())))

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, what
            self.watch(0.5)

    def breathe(self) -> None:
        """Nobody kills until the pointer has moved once: what is killed next has got somewhere."""
        moves = len(self.store.live_history())
        self.until(lambda: len(self.store.live_history()) > moves, "no index goes live although nobody kills")

    def settle(self) -> str:
        """Nobody kills any more: training goes on, is ended on request, and its last checkpoint goes live."""
        before = self.store.names("checkpoints")[-1]
        self.until(lambda: self.store.names("checkpoints")[-1] > before, "training does not go on")
        trainer.stop(self.home, RUN, timeout=120.0)
        newest = self.store.names("checkpoints")[-1]
        self.until(lambda: (live := self.store.live()) is not None and live.index == newest, f"{newest} is not live")
        self.until(lambda: not self._under_way(), "runs hang")
        return newest

    def end(self) -> None:
        """Leave no process behind."""
        with suppress(Exception):
            trainer.stop(self.home, RUN, timeout=5.0)
        with suppress(AttributeError):
            self.daemon.stop()
        for process in [*self._trainer(), *self._found(RUN_WORKER), *self._found("grpc")]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def require_whole(self, newest: str) -> None:
        """The chain of checkpoints has no gap, and every index that went live is in the history, once."""
        store = self.store
        steps = [parse_key(key)[1] for key in store.names("checkpoints")]
        assert steps == list(range(0, steps[-1] + 1, 25)), "a checkpoint is missing"
        chain = {store.manifest("checkpoints", key).digest: key for key in store.names("checkpoints")}
        key = newest
        while parent := store.manifest("checkpoints", key).parents.get("parent"):
            assert parent in chain, f"{key}: its parent is not in the store"
            key = chain[parent]
        assert parse_key(key)[1] == 0
        history = store.live_history()
        assert [moved.generation for moved in history] == list(range(1, len(history) + 1))
        assert set(self.lived) <= {moved.index_digest for moved in history}
        live_steps = [parse_key(moved.index)[1] for moved in history]
        assert live_steps == sorted(set(live_steps)), "the pointer went back"
        rows = {row["step"] for row in read_json_lines(store.trainer(RUN) / "steps.jsonl")}
        assert set(range(1, parse_key(newest)[1] + 1)) <= rows, "a step left no row"

    def summary(self, seconds: float) -> str:
        store = self.store
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(self.kills.items()))
        rows = len(read_json_lines(store.trainer(RUN) / "steps.jsonl"))
        last = parse_key(store.names("checkpoints")[-1])[1]
        with dg.DagsterInstance.from_config(str(services.dagster_home(self.home))) as instance:
            runs = Counter(run.status.value for run in instance.get_runs(dg.RunsFilter(job_name="refresh_index")))
        outcomes = ", ".join(f"{name.lower()} {count}" for name, count in sorted(runs.items()))
        return (
            f"{sum(self.kills.values())} kills ({kinds}) in {seconds:.0f} s: {len(self.seen)} checkpoints and none lost, "
            f"{last} steps kept of {rows} run, {len(store.live_history())} promotions, "
            f"{len(read_json_lines(store.trainer(RUN) / 'swaps.jsonl'))} swaps, refreshes: {outcomes}; "
            f"trainer token {store.training_lease(RUN).token()}, {len(self.daemon.generations)} daemons, "
            f"{len(journal.alerts(store))} alerts, {self.looks} looks and nothing torn"
        )

    def _trainer(self) -> list[int]:
        holder = trainer.state(self.home, RUN)
        return [holder.pid] if holder is not None and holder.pid > 0 else []

    def _found(self, word: str) -> list[int]:
        """Dagster's processes of this home whose command line has a word."""
        found = []
        for process in psutil.process_iter(["cmdline", "environ", "status"]):
            words, environment = process.info["cmdline"] or [], process.info["environ"] or {}
            ours = environment.get("REALM_HOME") == str(self.home.resolve())
            if ours and word in words and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        return found

    def _under_way(self) -> list[str]:
        with dg.DagsterInstance.from_config(str(services.dagster_home(self.home))) as instance:
            return [run.run_id for run in instance.get_runs() if not run.is_finished]
