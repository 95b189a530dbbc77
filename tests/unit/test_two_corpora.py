"""Queries from one corpus, documents from another: the paper's news and Wikipedia (Guu et al. 2020, section 4.2)."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realm_core.corpus.shards import Corpus
from realm_core.errors import DataError
from realm_core.index.version import open_version
from realm_core.model.bundle import RealmModel
from realm_core.model.device import resolve
from realm_core.params import load_config
from realm_core.ports import NullSink
from realm_core.stages import corpus as stage
from realm_core.train.features import choose_candidates, draw_queries
from realm_core.train.loop import RealmTrainer


@pytest.fixture
def news(tmp_path: Path) -> Path:
    path = tmp_path / "news.jsonl"
    rows = [
        {
            "id": str(n),
            "title": f"Wire {n}",
            "text": f"On {n} May 1987 the Bank of England spoke in London. It rose {n} %.",
        }
        for n in range(1, 20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_second_corpus_takes_the_vocabulary_of_the_first(tiny_home: Any, news: Path, tmp_path: Path) -> None:
    first = tiny_home.newest("corpus")
    made = stage.run(tiny_home.config(), source=news, out=tmp_path / "x", sink=NullSink(), vocabulary=first)
    assert made.files["vocab.txt"] == tiny_home.manifest("corpus", first.name).files["vocab.txt"]
    alone = stage.run(tiny_home.config(), source=news, out=tmp_path / "alone", sink=NullSink())
    assert alone.files["vocab.txt"] != made.files["vocab.txt"]
    with pytest.raises(DataError, match=r"absent: no such vocabulary"):
        stage.plan(tiny_home.config(), source=news, vocabulary=tmp_path / "absent")


def test_a_step_draws_its_queries_from_one_corpus_and_its_documents_from_the_other(
    tiny_home: Any, news: Path, tmp_path: Path
) -> None:
    config, live = tiny_home.config(), tiny_home.require_live()
    documents, checkpoint = tiny_home.newest("corpus"), tiny_home.path("checkpoints", live.index)
    stage.run(config, source=news, out=tmp_path / "x", sink=NullSink(), vocabulary=documents)
    device = resolve(config.runtime)
    index = open_version(tiny_home.path("indexes", live.index), checkpoint=checkpoint, corpus=documents, device=device)
    queries = Corpus.open(tmp_path / "x")
    trainer = RealmTrainer(config, RealmModel.load(checkpoint), queries, device)
    assert not set(queries.block_ids) & set(index.corpus.block_ids)
    metrics = trainer.step(0, index)
    assert math.isfinite(metrics["loss"])


def test_a_copy_of_the_block_a_query_came_from_is_no_candidate_if_so_wished(tiny_home: Any) -> None:
    live = tiny_home.require_live()
    documents, checkpoint = tiny_home.newest("corpus"), tiny_home.path("checkpoints", live.index)
    corpus = Corpus.open(documents)
    origins, retrieved = ["elsewhere"], np.array([[3, 5, 7, 9]])
    everything = choose_candidates(corpus, origins, retrieved, 4)
    assert everything[0].tolist() == [-1, 3, 5, 7]
    fewer = choose_candidates(corpus, origins, retrieved, 4, lambda number, row: row == 5)
    assert fewer[0].tolist() == [-1, 3, 7, 9]
    config = load_config(None, "tiny", ["pretrain.trivial=near_duplicate", "pretrain.near_duplicate_share=0.01"])
    device = resolve(config.runtime)
    index = open_version(tiny_home.path("indexes", live.index), checkpoint=checkpoint, corpus=documents, device=device)
    trainer = RealmTrainer(config, RealmModel.load(checkpoint), corpus, device)
    queries = draw_queries(
        corpus,
        [3],
        np.random.default_rng(0),
        scheme="random_token",
        query_len=32,
        max_masks=5,
        tokenizer=corpus.tokenizer,
    )
    repeats = trainer._repeats(queries, index.corpus)
    assert repeats(0, 3)
    assert math.isfinite(trainer.step(0, index)["loss"])
