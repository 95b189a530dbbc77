"""Interim states: what a stage that publishes only its end saves on the way, so that a killed one goes on from there.

An interim state is laid out like a checkpoint and published like one, in the scratch folder of the artifact it leads to: its
manifest names inputs, settings and code of the stage and the sha256 of every file. It holds the weights that a loop trains,
their optimiser, and the metrics the end reports. As with a checkpoint there is no random state to save: order of the data,
masks and dropout are functions of seed and step.
"""

import json
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from realm_core.artifacts.manifest import Manifest, Plan, open_artifact, read_manifest
from realm_core.artifacts.publish import INTERIM, building, scratch_of
from realm_core.errors import ArtifactError, RealmError
from realm_core.model.bundle import load_module, save_module
from realm_core.model.world import World
from realm_core.train.loop import optimizer_file
from realm_core.train.optimizer import load_optimizer_tensors, optimizer_tensors
from realm_core.train.update import DivergedError, Updater

_HISTORY = "history.json"
_ALONE = World()


class History:
    """Metrics of the steps so far: their number, and as many rows as the last tenth of `total` steps can have."""

    def __init__(self, total: int) -> None:
        self.count = 0
        self.rows: deque[dict[str, float]] = deque(maxlen=max(1, total // 10))

    def add(self, row: dict[str, float]) -> None:
        self.count += 1
        self.rows.append(row)

    def means(self) -> dict[str, float]:
        """Mean of every metric over the last tenth of the rows."""
        tail = list(self.rows)[-max(1, self.count // 10) :]
        names = sorted({name for row in tail for name in row})
        return {name: float(np.mean([row[name] for row in tail if name in row])) for name in names}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"count": self.count, "rows": list(self.rows)}) + "\n", encoding="utf-8")

    def load(self, path: Path) -> None:
        values = json.loads(path.read_text(encoding="utf-8"))
        self.count = values["count"]
        self.rows.extend(values["rows"])


class Interim:
    """The interim states of the artifact `final`, one for each of its loops. Methods are collective."""

    def __init__(self, final: Path, plan: Plan, precision: str, world: World = _ALONE) -> None:
        self.folder = scratch_of(final) / INTERIM
        self.plan = replace(plan, stage=f"{plan.stage} interim")
        self.precision, self.world = precision, world
        self.resumed: dict[str, int] = {}  # loop -> the step it went on from
        self.newest: tuple[str, int] | None = None

    def resume(self, name: str, updater: Updater, history: History) -> int:
        """Take up the newest state of loop `name`; returns its step, 0 if there is none.

        A state that is torn, altered or of other inputs, settings or code is removed.
        """
        found: str | None = self.world.lead(lambda: self._find(name))
        if found is None:
            return 0
        manifest = self.world.together(lambda: self._load(self.folder / found, updater, history))
        step = int(manifest.facts["step"])
        self.resumed[name], self.newest = step, (name, step)
        return step

    def save(self, name: str, done: int, updater: Updater, history: History) -> None:
        """Save the state of loop `name` after `done` steps in place of the one before."""
        self.world.require_same(updater.parameters, f"weights of {name} step {done}")
        self.world.lead(lambda: self._write(name, done, updater, history))
        self.newest = name, done

    @contextmanager
    def named_if_diverged(self, rate: str) -> Iterator[None]:
        """Training inside the block that diverges ends with the last good state named, and the setting to lower."""
        try:
            yield
        except DivergedError as problem:
            raise RealmError(f"{problem}; {self._advice(rate)}") from None

    def _advice(self, rate: str) -> str:
        if self.newest is None:
            return f"no interim state was saved before, the same command begins anew; lower {rate}"
        name, step = self.newest
        return (
            f"the last good interim state is that of {name} step {step}, and the same command goes on from it; "
            f"other settings, such as a lower {rate}, begin anew"
        )

    def _find(self, name: str) -> str | None:
        for folder in sorted(self.folder.glob(f"{name}-*"), reverse=True):
            with suppress(ArtifactError):
                manifest = open_artifact(folder)
                if self.plan.describes(manifest) and manifest.facts.get("precision") == self.precision:
                    self._keep_only(folder.name, name)
                    return folder.name
        self._keep_only(None, name)
        return None

    def _load(self, folder: Path, updater: Updater, history: History) -> Manifest:
        for role, module in updater.modules.items():
            load_module(module, _weights(folder, role))
        load_optimizer_tensors(updater.optimizer, load_file(optimizer_file(folder)))
        history.load(folder / _HISTORY)
        return read_manifest(folder)

    def _write(self, name: str, done: int, updater: Updater, history: History) -> None:
        folder = self.folder / f"{name}-{done:07d}"
        with building(folder, self.plan) as build:
            for role, module in updater.modules.items():
                save_module(module, _weights(build.folder, role))
            save_file(optimizer_tensors(updater.optimizer), optimizer_file(build.folder))
            history.save(build.folder / _HISTORY)
            build.commit({"step": done, "precision": self.precision})
        self._keep_only(folder.name, name)

    def _keep_only(self, kept: str | None, name: str) -> None:
        """Remove the other states of a loop, also unfinished ones, and their locks."""
        for entry in [*self.folder.glob(f"{name}-*"), *self.folder.glob(f".{name}-*")]:
            if entry.name != kept:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


class Saved:
    """One loop of training, saved every so many steps. Without an Interim it begins at 0 and saves nothing. Collective."""

    def __init__(self, interim: Interim | None, name: str, every: int, updater: Updater, history: History) -> None:
        self.interim, self.name, self.every, self.updater, self.history = interim, name, every, updater, history
        self.first = interim.resume(name, updater, history) if interim else 0

    def after(self, done: int, *, end: bool = False) -> None:
        """Called with the number of steps done. The end is saved only on request: the artifact usually follows at once.

        Nothing is saved in a row of skipped steps, so that what is named the last good state is one.
        """
        due = end if done == self.updater.total else done % self.every == 0
        if self.interim is not None and due and self.updater.nan_steps == 0:
            self.interim.save(self.name, done, self.updater, self.history)


def _weights(folder: Path, role: str) -> Path:
    return folder / f"{role}.safetensors"
