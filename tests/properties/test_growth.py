"""Growth against its oracle: whatever was added, replaced and removed, what is left is what a build from scratch gives."""

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


def found(blocks: Corpus, backend: str, queries: torch.Tensor) -> tuple[torch.Tensor, list[list[str]]]:
    scores, rows = build_index(vectors(blocks), backend).search(queries, K)
    return scores, [[str(blocks.block_ids[row]) for row in line] for line in rows.tolist()]


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
            scores, ids = found(delta, backend, queries)
            assert all(len(line) == min(K, len(whole)) and set(line) <= set(whole.block_ids.tolist()) for line in ids)
            if backend in ("exact", "faiss_flat"):
                expected, theirs = found(whole, backend, queries)
                assert torch.allclose(scores, expected) and ids == theirs
        compacted = folder / "compacted"
        made = grow.run(CONFIG, base=last, change=grow.Compact(), out=compacted, sink=NullSink(), shards=3)
        rebuilt = read_manifest(full)
        for name in rebuilt.facts["shards"]:
            for file in (BLOCKS_FILE, TOKENS_FILE):
                assert made.files[f"{name}/{file}"] == rebuilt.files[f"{name}/{file}"]
        assert {name: made.facts[name] for name in COUNTED} == {name: rebuilt.facts[name] for name in COUNTED}
        assert {name: read_manifest(last).facts[name] for name in COUNTED} == {
            name: rebuilt.facts[name] for name in COUNTED
        }
