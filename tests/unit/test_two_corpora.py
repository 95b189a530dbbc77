"""Queries from one corpus, documents from another: the paper's news and Wikipedia (Guu et al. 2020, section 4.2)."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from realm_core.corpus.shards import Corpus
from realm_core.errors import DataError
from realm_core.index.version import open_version
from realm_core.model.bundle import RealmModel
from realm_core.model.device import resolve
from realm_core.ports import NullSink
from realm_core.stages import corpus as stage
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
