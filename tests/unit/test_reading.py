"""Reading an answer out of blocks, and giving it in the words of the text."""

import string

import numpy as np
import pytest
import torch

from realm_core.config import RuntimeConfig
from realm_core.corpus.readers import Document
from realm_core.corpus.shards import Corpus, write_shards
from realm_core.evaluate.reading import read_answer, span_text
from realm_core.model.device import Device, resolve
from realm_core.model.encoder import EncoderShape
from realm_core.model.reader import Reader, SpanScores, span_candidates
from realm_core.text.tokenizer import SPECIAL_TOKENS, Tokenizer

TEXT = "Zürich's 3,500 bakers (mostly Swiss) met Dr. O'Neill in mid-July; nobody came."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    documents = [Document("a", "Bakers", TEXT), Document("b", "Snow", "Snow fell on Mount Elbert in July 1969.")]
    # A vocabulary of single characters: every word is several wordpieces.
    characters = sorted({*string.ascii_lowercase, *string.digits, *string.punctuation})
    vocabulary = [*SPECIAL_TOKENS, *characters, *(f"##{character}" for character in characters)]
    write_shards(documents, folder, Tokenizer(vocabulary), limit=120, splitter="simple")
    return Corpus.open(folder)


def row_with(corpus: Corpus, word: str) -> int:
    return next(row for row in range(len(corpus)) if word in corpus.text(row))


def test_every_span_is_a_piece_of_the_text_of_whole_words(corpus: Corpus) -> None:
    row = row_with(corpus, "bakers")
    text, count = corpus.text(row), len(corpus.token_ids(row))
    for start in range(count):
        for end in range(start, count):
            found = span_text(corpus, row, start, end, corpus.tokenizer)
            assert found and found in text
            before, after = text.split(found, 1)[0][-1:], text.split(found, 1)[1][:1]
            assert not (before.isalnum() and found[0].isalnum()) and not (found[-1].isalnum() and after.isalnum())


def test_accents_capitals_and_punctuation_come_back_as_they_stand(corpus: Corpus) -> None:
    row = row_with(corpus, "bakers")
    _, starts, stops = corpus.tokenizer.ids_with_offsets(corpus.text(row))
    for wanted in ("Zürich", "3,500 bakers", "(mostly Swiss)", "O'Neill", "mid-July"):
        low = corpus.text(row).index(wanted)
        start, end = list(starts).index(low), list(stops).index(low + len(wanted))
        assert span_text(corpus, row, start, end, corpus.tokenizer) == wanted


def test_where_text_and_wordpieces_disagree_the_pieces_are_joined(corpus: Corpus) -> None:
    """A sentence border inside a word makes wordpieces that the whole text does not give."""

    class Split(Corpus):
        def token_ids(self, row):  # type: ignore[no-untyped-def]
            ids = super().token_ids(row)
            return ids[1:]

    split = Split(corpus.folder, corpus.shards)
    row = row_with(corpus, "bakers")
    pieces = corpus.tokenizer.pieces(split.token_ids(row).tolist())
    assert pieces[0].startswith("##")
    found = span_text(split, row, 0, 12, corpus.tokenizer)
    assert "##" not in found
    assert found.replace(" ", "") == "".join(piece.removeprefix("##") for piece in pieces[:13])


class Scripted(Reader):
    """A reader that prefers one span: (block, start, end) in wordpieces of the block."""

    def __init__(self, shape: EncoderShape, choice: tuple[int, int, int], question: int) -> None:
        super().__init__(shape, span_hidden=4, max_span_width=5)
        self.choice, self.question = choice, question

    def forward(self, token_ids, segment_ids, mask, block_mask):  # type: ignore[no-untyped-def]
        spans = super().forward(token_ids, segment_ids, mask, block_mask)
        block, start, end = self.choice
        starts, ends = span_candidates(token_ids.shape[1], self.max_span_width)
        first = self.question + 2
        score = torch.zeros_like(spans.score)
        score[block, (starts == first + start) & (ends == first + end)] = 10.0
        return SpanScores(score, spans.valid)


def device() -> Device:
    return resolve(RuntimeConfig(device="cpu", precision="fp32"))


def shape(corpus: Corpus) -> EncoderShape:
    return EncoderShape(
        vocab_size=corpus.tokenizer.vocab_size,
        hidden_size=8,
        layers=1,
        heads=2,
        intermediate_size=8,
        max_positions=160,
    )


def test_the_answer_names_the_block_it_was_read_from(corpus: Corpus) -> None:
    rows = [row_with(corpus, "Elbert"), row_with(corpus, "bakers")]
    question = corpus.tokenizer.ids("who met whom")
    _, starts, stops = corpus.tokenizer.ids_with_offsets(TEXT)
    low = TEXT.index("Swiss")
    choice = (1, list(starts).index(low), list(stops).index(low + 5))
    reader = Scripted(shape(corpus), choice, len(question))
    reading = read_answer(
        reader, corpus, question, rows, [0.0, 0.5], tokenizer=corpus.tokenizer, length=150, device=device()
    )
    assert reading is not None
    assert (reading.text, reading.row, reading.place, reading.score) == ("Swiss", rows[1], 1, 10.5)


def test_relevance_decides_between_equal_spans(corpus: Corpus) -> None:
    rows = [row_with(corpus, "Elbert"), row_with(corpus, "bakers")]
    question = corpus.tokenizer.ids("who")
    reader = Scripted(shape(corpus), (0, 10**6, 10**6), len(question))  # prefers nothing
    for relevance, place in (([1.0, 0.0], 0), ([0.0, 1.0], 1), ([0.0, 0.0], 0)):
        reading = read_answer(
            reader, corpus, question, rows, relevance, tokenizer=corpus.tokenizer, length=150, device=device()
        )
        assert reading is not None and reading.place == place


def test_a_question_that_fills_the_reader_leaves_no_answer(corpus: Corpus) -> None:
    reader = Reader(shape(corpus), span_hidden=4, max_span_width=5)
    question = np.full(500, corpus.tokenizer.mask_id).tolist()
    reading = read_answer(reader, corpus, question, [0], [0.0], tokenizer=corpus.tokenizer, length=40, device=device())
    assert reading is None
