"""A few training steps on a small home, in one process or in several: what the tests of parts and of processes compare."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from realm_core.artifacts.manifest import Manifest
from realm_core.artifacts.store import Store
from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.index.version import IndexVersion, open_version
from realm_core.model.bundle import RealmModel
from realm_core.model.device import resolve
from realm_core.model.dropout import Dropout
from realm_core.model.world import World
from realm_core.params import load_config
from realm_core.ports import MemorySink, MetricSink
from realm_core.stages import finetune, ict
from realm_core.train.ict import train_ict
from realm_core.train.loop import RealmTrainer
from realm_core.train.warmup import warm_up

ALONE = World()
KEY, LATER = "r1-s0000000", "r1-s0000004"
Tensors = dict[str, Tensor]


def settings(*overrides: str) -> Config:
    return load_config(None, "tiny", ["pretrain.max_nan_steps=1", *overrides])


def lively_model(store: Store, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> RealmModel:
    """The model of a home's warm start with larger weights: its vectors differ, so that rounding stays small beside them."""
    model = RealmModel.load(store.newest("ict"))
    for module in (model.retriever, model.encoder):
        module.to(dtype)
        with torch.no_grad():
            for weight in module.parameters():
                if weight.dim() > 1:
                    weight.mul_(5.0)
        set_dropout(module, dropout)
    return model


def set_dropout(module: nn.Module, rate: float) -> None:
    for part in module.modules():
        if isinstance(part, Dropout):
            part.rate = rate
        elif hasattr(part, "dropout") and isinstance(part.dropout, float):
            part.dropout = rate  # of the attention weights


def weights(*modules: nn.Module) -> Tensors:
    return {
        f"{number}/{name}": weight.detach().clone()
        for number, module in enumerate(modules)
        for name, weight in module.named_parameters()
    }


def trained_ict(store: Store, config: Config, world: World = ALONE, **model: Any) -> tuple[Tensors, list[float]]:
    """Weights after `ict.steps` steps, and the loss of each."""
    trained, sink = lively_model(store, **model), MemorySink()
    corpus, device = Corpus.open(store.newest("corpus")), resolve(config.runtime, world=world)
    train_ict(trained, corpus, config, device, sink, world)
    return weights(trained.retriever), [row["ict/loss"] for _, row in sink.rows]


def warmed_up(store: Store, config: Config, world: World = ALONE, **model: Any) -> tuple[Tensors, list[float]]:
    """Weights after `warmup.steps` steps, and the loss of each."""
    trained, sink = lively_model(store, **model), MemorySink()
    corpus, device = Corpus.open(store.newest("corpus")), resolve(config.runtime, world=world)
    warm_up(trained, corpus, config, device, sink, world)
    return weights(trained.encoder), [row["warmup/loss"] for _, row in sink.rows]


def pretrained(
    store: Store, config: Config, world: World = ALONE, *, steps: int = 3, **model: Any
) -> tuple[Tensors, list[float]]:
    """Weights after the first steps of REALM pre-training with the home's first index, and the loss of each.

    The first step has learning rate 0, so they are counted from 1.
    """
    index, trainer = opened_index(store, config, world), realm_trainer(store, config, world, **model)
    losses = [trainer.step(step, index)["loss"] for step in range(1, steps + 1)]
    return weights(trainer.model.retriever, trainer.model.encoder), losses


def realm_trainer(store: Store, config: Config, world: World = ALONE, **model: Any) -> RealmTrainer:
    corpus, device = Corpus.open(store.newest("corpus")), resolve(config.runtime, world=world)
    return RealmTrainer(config, lively_model(store, **model), corpus, device, world)


def opened_index(store: Store, config: Config, world: World = ALONE) -> IndexVersion:
    """The home's first index. The vectors of untrained blocks are near ties: queries are embedded in float64, so that what
    they retrieve does not hang on the rounding that padding costs."""
    made = {"checkpoint": store.path("checkpoints", KEY), "corpus": store.newest("corpus")}
    device = resolve(config.runtime, world=world)
    version = open_version(store.path("indexes", KEY), **made, device=device, world=world)
    version.retriever.double()
    return version


def warm_start(store: Store, out: Path, sink: MetricSink, *overrides: str) -> Manifest:
    """The stage `ict` of a home once more, in another folder."""
    return ict.run(load_config(None, "tiny", overrides), corpus=store.newest("corpus"), out=out, sink=sink)


def dense_reader(store: Store, out: Path, sink: MetricSink, *overrides: str) -> Manifest:
    """The stage `finetune` on the home's second index; the beam is wide because the tiny retriever finds little."""
    return finetune.run(
        load_config(None, "tiny", ["reader.searcher_beam=300", *overrides]),
        index=store.path("indexes", LATER),
        snapshot=store.path("snapshots", LATER),
        checkpoint=store.path("checkpoints", LATER),
        corpus=store.newest("corpus"),
        questions=store.newest("questions"),
        out=out,
        sink=sink,
    )


def farthest(one: Tensors, other: Tensors) -> float:
    """Largest difference between two sets of weights."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def note_shapes(*modules: nn.Module, training: bool = True) -> list[tuple[tuple[int, ...], ...]]:
    """A list that receives the shapes of the tensors the modules are called with from now on, training or not."""
    seen: list[tuple[tuple[int, ...], ...]] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training == training:
            seen.append(tuple(tuple(value.shape) for value in args if isinstance(value, Tensor)))

    for module in modules:
        module.register_forward_pre_hook(note)
    return seen
