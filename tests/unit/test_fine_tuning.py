"""Fine-tuning: every question has its turn, a batch in parts is the batch, and saving memory changes no number."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from realm_core.artifacts.store import Store
from realm_core.corpus.shards import Corpus
from realm_core.data.answers import has_answer
from realm_core.data.questions import Question
from realm_core.errors import ConfigError, DataError
from realm_core.index.snapshot import read_matrix
from realm_core.model.device import Device, resolve
from realm_core.model.reader import Reader
from realm_core.ports import MemorySink
from realm_core.stages.questions import load
from realm_core.train.reader import DenseRetrieval, FixedRetrieval, Retrieved, train_reader
from tests import training


class Asked(FixedRetrieval):
    """Fixed rows, and the numbers of the questions that were asked, a list a call."""

    def __init__(self, rows: np.ndarray) -> None:
        super().__init__(rows)
        object.__setattr__(self, "numbers", [])

    def __call__(
        self, numbers: Sequence[int] | np.ndarray, questions: Sequence[Sequence[int]], device: Device
    ) -> list[Retrieved]:
        self.numbers.append([int(number) for number in numbers])  # type: ignore[attr-defined]
        return super().__call__(numbers, questions, device)


def questions_of(store: Store) -> list[Question]:
    return load(store.newest("questions"), "train")


def rows_with_answers(corpus: Corpus, questions: Sequence[Question], known: set[int]) -> np.ndarray:
    """Two rows a question: of those in `known` the first block holds an answer, of the others none does."""
    texts = corpus.texts(range(len(corpus)))
    found = []
    for number, question in enumerate(questions):
        right = [row for row, text in enumerate(texts) if has_answer(text, question.answers)]
        wrong = [row for row in range(len(texts)) if row not in right]
        found.append([right[0], wrong[0]] if number in known and right else wrong[:2])
    return np.array(found)


def tune(
    store: Store,
    retrieval: DenseRetrieval | FixedRetrieval,
    *overrides: str,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[training.Tensors, MemorySink]:
    config = training.settings("reader.span_hidden=16", *overrides)
    corpus, sink = Corpus.open(store.newest("corpus")), MemorySink()
    model = training.lively_model(store)
    reader = Reader(model.encoder.shape, config.reader.span_hidden, config.reader.max_span_width)
    reader.initialise(torch.Generator().manual_seed(1))
    reader.realm.load_state_dict(model.encoder.realm.state_dict())
    training.set_dropout(reader.to(dtype), dropout)
    train_reader(reader, retrieval, corpus, questions_of(store), config, resolve(config.runtime), sink)
    return training.weights(reader), sink


def dense(store: Store) -> DenseRetrieval:
    config = training.settings("reader.searcher_beam=300")
    vectors = np.concatenate(
        [read_matrix(path) for path in sorted(store.path("snapshots", training.KEY).glob("*.npy"))]
    )
    retriever = training.lively_model(store, dtype=torch.float64).retriever
    return DenseRetrieval(retriever, training.opened_index(store, config), vectors, config)


def test_every_question_is_asked_once_an_epoch_whether_it_finds_its_answer_or_not(tiny_home: Store) -> None:
    corpus, questions = Corpus.open(tiny_home.newest("corpus")), questions_of(tiny_home)
    retrieval = Asked(rows_with_answers(corpus, questions, known=set(range(0, len(questions), 3))))
    _, sink = tune(tiny_home, retrieval, f"reader.steps={len(questions)}", "reader.batch=1", "reader.lr=1e-5")
    look, *asked = retrieval.numbers  # type: ignore[attr-defined]
    assert sorted(number for numbers in asked for number in numbers) == list(range(len(questions)))
    assert len(look) <= 16  # the look before training ends with the first question that finds its answer
    readable = {values["reader/readable"] for _, values in sink.rows}
    assert readable == {0.0, 1.0}
    for _, values in sink.rows:
        assert np.isfinite(values["reader/loss"]) and (values["reader/loss"] > 0) == (values["reader/readable"] > 0)


def test_questions_that_find_no_answer_at_all_are_refused_before_training(tiny_home: Store) -> None:
    corpus, questions = Corpus.open(tiny_home.newest("corpus")), questions_of(tiny_home)
    retrieval = Asked(rows_with_answers(corpus, questions, known=set()))
    with pytest.raises(DataError, match="no training question finds its answer among its retrieved blocks"):
        tune(tiny_home, retrieval)
    asked = [number for numbers in retrieval.numbers for number in numbers]  # type: ignore[attr-defined]
    assert asked == list(range(len(questions)))


@pytest.mark.slow
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("kind", ["fixed", "dense"])
def test_micro_batches_tune_as_the_whole_batch_does(tiny_home: Store, kind: str, micro: int) -> None:
    corpus, questions = Corpus.open(tiny_home.newest("corpus")), questions_of(tiny_home)
    runs = []
    for overrides in ([], [f"reader.micro_batch={micro}"]):
        retrieval = (
            FixedRetrieval(rows_with_answers(corpus, questions, set(range(len(questions)))))
            if kind == "fixed"
            else dense(tiny_home)
        )
        runs.append(tune(tiny_home, retrieval, "reader.steps=3", *overrides, dtype=torch.float64))
    (whole, losses), (parts, same) = runs
    assert training.farthest(parts, whole) < 1e-10  # in float64: what the order of a sum may cost
    for (_, one), (_, other) in zip(losses.rows, same.rows, strict=True):
        assert one == pytest.approx(other, rel=1e-10)


def test_checkpointing_recomputes_the_layers_and_changes_no_bit_even_with_dropout(
    tiny_home: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, questions = Corpus.open(tiny_home.newest("corpus")), questions_of(tiny_home)
    retrieval = FixedRetrieval(rows_with_answers(corpus, questions, set(range(len(questions)))))
    switched = []
    monkeypatch.setattr(
        Reader,
        "checkpointing",
        property(
            lambda self: self.realm.checkpointing,
            lambda self, on: (switched.append(on), setattr(self.realm, "checkpointing", on)),
        ),
    )
    plain, _ = tune(tiny_home, retrieval, "reader.steps=3", dropout=0.1)
    saving, _ = tune(tiny_home, retrieval, "reader.steps=3", "reader.checkpointing=true", dropout=0.1)
    assert switched == [False, True]
    assert training.farthest(plain, saving) == 0.0


def test_a_batch_that_is_no_whole_number_of_micro_batches_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reader\.batch=4 is not a multiple of reader\.micro_batch=3"):
        training.settings("reader.batch=4", "reader.micro_batch=3")
