"""Growth against its oracle: whatever was added, replaced and removed, what is left is what a build from scratch gives.

An index version is always built over the vectors of the blocks that are left, so growth can change nothing about it but the
order of its rows: documents added later stand behind the others until the corpus is compacted.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_core.artifacts.manifest import read_manifest
from realm_core.corpus.layout import BLOCKS_FILE, TOKENS_FILE
from realm_core.corpus.shards import Corpus
from realm_core.corpus.sources import Source
from realm_core.index.backends import build_index, known_backends
from realm_core.index.exact import exact_search, score_rows
from realm_core.index.recall import recall_against_exact
from realm_core.params import load_config
from realm_core.ports import NullSink
from realm_core.stages import corpus, grow

CONFIG = load_config(None, "tiny", ["corpus.shards=3", "corpus.block_wordpieces=32"])
SENTENCES = [
    "Rome lies on the Tiber.",
    "The ship left on 3 May 1911.",
    "Nobody asked Ida Voss.",
    "It was red, and old.",
]
COUNTED = ("articles", "blocks", "sentences", "spans", "blocks_without_span", "duplicate_blocks", "block_lengths")
WIDTH, K = 8, 4
ORDER_FREE = ("exact", "faiss_flat", "faiss_sq8", "alsh")  # what they find does not depend on the order of the rows
APPROXIMATE = ("faiss_ivf", "faiss_hnsw")  # k-means and graph begin with some rows; each order gives another index
STARVED: dict[str, dict[str, int]] = {  # so little effort that they miss a good part
    "faiss_ivf": {"nlist": 32, "nprobe": 2},
    "faiss_hnsw": {"m": 8, "ef_construction": 20, "ef_search": 16},
    "alsh": {"tables": 2, "probes": 2},
}
EVERYTHING: dict[str, dict[str, int]] = {  # every list, every bucket
    "faiss_ivf": {"nlist": 16, "nprobe": 16},
    "alsh": {"tables": 1, "bits": 1, "probes": 2},
}
# Recall of an approximate index after growth against that of one built in full, 128 queries each: over 200 seeds the
# difference is 0.000 in the mean, with a standard deviation of 0.02.
ONE, MANY = 0.15, 0.02

names = st.sampled_from([f"d{number}" for number in range(10)])
texts = st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=8).map(" ".join)
documents = st.dictionaries(names, texts, min_size=3, max_size=8)
changes = st.lists(st.one_of(documents, st.frozensets(names, min_size=1, max_size=4)), min_size=1, max_size=4)


def source(folder: Path, content: Mapping[str, str]) -> Path:
    path = folder / f"{len(list(folder.glob('*.jsonl')))}.jsonl"
    rows = [{"id": name, "title": f"On {name}", "text": text} for name, text in content.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def grown(
    folder: Path, state: dict[str, str], steps: Sequence[Mapping[str, str] | frozenset[str]]
) -> tuple[Path, Path]:
    """(first version, last version); `state` is brought along. A removal that would leave nothing is left out."""
    first = base = folder / "v0"
    corpus.run(CONFIG, source=source(folder, state), out=base, sink=NullSink())
    for number, step in enumerate(steps, start=1):
        change: grow.Change
        if isinstance(step, Mapping):
            change = grow.Add(source=Source.find(source(folder, step)), replace=True)
            state |= step
        else:
            gone = step & state.keys()
            if not gone or gone == state.keys():
                continue
            change = grow.Remove(ids=sorted(gone))
            for name in gone:
                del state[name]
        out = folder / f"v{number}"
        grow.run(CONFIG, base=base, change=change, out=out, sink=NullSink(), shards=3)
        base = out
    return first, base


def vectors(blocks: Corpus) -> np.ndarray:
    """A vector a block that follows from its identity, as an encoder's follows from its text."""
    seeds = [int(block_id[:8], 16) for block_id in blocks.block_ids]
    return np.stack([np.random.default_rng(seed).standard_normal(WIDTH).astype(np.float32) for seed in seeds])


def found(blocks: Corpus, backend: str, queries: torch.Tensor, **params: int) -> tuple[torch.Tensor, list[list[str]]]:
    scores, rows = build_index(vectors(blocks), backend, **params).search(queries, K)
    return scores, [[str(blocks.block_ids[row]) for row in line] for line in rows.tolist()]


def require_same(one: tuple[torch.Tensor, list[list[str]]], other: tuple[torch.Tensor, list[list[str]]]) -> None:
    assert torch.allclose(one[0], other[0]) and one[1] == other[1]


def require_honest(blocks: Corpus, backend: str, queries: torch.Tensor) -> None:
    """However little effort: every place is filled, with blocks that are there, once, under their true scores."""
    scores, ids = found(blocks, backend, queries, **STARVED.get(backend, {}))
    true = queries @ torch.from_numpy(vectors(blocks)).T
    rows = torch.tensor([[blocks.row_of(block_id) for block_id in line] for line in ids])
    assert rows.shape == (len(queries), min(K, len(blocks)))
    assert all(len(set(line)) == len(line) for line in ids) or len(set(blocks.block_ids.tolist())) < len(blocks)
    assert torch.allclose(scores, true.gather(1, rows), atol=0.1 if backend == "faiss_sq8" else 1e-4)


@settings(deadline=None, max_examples=6)
@given(documents, changes)
@pytest.mark.slow
def test_growth_is_a_full_rebuild_for_every_search_and_compaction_is_one_byte_for_byte(
    state: dict[str, str], steps: list[Mapping[str, str] | frozenset[str]]
) -> None:
    state = dict(state)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        first, last = grown(folder, state, steps)
        full = folder / "full"
        corpus.run(CONFIG, source=source(folder, state), out=full, sink=NullSink(), vocabulary=first)
        delta, whole = Corpus.open(last), Corpus.open(full)
        assert sorted(delta.block_ids) == sorted(whole.block_ids)
        for row in range(len(delta)):
            assert delta.block(row).text in state[delta.block(row).doc_id]
        queries = torch.from_numpy(np.random.default_rng(0).standard_normal((5, WIDTH)).astype(np.float32))
        for backend in known_backends():
            require_honest(delta, backend, queries)
        for backend in ORDER_FREE:
            require_same(found(delta, backend, queries), found(whole, backend, queries))
            low = STARVED.get(backend, {})
            require_same(found(delta, backend, queries, **low), found(whole, backend, queries, **low))
        compacted = folder / "compacted"
        made = grow.run(CONFIG, base=last, change=grow.Compact(), out=compacted, sink=NullSink(), shards=3)
        for backend in known_backends():  # the same rows in the same order: the same index, however approximate
            low = STARVED.get(backend, {})
            require_same(found(Corpus.open(compacted), backend, queries, **low), found(whole, backend, queries, **low))
        rebuilt = read_manifest(full)
        for name in rebuilt.facts["shards"]:
            for file in (BLOCKS_FILE, TOKENS_FILE):
                assert made.files[f"{name}/{file}"] == rebuilt.files[f"{name}/{file}"]
        assert {name: made.facts[name] for name in COUNTED} == {name: rebuilt.facts[name] for name in COUNTED}
        assert {name: read_manifest(last).facts[name] for name in COUNTED} == {
            name: rebuilt.facts[name] for name in COUNTED
        }


def history(
    seed: int, removed: float, added: float, queries: int = 128
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(vectors as growth leaves them, a permutation that a build in full gives them, queries near some).

    600 documents on 20 subjects, of which a share is removed; those added are on ten subjects of their own, one after
    another.
    """
    draw = torch.Generator().manual_seed(seed)
    subjects = 1.5 * torch.randn(30, 16, generator=draw) + torch.randn(1, 16, generator=draw)
    first = torch.randint(0, 20, (600,), generator=draw)[torch.rand(600, generator=draw) >= removed]
    later = torch.randint(20, 30, (int(600 * added),), generator=draw).sort().values
    about = subjects[torch.cat([first, later])]
    grown_rows = about + 0.7 * torch.randn(about.shape, generator=draw)
    order = torch.randperm(len(grown_rows), generator=draw)
    asked = grown_rows[torch.randint(0, len(grown_rows), (queries,), generator=draw)]
    return grown_rows, order, asked + 0.3 * torch.randn(asked.shape, generator=draw)


def recalls(seed: int, removed: float, added: float, backend: str, **params: int) -> tuple[float, float]:
    """Recall at 8 against exact search: (of the index after growth, of the one built in full)."""
    rows, order, queries = history(seed, removed, added)
    one, other = build_index(rows, backend, **params), build_index(rows[order], backend, **params)
    return recall_against_exact(one, rows, queries, 8), recall_against_exact(other, rows[order], queries, 8)


seeds, shares = st.integers(0, 2**31), st.floats(0, 0.6)


@settings(deadline=None, max_examples=10)
@given(seeds, shares, shares)
@pytest.mark.parametrize("backend", APPROXIMATE)
@pytest.mark.slow
def test_growth_costs_an_approximate_index_no_recall(backend: str, seed: int, removed: float, added: float) -> None:
    for params in ({}, STARVED[backend]):
        after_growth, in_full = recalls(seed, removed, added, backend, **params)
        assert after_growth >= in_full - ONE
        assert in_full >= after_growth - ONE  # nor is growth a way around a poor index


@pytest.mark.parametrize("backend", APPROXIMATE)
@pytest.mark.slow
def test_in_the_mean_an_approximate_index_finds_as_much_after_growth_as_one_built_in_full(backend: str) -> None:
    pairs = [recalls(seed, 0.2, 0.25, backend, **STARVED[backend]) for seed in range(16)]
    after_growth, in_full = np.mean(pairs, axis=0)
    assert after_growth >= in_full - MANY
    assert in_full < 0.99  # else this shows nothing


@settings(deadline=None, max_examples=5)
@given(seeds, shares, shares)
@pytest.mark.parametrize("backend", known_backends())
def test_an_index_that_looks_everywhere_finds_what_exact_search_finds(
    backend: str, seed: int, removed: float, added: float
) -> None:
    rows, order, queries = history(seed, removed, added, queries=8)
    k = len(rows) if backend == "faiss_hnsw" else K  # a graph is walked to its end only for whoever wants all of it
    expected, _ = exact_search(queries, rows, k)
    for matrix in (rows, rows[order]):
        scores, places = build_index(matrix, backend, **EVERYTHING.get(backend, {})).search(queries, k)
        true = score_rows(queries, matrix, places)
        # The quantiser ranks by rounded vectors: what it finds may fall short by as much as its own scores are off.
        slack = 2 * float((scores - true).abs().max()) if backend == "faiss_sq8" else 1e-4
        assert bool((true.sort(descending=True).values >= expected - slack).all())


@settings(deadline=None, max_examples=5)
@given(seeds, shares, shares)
@pytest.mark.parametrize("backend", ORDER_FREE)
def test_the_order_of_the_rows_changes_nothing(backend: str, seed: int, removed: float, added: float) -> None:
    rows, order, queries = history(seed, removed, added, queries=16)
    for params in ({}, STARVED.get(backend, {})):
        one = build_index(rows, backend, **params).search(queries, K)
        other = build_index(rows[order], backend, **params).search(queries, K)
        assert torch.allclose(one[0], other[0]) and torch.equal(one[1], order[other[1]])
