"""REALM pre-training: steps, index swaps at their borders, rolling checkpoints (Guu et al. 2020, section 3)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.data.batches import rng_for_step, rows_for_step, split_evenly
from realm_core.data.candidates import near_duplicates, runs_of
from realm_core.data.masking import MaskedQuery, empty_query
from realm_core.errors import DataError
from realm_core.index.version import IndexVersion
from realm_core.model.bundle import RealmModel
from realm_core.model.device import Device
from realm_core.model.world import World
from realm_core.train.features import RealmBatch, choose_candidates, draw_queries, realm_batch
from realm_core.train.parts import parts_of, require_positions, sum_metrics
from realm_core.train.step import Whole, realm_step
from realm_core.train.update import Updater, seed_dropout


@dataclass
class RealmTrainer:
    """Model, optimiser and the data order of one run. Every step is a function of weights, optimiser state, seed, step
    number, index version and the number of micro-batches, which is what makes an exact resume possible."""

    config: Config
    model: RealmModel
    corpus: Corpus
    device: Device
    world: World = field(default_factory=World)

    def __post_init__(self) -> None:
        settings, lengths = self.config.pretrain, self.config.lengths
        self.parts = parts_of(settings, "pretrain", self.world)
        require_positions(self.model.retriever.embedder.shape, query=lengths.query, document=lengths.document)
        require_positions(self.model.encoder.shape, joint=lengths.joint)
        self.updater = Updater(
            {"retriever": self.model.retriever, "encoder": self.model.encoder},
            {"retriever": settings.embedder_lr, "encoder": settings.lr},
            settings.steps,
            self.config.optimizer,
            settings.max_nan_steps,
            self.world,
            settings.warmup_steps,
        )
        self.model.retriever.checkpointing = self.model.encoder.checkpointing = settings.checkpointing
        self.rows = usable_rows(self.corpus, settings.masking)

    def step(self, step: int, index: IndexVersion) -> dict[str, float]:
        """One update with candidates from `index`, over all processes: collective. Returns the metrics of the step; empty if
        no query could be drawn."""
        queries = self._draw(step)
        if not queries:
            return {}
        whole = Whole.of(queries)
        mine = self.world.share(list(enumerate(split_evenly(queries, self.parts))))
        batches = self._batches([self._filled(part) for _, part in mine], index)
        self.model.train()
        self.updater.begin(step)
        found = []
        for (number, _), batch in zip(mine, batches, strict=True):
            seed_dropout(self.config.seed, "pretrain", step, number)
            if batch is not None:
                result = realm_step(self.model, batch, self.config.pretrain.marginal, self.device, whole)
                self.updater.add(result.loss)
                found.append(result.metrics)
        updated = self.updater.finish(step)
        self.device.end_step()
        metrics = sum_metrics(self.world, found)
        return metrics if updated else {"skipped": 1.0}

    def _draw(self, step: int) -> list[MaskedQuery]:
        """The queries of the whole batch, the same in every process."""
        settings = self.config.pretrain
        places = rows_for_step(len(self.rows), settings.batch, step, self.config.seed)
        return draw_queries(
            self.corpus,
            self.rows[places].tolist(),
            rng_for_step(self.config.seed, step, purpose=3),
            scheme=settings.masking,
            query_len=self.config.lengths.query,
            max_masks=self.config.max_masks,
            tokenizer=self.model.tokenizer,
        )

    def _filled(self, part: Sequence[MaskedQuery]) -> list[MaskedQuery]:
        """The queries of a micro-batch, on a device with static shapes as many of them as it can have."""
        missing = self.config.pretrain.batch // self.parts - len(part) if self.device.static else 0
        return [*part, *(empty_query() for _ in range(missing))]

    def _batches(self, parts: Sequence[Sequence[MaskedQuery]], index: IndexVersion) -> list[RealmBatch | None]:
        """Tensors of this process's micro-batches, with their candidates; None for one without queries. Collective."""
        self.config.require_fits(len(index.corpus), "pretrain.candidates")
        length = self.config.lengths.query
        # Embedded by micro-batch, so that what a query retrieves does not depend on who else this process asks for.
        vectors = [index.embed([query.token_ids for query in part], length) for part in parts]
        _, retrieved = index.search_vectors(np.concatenate(vectors), self._width(index))
        ends = np.cumsum([len(part) for part in parts])[:-1]
        return [
            self._batch(part, rows, index) if part else None
            for part, rows in zip(parts, np.split(retrieved, ends), strict=True)
        ]

    def _batch(self, queries: Sequence[MaskedQuery], retrieved: np.ndarray, index: IndexVersion) -> RealmBatch:
        settings, lengths = self.config.pretrain, self.config.lengths
        own = [self.corpus.block_ids[query.row] if len(query.targets) else "" for query in queries]
        return realm_batch(
            index.corpus,
            queries,
            choose_candidates(index.corpus, own, retrieved, settings.candidates, self._repeats(queries, index.corpus)),
            query_len=lengths.query,
            doc_len=lengths.document,
            tokenizer=self.model.tokenizer,
            device=self.device,
            max_masks=self.config.max_masks,
            count=settings.candidates,
        )

    def _width(self, index: IndexVersion) -> int:
        """How many blocks to ask for: more than candidates, because the block a query came from is dropped, and texts that
        occur twice are taken once. The original code asks for just as many, and throws away a query that finds a text twice.
        """
        return min(len(index.corpus), 2 * self.config.pretrain.candidates)

    def _repeats(self, queries: Sequence[MaskedQuery], documents: Corpus) -> Callable[[int, int], bool]:
        """Whether a document repeats the block that a query (by number) came from; never, if only identity counts."""
        settings = self.config.pretrain
        if settings.trivial == "uid":
            return lambda number, row: False
        ids = [self.corpus.token_ids(query.row) if len(query.targets) else query.token_ids for query in queries]
        own, share = [runs_of(each) for each in ids], settings.near_duplicate_share
        return lambda number, row: near_duplicates(own[number], runs_of(documents.token_ids(row)), share)


def usable_rows(corpus: Corpus, masking: str) -> np.ndarray:
    """Rows a masked query can be drawn from. Raises DataError if there is none."""
    if masking != "salient":
        return np.arange(len(corpus))
    rows = np.flatnonzero(corpus.lengths("span_bounds"))
    if len(rows) == 0:
        raise DataError(f"{corpus.folder}: no block has a salient span; choose pretrain.masking=random_span")
    return rows


def run_steps(
    trainer: RealmTrainer,
    first: int,
    last: int,
    *,
    index_at: Callable[[int], IndexVersion | None],
    after: Callable[[int, dict[str, float]], None],
    should_stop: Callable[[], bool],
) -> int:
    """Steps first .. last-1; `after(done, metrics)` is called with the number of steps done. Returns that number at the end.

    `index_at` may wait for the index that is to serve a step; it gives None if training was asked to stop meanwhile.
    """
    for step in range(first, last):
        if should_stop():
            return step
        began = time.perf_counter()
        index = index_at(step)
        if index is None:
            return step
        stalled = time.perf_counter() - began
        metrics = trainer.step(step, index)
        metrics |= {
            "index_age": float(step - index.step),
            "seconds": time.perf_counter() - began,
            "stall_seconds": stalled,
        }
        after(step + 1, metrics)
    return last


def optimizer_file(folder: Path) -> Path:
    """Where a checkpoint keeps the optimiser's state."""
    return folder / "optimizer.safetensors"
