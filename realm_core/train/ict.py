"""The inverse cloze task loop: the retriever's warm start (Lee et al. 2019)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.data.batches import rng_for_step, rows_for_step, split_evenly
from realm_core.data.ict import IctExample, ict_arrays, ict_examples
from realm_core.errors import DataError
from realm_core.model.bundle import RealmModel
from realm_core.model.device import Device
from realm_core.model.world import World
from realm_core.ports import MetricSink, Progress
from realm_core.train.contrastive import Pair, contrast
from realm_core.train.interim import History, Interim, Saved
from realm_core.train.parts import parts_of, require_positions, sum_metrics
from realm_core.train.step import at_least_float32
from realm_core.train.update import Updater, seed_dropout

_ALONE = World()


def train_ict(
    model: RealmModel,
    corpus: Corpus,
    config: Config,
    device: Device,
    sink: MetricSink,
    world: World = _ALONE,
    interim: Interim | None = None,
) -> dict[str, float]:
    """Train the retriever in place. Returns means over the last tenth: loss, in-batch accuracy of all pairs, of those whose
    sentence was taken out of the block (`masked_accuracy`) and of the others (`unmasked_accuracy`), the share of the former
    (`removed_share`), and how much of the longest query and document was no padding (`query_fill`, `doc_fill`).
    Goes on from the state in `interim`, if it holds one. Collective; only the first process logs."""
    settings = config.ict
    if len(corpus) < 2:
        raise DataError(f"{corpus.folder}: {len(corpus)} block; the inverse cloze task needs two to choose from")
    require_positions(
        model.retriever.embedder.shape, ict_query=config.lengths.ict_query, document=config.lengths.document
    )
    ict = _Ict(model, corpus, config, device, world)
    bar = Progress("inverse cloze task", settings.steps)
    history = History(settings.steps)
    saved = Saved(interim, "ict", settings.checkpoint_every, ict.updater, history)
    model.retriever.train()
    for step in range(saved.first, settings.steps):
        metrics = ict.step(step)
        if metrics:
            history.add(metrics)
        if metrics and world.leads:
            sink.log(step, metrics)
            bar.update(step + 1, f"loss {metrics['ict/loss']:.3f}")
        saved.after(step + 1, end=config.warmup.steps > 0)
    return history.means()


class _Ict:
    """The steps of the task: each a function of weights, seed, step number and the number of micro-batches."""

    def __init__(self, model: RealmModel, corpus: Corpus, config: Config, device: Device, world: World) -> None:
        self.retriever, self.tokenizer = model.retriever, model.tokenizer
        self.corpus, self.config, self.device, self.world = corpus, config, device, world
        self.parts = parts_of(config.ict, "ict", world)
        self.batch = min(config.ict.batch, len(corpus))
        modules, rates, settings = {"retriever": model.retriever}, {"retriever": config.ict.lr}, config.ict
        self.updater = Updater(
            modules, rates, settings.steps, config.optimizer, world=world, warmup=settings.warmup_steps
        )

    def step(self, step: int) -> dict[str, float]:
        """One update. Returns its metrics; none if fewer than two rows gave an example."""
        seed = self.config.seed
        rows = np.unique(rows_for_step(len(self.corpus), self.batch, step, seed))
        rng = rng_for_step(seed, step, purpose=1)
        drawn = [example for _, example in ict_examples(self.corpus, rows, rng, self.config.ict.mask_rate)]
        if len(drawn) < 2:
            return {}
        mine = [
            (number, part)
            for number, part in self.world.share(list(enumerate(split_evenly(drawn, self.parts))))
            if part or self.device.static
        ]
        arrays = [self._arrays(part) for _, part in mine]
        removed, real = (_flags(arrays, name, self.device) for name in ("removed", "real"))
        self.updater.begin(step)
        found = contrast(
            [self._vectors(batch, step, number) for batch, (number, _) in zip(arrays, mine, strict=True)],
            real,
            total=len(drawn),
            width=self.retriever.embedder.projection_size,
            world=self.world,
        )
        self.updater.note(found.loss)
        self.updater.finish(step)
        self.device.end_step()
        metrics = (
            {"ict/loss": float(found.loss)} | self._accuracies(found.hits, removed, drawn) | self._fill(arrays, drawn)
        )
        return sum_metrics(self.world, [metrics]) | {
            "ict/removed_share": np.mean([each.removed for each in drawn]).item()
        }

    def _accuracies(self, hits: Tensor, removed: Tensor, drawn: Sequence[IctExample]) -> dict[str, float]:
        """This process's share of the accuracy over all pairs, over those whose sentence was taken out of the block, and
        over those whose sentence stayed; what is padding hits nothing."""
        out = sum(example.removed for example in drawn)
        metrics = {"ict/accuracy": float(hits.sum()) / len(drawn)}
        if out:
            metrics["ict/masked_accuracy"] = float(hits[removed].sum()) / out
        if out < len(drawn):
            metrics["ict/unmasked_accuracy"] = float(hits[~removed].sum()) / (len(drawn) - out)
        return metrics

    def _fill(self, arrays: Sequence[dict[str, np.ndarray]], drawn: Sequence[IctExample]) -> dict[str, float]:
        """This process's share of how much of the lengths in the settings is no padding."""
        lengths = {"query": self.config.lengths.ict_query, "doc": self.config.lengths.document}
        words = {side: sum(int(batch[f"{side}_mask"][batch["real"]].sum()) for batch in arrays) for side in lengths}
        return {f"ict/{side}_fill": words[side] / (len(drawn) * length) for side, length in lengths.items()}

    def _arrays(self, part: Sequence[IctExample]) -> dict[str, np.ndarray]:
        """Arrays of a micro-batch, on a device with static shapes as long and as many as they can be."""
        lengths, static = self.config.lengths, self.device.static
        count = -(-self.batch // self.parts) if static else len(part)
        arrays = ict_arrays(part, lengths.ict_query, lengths.document, self.tokenizer, trim=not static, count=count)
        return {**arrays, "real": np.arange(count) < len(part)}

    def _vectors(self, arrays: dict[str, np.ndarray], step: int, number: int) -> Callable[[], Pair]:
        def embed() -> Pair:
            seed_dropout(self.config.seed, "ict", step, number)
            tensors = {name: torch.from_numpy(array).to(self.device.torch_device) for name, array in arrays.items()}
            with self.device.autocast():
                queries = self.retriever.embed_queries(*(tensors[f"query_{part}"] for part in _PARTS))
                documents = self.retriever.embed_documents(*(tensors[f"doc_{part}"] for part in _PARTS))
            return at_least_float32(queries), at_least_float32(documents)

        return embed


def _flags(arrays: Sequence[dict[str, np.ndarray]], name: str, device: Device) -> Tensor:
    """One flag an example over all micro-batches."""
    found = np.concatenate([np.zeros(0, dtype=bool), *(batch[name] for batch in arrays)])
    return torch.from_numpy(found).to(device.torch_device)


_PARTS = ("token_ids", "segment_ids", "mask")
