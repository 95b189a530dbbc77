"""Stage `pretrain`: rolling REALM checkpoints, with the live index swapped in as it moves.

The one stage whose output is a series: each checkpoint is an artifact of its own, published while the run goes on.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from realm_core.artifacts.keys import checkpoint_of
from realm_core.artifacts.lease import Held
from realm_core.artifacts.manifest import QUARANTINED, Manifest, Plan, open_artifact, read_manifest
from realm_core.artifacts.publish import building, read_json_lines
from realm_core.artifacts.store import Store, checkpoint_key, parse_key
from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.errors import ArtifactError, ConfigError, RealmError
from realm_core.evaluate.versions import training_time
from realm_core.index.version import IndexVersion
from realm_core.model.bundle import RealmModel
from realm_core.model.device import resolve
from realm_core.model.world import World
from realm_core.ports import FanOutSink, JsonLinesSink, MetricSink, NullSink, Progress
from realm_core.stages import CODE
from realm_core.stages.processes import launched, world_of
from realm_core.train.follower import IndexFollower
from realm_core.train.guard import CollapseError, CollapseGuard
from realm_core.train.loop import RealmTrainer, optimizer_file, run_steps
from realm_core.train.optimizer import load_optimizer_tensors, optimizer_tensors
from realm_core.train.parts import require_lengths
from realm_core.train.probe import Gain, Probe
from realm_core.train.update import DivergedError

SECTIONS = ("runtime", "model", "lengths", "optimizer", "pretrain")
STEPS = "steps.jsonl"
_ALONE = World()
STARTS = {"ict": "ict", "pretrain": "start"}  # what a run may start from -> its role as a parent


def run(
    config: Config,
    *,
    store: Store,
    training_run: str,
    corpus: Path,
    start: Path,
    sink: MetricSink,
    until: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    lease: Held | None = None,
) -> Manifest:
    """Train run `training_run` up to step `until` (the configured number by default); resumes from its newest checkpoint.

    `start` is an ICT checkpoint, or a REALM checkpoint that training with other settings goes on from, with a new optimiser.
    Step 0 is a checkpoint of its own, equal to the start, so that the first index is made like every other; `until` is one
    too, on the grid of `pretrain.checkpoint_every` or not. The whole takes place under the lease of the run: the caller's,
    or one that is taken here.
    Several processes (see `stages.processes`) share every batch; the first one publishes, logs and is asked to stop.
    Returns the manifest of the last checkpoint. Raises BusyError if somebody else trains this run, RealmError if no index
    goes live in time.
    """
    last = config.pretrain.steps if until is None else until
    if last > config.pretrain.steps:
        raise ConfigError(f"{training_run}: no step {last}; the run ends at pretrain.steps={config.pretrain.steps}")
    with ExitStack() as until_the_end:
        held = [lease] if lease else []

        def begin() -> str:
            if not held:  # the first process holds it for all
                taken = store.training_lease(training_run).hold(f"a trainer of {training_run}", patience=1.0)
                held.append(until_the_end.enter_context(taken))
            if not store.checkpoints(training_run):
                _publish_start(config, store, training_run, corpus, start, sink)
            key = store.checkpoints(training_run)[-1]
            _require_not_collapsed(store, training_run, parse_key(key)[1])
            return key

        if (
            not launched()
            and (manifest := open_artifact(store.path("checkpoints", begin()), "pretrain")).facts["step"] >= last
        ):
            return manifest  # no process has to be started for it
        job = {"home": str(store.home), "training_run": training_run, "corpus": str(corpus), "start": str(start)}
        with world_of(config, "pretrain", **job, until=until) as world:
            newest = store.path("checkpoints", world.lead(begin))
            manifest = open_artifact(newest, "pretrain")
            first = int(manifest.facts["step"])
            if first >= last:
                return manifest
            _require_same_settings(newest, manifest, config)
            share = _Run(config, store, training_run, corpus, newest, sink, world, held[0] if held else None)
            return share.train(first, last, should_stop)


class _Run:
    """One process's share of a training run: from the newest checkpoint to the last step or a stop."""

    def __init__(
        self,
        config: Config,
        store: Store,
        name: str,
        corpus: Path,
        newest: Path,
        sink: MetricSink,
        world: World = _ALONE,
        lease: Held | None = None,
    ) -> None:
        self.config, self.store, self.name, self.corpus, self.newest = config, store, name, corpus, newest
        self.world, self.lease = world, lease
        self.folder = store.trainer(name)
        self.sink = FanOutSink(JsonLinesSink(self.folder / STEPS), sink) if world.leads else NullSink()
        self.device = resolve(config.runtime, shared=True, world=world)
        model = RealmModel.load(newest).to(self.device.torch_device)
        queries = _open_for(model, corpus, newest)
        self.trainer = RealmTrainer(config, model, queries, self.device, world)
        if optimizer_file(newest).exists():
            load_optimizer_tensors(self.trainer.updater.optimizer, load_file(optimizer_file(newest)))
        self.follower = IndexFollower(store, self.folder, self.device, warn=self._warn, world=world)
        watched = config.pretrain
        self.guard = CollapseGuard(watched.guard_window, watched.max_null_probability, watched.guard_utility_steps)
        self.window: list[dict[str, float]] = []
        self.since = 0
        self.seconds, self.stalled = training_time(store, name) if world.leads else (0.0, 0.0)
        self.bar = Progress(f"pretrain {name}", config.pretrain.steps)

    def train(self, first: int, last: int, should_stop: Callable[[], bool]) -> Manifest:
        self.since, self.last = first, last

        def ends() -> bool:
            self._require_lease()  # before a swap or a row of the log is written that would be the successor's
            return should_stop()

        rows = self.world.lead(lambda: read_json_lines(self.folder / STEPS))
        self.follower.resume(first, max((row["step"] for row in rows), default=first))
        self._remember({row["step"]: row for row in rows if row["step"] <= first})

        def index_at(step: int) -> IndexVersion | None:
            limit = self.config.pretrain
            if limit.max_index_age is not None and not self.follower.wait_for_young(
                step, limit.max_index_age, self.name, limit.index_wait_seconds, ends
            ):
                return None
            return self.follower.at(step)

        if self.follower.wait_for_first(self.config.pretrain.index_wait_seconds, ends):
            try:
                run_steps(
                    self.trainer,
                    first,
                    last,
                    index_at=index_at,
                    after=self._after_step,
                    should_stop=lambda: self.world.some(ends()),
                )
            except CollapseError as problem:
                self._require_lease()
                advice = self.world.lead(lambda: self._fall_back(str(problem)))  # all processes saw the same numbers
                raise RealmError(f"{problem}; {advice}") from None
            except DivergedError as problem:
                raise RealmError(
                    f"{problem}; the last good checkpoint is {self.newest.name}, lower the rates"
                ) from None
        return read_manifest(self.newest)

    def _remember(self, before: dict[int, dict[str, Any]]) -> None:
        """What an earlier process saw: the guard's window, and steps without update in a row."""
        for step in sorted(before):
            self.guard.observe(step, before[step])
        skipped = [bool(before[step].get("skipped")) for step in sorted(before, reverse=True)]
        self.trainer.updater.nan_steps = skipped.index(False) if False in skipped else len(skipped)

    def _fall_back(self, reason: str) -> str:
        """Set aside the checkpoints on the way down; says from which one to go on."""
        keys = self.store.checkpoints(self.name)
        good = [key for key in keys if self.guard.trusts(self.store.manifest("checkpoints", key).facts["metrics"])]
        self.store.end_collapsed(self.name, good[-1], reason)
        live = self.store.live()
        stale = live is not None and parse_key(live.index)[0] == self.name and checkpoint_of(live.index) > good[-1]
        return (
            f"the last good checkpoint is {good[-1]}, later ones are set aside"
            + (f", and the live {live.index} is one of those: promote an earlier version" if live and stale else "")
            + f"; warm the encoder up longer in another --home, or {_another_run(self.store, good[-1])}"
        )

    def _after_step(self, done: int, metrics: dict[str, float]) -> None:
        self.window.append(metrics)
        self.seconds += metrics["seconds"]
        self.stalled += metrics["stall_seconds"]
        due = done % self.config.pretrain.checkpoint_every == 0 or done == self.last
        # Not among the metrics of the checkpoint: times differ from run to run, and its digest must not.
        self.sink.log(done, metrics | ({"stalled_share": self.stalled / max(self.seconds, 1e-9)} if due else {}))
        self.guard.observe(done, metrics)
        if self.world.leads:
            self.bar.update(done, f"loss {metrics.get('loss', float('nan')):.3f} age {metrics['index_age']:.0f}")
        if due:
            self._publish(done)

    def _publish(self, step: int) -> None:
        self.world.require_same(self.trainer.updater.parameters, f"weights of step {step}")
        self.world.lead(lambda: self._write(step))
        self.newest, self.window, self.since = self.store.path("checkpoints", checkpoint_key(self.name, step)), [], step

    def _write(self, step: int) -> None:
        index = self.follower.current
        assert index is not None
        parents = {
            "parent": read_manifest(self.newest),
            "corpus": read_manifest(self.corpus),
            "live_index": index.manifest,
        }
        out = self.store.path("checkpoints", checkpoint_key(self.name, step))
        with building(out, _plan(self.config, parents)) as build:
            self.trainer.model.save(build.folder)
            save_file(optimizer_tensors(self.trainer.updater.optimizer), optimizer_file(build.folder))
            facts = {
                "run": self.name,
                "step": step,
                "metrics": _mean(self.window),
                "index_timeline": self.follower.timeline(self.since),
                "precision": self.device.precision,
            }
            seconds = sum(row["seconds"] for row in self.window)
            stalled = sum(row["stall_seconds"] for row in self.window)
            record = {"train_seconds": seconds, "stall_seconds": stalled, "processes": self.world.size}
            self._require_lease()
            build.commit(facts, record=record)
        self.store.prune_checkpoints(self.name, self.config.pretrain.keep, spare=self._worth_keeping())

    def _require_lease(self) -> None:
        if self.lease is not None:  # the first process holds it for the others
            self.lease.require_newest()

    def _worth_keeping(self) -> set[str]:
        """The start, which is the ICT-only baseline, the checkpoint with the highest retrieval utility, and those whose
        index serves this run: a resumed run asks it again."""
        keys = self.store.checkpoints(self.name)
        utility = {key: self.store.manifest("checkpoints", key).facts["metrics"].get("utility") for key in keys}
        known = {key: value for key, value in utility.items() if value is not None}
        best = {max(known, key=lambda key: known[key])} if known else set()
        return {keys[0], *best, *self.follower.in_use}

    def _warn(self, message: str) -> None:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def _open_for(model: RealmModel, corpus: Path, start: Path) -> Corpus:
    queries = Corpus.open(corpus)
    if queries.tokenizer.digest != model.tokenizer.digest:
        raise ArtifactError(f"{corpus}: other vocabulary than {start}; build it with --vocabulary of the first corpus")
    return queries


def _publish_start(config: Config, store: Store, name: str, corpus: Path, start: Path, sink: MetricSink) -> None:
    manifest = open_artifact(start)
    if (start / QUARANTINED).exists():
        raise ArtifactError(f"{start}: set aside after a collapse; start from an earlier checkpoint")
    if manifest.stands_for not in STARTS:
        raise ArtifactError(f"{start}: written by stage {manifest.stage}; start from an ICT or a REALM checkpoint")
    parents = {STARTS[manifest.stands_for]: manifest, "corpus": read_manifest(corpus)}
    out = store.path("checkpoints", checkpoint_key(name, 0))
    with building(out, _plan(config, parents)) as build:
        model = RealmModel.load(start)
        readiness = _require_ready(config, corpus, start, model)
        model.save(build.folder)
        build.commit({"run": name, "step": 0, "metrics": {}, "index_timeline": [], "readiness": readiness})
    if readiness:
        sink.log(0, readiness)


def _require_ready(config: Config, corpus: Path, start: Path, model: RealmModel) -> dict[str, float]:
    """What the probe finds before joint training, which an encoder that ignores documents turns into a collapse.

    A warm-up on this corpus has measured these weights, and warned; others are measured here. Raises ConfigError for an
    encoder that is not ready where the settings ask for one.
    """
    wanted, asked = config.warmup.ready_gain or 0.0, config.pretrain.require_ready
    made = read_manifest(start)
    known = (
        Gain.of(made.facts.get("metrics", {})) if made.parents.get("corpus") == read_manifest(corpus).digest else None
    )
    gain = known or _measure(config, corpus, start, model)
    if gain is not None and gain.reaches(wanted):
        return gain.metrics()
    found = f"{gain.over_null:.2f} +- {gain.error:.2f}" if gain else "an unknown number of"
    told = (
        f"{start}: before joint training the right document adds {found} nats a masked wordpiece, wanted {wanted:.2f}"
    )
    if asked:
        raise ConfigError(f"{told}; raise warmup.steps, or set pretrain.require_ready=false")
    if known is None:
        print(f"warning: {told}: the retriever will learn little; raise warmup.steps", file=sys.stderr, flush=True)
    return gain.metrics() if gain else {}


def _measure(config: Config, corpus: Path, start: Path, model: RealmModel) -> Gain | None:
    queries = _open_for(model, corpus, start)
    require_lengths(model, config)
    device = resolve(config.runtime, shared=True)
    return Probe(queries, config, model.to(device.torch_device)).measure(device)


def _plan(config: Config, parents: dict[str, Manifest]) -> Plan:
    return Plan(stage="pretrain", code=CODE["pretrain"], config_digest=config.digest(*SECTIONS), parents=parents)


def _require_not_collapsed(store: Store, run: str, step: int) -> None:
    if reason := store.collapse(run):
        good = checkpoint_key(run, step)
        raise RealmError(
            f"{store.trainer(run)}: the run has collapsed and would again with the same settings ({reason}); "
            f"the last good checkpoint is {good}; {_another_run(store, good)}"
        )


def _another_run(store: Store, good: str) -> str:
    """The commands that go on in the same home from the last good checkpoint of a run that collapsed."""
    return (
        "lower the rate with realm settings --set pretrain.embedder_lr=… and go on with "
        f"realm pretrain --run NEW --start {store.path('checkpoints', good)}"
    )


def _require_same_settings(folder: Path, manifest: Manifest, config: Config) -> None:
    if manifest.config_digest != config.digest(*SECTIONS):
        run, _ = parse_key(folder.name)
        raise ArtifactError(
            f"{folder}: trained with other settings ({manifest.config_digest[:12]}); "
            f"restore them, or start a new training run beside {run}"
        )


def _mean(window: list[dict[str, float]]) -> dict[str, float]:
    """Means since the last checkpoint, without the times, which differ from run to run."""
    names = sorted({name for row in window for name in row if "seconds" not in name})
    return {
        name: sum(row[name] for row in window if name in row) / sum(name in row for row in window) for name in names
    }
