"""Answering from the live index: what comes with an answer, and what is said when there can be none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from realm_core.answer import Answerer
from realm_core.artifacts.store import PRUNED, Store
from realm_core.errors import ArtifactError, DataError
from realm_core.params import load_config
from realm_core.ports import NullSink
from realm_core.stages import finetune, promote

FIRST, LATER = "r1-s0000000", "r1-s0000004"
QUESTION = "Which ship carried the 1918 flu to Western Samoa?"


@pytest.fixture(scope="module")
def answerer(tiny_home: Store) -> Answerer:
    return Answerer.open(tiny_home)


def test_an_answer_names_its_evidence_and_the_index_version(answerer: Answerer, tiny_home: Store) -> None:
    answer = answerer.ask(QUESTION, k=3)
    assert (answer.index, answer.index_digest) == (FIRST, tiny_home.manifest("indexes", FIRST).digest)
    assert answer.reader == "sparse_readers/v0001"
    assert len(answer.passages) == 3
    assert answer.answer and answer.evidence and answer.answer in answer.evidence.text
    assert answer.evidence in answerer.ask(QUESTION, k=20).passages
    assert [passage.score for passage in answer.passages] == sorted((p.score for p in answer.passages), reverse=True)
    for passage in answer.passages:
        block = answerer.pipeline.corpus.block(answerer.pipeline.corpus.row_of(passage.block_id))
        assert (block.title, block.text) == (passage.title, passage.text)


def test_an_answer_is_plain_json(answerer: Answerer) -> None:
    answer = answerer.ask(QUESTION)
    told = json.loads(json.dumps(answer.to_dict()))
    assert told["evidence"]["block_id"] == answer.evidence.block_id
    assert set(told) == {"question", "answer", "evidence", "passages", "index", "index_digest", "reader"}


def test_the_same_question_gets_the_same_answer(answerer: Answerer, tiny_home: Store) -> None:
    assert answerer.ask(QUESTION) == answerer.ask(QUESTION) == Answerer.open(tiny_home).ask(QUESTION)


def test_all_passages_can_be_had_and_not_one_more(answerer: Answerer) -> None:
    blocks = len(answerer.pipeline.corpus)
    assert len(answerer.ask(QUESTION, k=blocks).passages) == blocks
    with pytest.raises(DataError, match=f"k={blocks + 1}: more than the {blocks} blocks of the corpus; ask for fewer"):
        answerer.ask(QUESTION, k=blocks + 1)


def test_fewer_passages_than_the_reader_reads_are_shown_only(answerer: Answerer) -> None:
    assert len(answerer.ask(QUESTION, k=1).passages) == 1


@pytest.mark.parametrize("question", ["", " \n\t"])
def test_an_empty_question_is_refused(answerer: Answerer, question: str) -> None:
    with pytest.raises(DataError, match="the question is empty; ask something"):
        answerer.ask(question)


@pytest.mark.parametrize("question", ["snow " * 5000, "?", "\u0000", "雪" * 300, "\ud83d\ude00", "[MASK] [SEP] [CLS]"])
def test_a_strange_question_is_survived(answerer: Answerer, question: str) -> None:
    assert answerer.ask(question, k=2).passages


def test_before_anything_is_live_the_next_move_is_told(home: Store) -> None:
    (home.home / "live.json").unlink()
    with pytest.raises(ArtifactError, match="no index is live yet; run realm demo, realm run, or promote one"):
        Answerer.open(home)


def test_without_any_reader_the_kind_is_named(home: Store) -> None:
    shutil.rmtree(home.path("sparse_readers", "v0001"))
    with pytest.raises(ArtifactError, match="no sparse_readers yet; materialise it first"):
        Answerer.open(home)


def test_an_index_that_is_not_the_live_one_is_refused(home: Store) -> None:
    shutil.rmtree(home.path("indexes", FIRST))
    shutil.copytree(home.path("indexes", LATER), home.path("indexes", FIRST))
    with pytest.raises(ArtifactError, match=r"not the index live\.json names; promote a version again"):
        Answerer.open(home)


def test_an_altered_index_is_refused(home: Store) -> None:
    path = home.path("indexes", FIRST) / "vectors.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ArtifactError, match=r"vectors\.npy: sha256"):
        Answerer.open(home)


def tune(store: Store, key: str) -> None:
    # The retriever of the tiny profile has learnt nothing: look far enough for some answer to be found.
    finetune.run(
        load_config(None, "tiny", ["reader.searcher_beam=40"]),
        index=store.path("indexes", key),
        snapshot=store.path("snapshots", key),
        checkpoint=store.path("checkpoints", key),
        corpus=store.newest("corpus"),
        questions=store.newest("questions"),
        out=store.path("readers", key),
        sink=NullSink(),
    )


@pytest.fixture(scope="module")
def tuned(tiny_home: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The tiny home with a reader for each of its two index versions."""
    store = Store.open(Path(shutil.copytree(tiny_home.home, tmp_path_factory.mktemp("tuned") / "home")))
    for key in (FIRST, LATER):
        tune(store, key)
    return store


def test_the_reader_tuned_on_the_live_index_is_preferred_and_its_question_tower_used(
    copy_home: Callable, tuned: Store
) -> None:
    home = copy_home(of=tuned)
    first = Answerer.open(home)
    assert first.ask(QUESTION).reader == f"readers/{FIRST}"
    assert first.pipeline.adds_relevance
    promote.run(home.config(), store=home, name=LATER)
    later = Answerer.open(home)
    assert later.ask(QUESTION).reader == f"readers/{LATER}"
    plain = Answerer.open(home)
    assert np.allclose(
        [passage.score for passage in later.ask(QUESTION).passages],
        [passage.score for passage in plain.ask(QUESTION).passages],
    )


def test_a_reader_of_another_index_reads_but_does_not_retrieve(copy_home: Callable, tuned: Store) -> None:
    home = copy_home(of=tuned)
    shutil.rmtree(home.path("readers", FIRST))
    answerer = Answerer.open(home)  # live is the first
    assert answerer.ask(QUESTION).reader == f"readers/{LATER}"
    assert not answerer.pipeline.adds_relevance
    shutil.rmtree(home.home / "readers")
    asked = Answerer.open(home).ask(QUESTION)
    assert asked.passages == answerer.ask(QUESTION).passages


def test_a_reader_whose_start_lost_its_weights_still_reads(copy_home: Callable, tuned: Store) -> None:
    home = copy_home(of=tuned)
    shutil.rmtree(home.path("readers", LATER))
    promote.run(home.config(), store=home, name=LATER)
    start = home.path("checkpoints", FIRST)
    (start / PRUNED).touch()
    for path in start.glob("*.safetensors"):
        path.unlink()
    assert Answerer.open(home).ask(QUESTION).reader == f"readers/{FIRST}"


def test_a_running_answerer_keeps_its_version_while_the_pointer_moves(home: Store) -> None:
    answerer = Answerer.open(home)
    promote.run(home.config(), store=home, name=LATER)
    assert answerer.ask(QUESTION).index == FIRST
    assert Answerer.open(home).ask(QUESTION).index == LATER


def test_a_home_that_was_moved_still_answers(home: Store, tmp_path: Path) -> None:
    before = Answerer.open(home).ask(QUESTION)
    moved = Store.open(Path(shutil.move(home.home, tmp_path / "elsewhere")))
    assert Answerer.open(moved).ask(QUESTION) == before
