"""How stale an index is: what the retriever would return now against what the index returns, and how old it is."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from realm_core.artifacts.manifest import Manifest, read_manifest
from realm_core.corpus.shards import Corpus
from realm_core.data.formats import Ids
from realm_core.errors import ConfigError
from realm_core.index.recall import displacement, overlap
from realm_core.index.version import open_version, snapshot_of
from realm_core.model.device import Device
from realm_core.train.update import seed_of

Drift = dict[str, int | float]
MEASURES = (
    "top_k_overlap",
    "cosine_mean",
    "cosine_min",
    "distance_mean",
    "relative_distance",
    "age_steps",
    "age_seconds",
)
_BLOCKS = 65536  # blocks whose vectors are compared: means over more would not change


def index_drift(
    *,
    old_rows: Int[Tensor, "Q k"] | Int[ndarray, "Q k"] | None = None,
    new_rows: Int[Tensor, "Q k"] | Int[ndarray, "Q k"] | None = None,
    old_vectors: Float[Tensor, "N D"] | Float[ndarray, "N D"] | None = None,
    new_vectors: Float[Tensor, "N D"] | Float[ndarray, "N D"] | None = None,
    index_step: int | None = None,
    trainer_step: int | None = None,
    built_at: float | None = None,
    now: float | None = None,
) -> Drift:
    """Every measure whose two sides are given.

    `top_k_overlap` of two searches for the same queries, the measures of `displacement` for the same blocks (old: the
    encoder behind the index, new: the encoder now), `age_steps` in optimiser steps and `age_seconds`. A clock that went
    back counts as age 0.
    """
    drift: Drift = {}
    if old_rows is not None and new_rows is not None:
        drift["top_k_overlap"] = overlap(old_rows, new_rows)
    if old_vectors is not None and new_vectors is not None:
        drift.update(displacement(old_vectors, new_vectors))
    if index_step is not None and trainer_step is not None:
        if trainer_step < index_step:
            raise ConfigError(f"index of step {index_step} under a trainer at step {trainer_step}; it is another run's")
        drift["age_steps"] = trainer_step - index_step
    if built_at is not None and now is not None:
        drift["age_seconds"] = max(0.0, now - built_at)
    return drift


@dataclass(frozen=True, kw_only=True)
class Version:
    """The folders that make up one index version."""

    index: Path
    snapshot: Path
    checkpoint: Path
    corpus: Path


def drift_between(old: Version, new: Version, *, queries: int, k: int, length: int, seed: int, device: Device) -> Drift:
    """How far two index versions lie apart, over the blocks that both corpora hold.

    `top_k_overlap`: both are asked the same `queries` sentences, each embedded by the version's own query tower, cut to
    `length` wordpieces; the share of the `k` best blocks in common. The sentences are the same for as long as the older
    corpus is. Displacement: the vectors of the same blocks, at most 65 536 of them, evenly spread. Raises ArtifactError
    if a file of either version is altered or gone.
    """
    opened = [
        open_version(side.index, checkpoint=side.checkpoint, corpus=side.corpus, device=device) for side in (old, new)
    ]
    before, after = (version.corpus for version in opened)
    probes = probe_sentences(before, queries, seed)
    k = min(k, len(before), len(after))
    old_rows, new_rows = (version.search(probes, k, length) for version in opened)
    shared_old, shared_new = shared_rows(before, after)
    drift: Drift = {
        "probes": len(probes),
        "k": k,
        "top_k_overlap": block_overlap(before, after, old_rows, new_rows),
        "shared_blocks": len(shared_old),
    }
    vectors = [snapshot_of(side.snapshot, corpus) for side, corpus in ((old, before), (new, after))]
    if len(shared_old) and vectors[0].dimension == vectors[1].dimension:
        chosen = np.unique(np.linspace(0, len(shared_old) - 1, min(len(shared_old), _BLOCKS)).astype(np.int64))
        drift |= displacement(vectors[0].rows(shared_old[chosen]), vectors[1].rows(shared_new[chosen]))
    return drift


def probe_sentences(corpus: Corpus, count: int, seed: int) -> list[Ids]:
    """The first sentences of `count` blocks, as wordpieces; a corpus and a seed always give the same ones."""
    rng = np.random.default_rng(seed_of(seed, "drift"))
    chosen = np.sort(rng.choice(len(corpus), size=min(count, len(corpus)), replace=False))
    sentences: list[Ids] = []
    for row in chosen.tolist():
        tokens, starts = corpus.token_ids(row), corpus.sentence_starts(row)
        sentences.append(tokens[: starts[1]] if len(starts) > 1 else tokens)
    return sentences


def shared_rows(before: Corpus, after: Corpus) -> tuple[Int[ndarray, "S"], Int[ndarray, "S"]]:
    """Rows of the blocks that both corpora hold, in the one and in the other; blocks are told by their identity."""
    if _same(before, after):
        rows = np.arange(len(before))
        return rows, rows
    _, old, new = np.intersect1d(before.block_ids, after.block_ids, return_indices=True)
    order = np.argsort(old, kind="stable")
    return old[order], new[order]


def block_overlap(before: Corpus, after: Corpus, old_rows: Int[ndarray, "Q k"], new_rows: Int[ndarray, "Q k"]) -> float:
    """`overlap` of two result lists whose rows count in different corpora."""
    if _same(before, after):
        return overlap(old_rows, new_rows)
    ids = np.concatenate([before.block_ids[old_rows], after.block_ids[new_rows]])
    _, numbered = np.unique(ids, return_inverse=True)
    old, new = numbered.reshape(ids.shape)[: len(old_rows)], numbered.reshape(ids.shape)[len(old_rows) :]
    return overlap(old, new)


def _same(before: Corpus, after: Corpus) -> bool:
    return read_manifest(before.folder).digest == read_manifest(after.folder).digest


def measures(manifest: Manifest | None) -> dict[str, int | float]:
    """The numbers of a drift artifact for a tracker or a table, under the names they are shown by."""
    if manifest is None:
        return {}
    known = {**manifest.facts, **manifest.record}
    return {key: known[key] for key in MEASURES if key in known}
