"""What must hold for any text: packing, offsets, shards, sequences, batches."""

import re
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_core.corpus.readers import Document
from realm_core.corpus.shards import Corpus, write_shards
from realm_core.data.answers import gold_spans
from realm_core.data.batches import rows_for_step
from realm_core.data.candidates import NULL_ROW, near_duplicates, runs_of, select_candidates
from realm_core.data.formats import document_inputs, joint_inputs, reader_inputs
from realm_core.data.ict import ict_example
from realm_core.data.masking import masked_query
from realm_core.text.blocks import pack_document, pack_lengths
from realm_core.text.sentences import split_sentences
from realm_core.text.spans import RuleTagger
from realm_core.text.tokenizer import Tokenizer, build_vocabulary, encodable

WORDS = (
    "the Rome rome Ada Lovelace. ran! in 1969 July 4, river; U.S. Dr. 42 km "
    'Café é ﬃ 한국 中文字 a\u0301 \u200b \0 I (x) "So'
)
TOKENIZER = Tokenizer(build_vocabulary([WORDS, "abcdefghij klmnop"], 90))

words = st.sampled_from(WORDS.split(" "))
spaces = st.sampled_from([" ", " ", " ", ". ", "\n", "\n\n", "", "\t", "? "])
prose = st.lists(st.tuples(words, spaces), max_size=60).map(lambda parts: "".join(w + s for w, s in parts))
anything = st.text(st.characters(), max_size=120)  # lone surrogates too
texts = st.one_of(prose, anything)


def letters(text: str) -> str:
    return "".join(text.split())


@settings(deadline=None)
@given(texts, st.sampled_from(["syntok", "simple"]))
def test_sentences_cover_every_character_in_order(text: str, splitter: str) -> None:
    ranges = split_sentences(text, splitter)
    assert "".join(letters(text[start:stop]) for start, stop in ranges) == letters(text)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(ranges))
    assert all(text[start:stop] == text[start:stop].strip() != "" for start, stop in ranges)


@settings(deadline=None)
@given(texts)
def test_offsets_are_ordered_and_their_words_tokenise_to_the_same_ids(text: str) -> None:
    ids, starts, stops = TOKENIZER.ids_with_offsets(text)
    assert ids == TOKENIZER.ids(text)
    assert starts == sorted(starts)
    assert stops == sorted(stops)
    assert all(0 <= start < stop <= len(text) for start, stop in zip(starts, stops, strict=True))
    assert TOKENIZER.ids(re.sub(r"[ \t\r\n]+", " ", text)) == ids  # BERT takes other controls for nothing at all


@settings(deadline=None)
@given(texts)
def test_spans_are_ordered_and_apart_and_trimmed(text: str) -> None:
    spans = RuleTagger().spans(text)
    assert all(stop <= start for (_, stop, _), (start, _, _) in pairwise(spans))
    assert all(text[start:stop] == text[start:stop].strip() != "" for start, stop, _ in spans)


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 40))
def test_greedy_packing_is_full_and_never_too_full(lengths: list[int], room: int) -> None:
    ranges = pack_lengths(lengths, room)
    assert [number for low, high in ranges for number in range(low, high)] == list(range(len(lengths)))
    for low, high in ranges:
        assert sum(lengths[low:high]) <= room or high - low == 1
    for (low, high), (_, _) in pairwise(ranges):
        assert sum(lengths[low : high + 1]) > room  # the next sentence did not fit


@settings(deadline=None)
@given(texts, st.one_of(prose, st.text(max_size=40)), st.integers(16, 48))
def test_no_block_exceeds_the_limit_and_no_text_is_lost(text: str, title: str, limit: int) -> None:
    document = Document("x", title, text)
    blocks = pack_document(document, TOKENIZER, limit, "simple")
    for block in blocks:
        assert 3 + len(block.title_ids) + len(block.token_ids) <= limit
        assert list(block.token_ids) == TOKENIZER.ids(block.text)
        assert letters(encodable(text[block.start : block.stop]).replace("\0", "")) == letters(block.text)
        assert block.sentence_starts[0] == 0
        assert all(low < high for low, high in pairwise([*block.sentence_starts, len(block.token_ids)]))
        assert " ".join(block.text[low:high] for low, high in block.sentences) == block.text
        borders = [*block.sentence_starts, len(block.token_ids)]
        for low, high in block.spans:
            assert any(start <= low < high <= stop for start, stop in pairwise(borders))
    if TOKENIZER.ids(text):
        assert "".join(letters(block.text) for block in blocks) == letters(encodable(text).replace("\0", ""))
    else:
        assert blocks == []


@settings(deadline=None)
@given(st.text("ab한中é\u0301\0\u200b ", min_size=60, max_size=400), st.integers(16, 24))
def test_a_wall_of_text_is_split_so_that_every_part_fits(text: str, limit: int) -> None:
    blocks = pack_document(Document("x", "", text), TOKENIZER, limit, lambda t: [(0, len(t))] if t.strip() else [])
    assert all(3 + len(block.token_ids) <= limit for block in blocks)
    kept = "".join(letters(block.text) for block in blocks)
    assert TOKENIZER.ids(letters(text)) == [] or kept
    assert all(a.stop <= b.start for a, b in pairwise(blocks))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@settings(max_examples=15, deadline=None)
@given(st.lists(prose, min_size=1, max_size=8), st.randoms(use_true_random=False), st.integers(1, 3))
def test_a_corpus_does_not_depend_on_the_order_of_its_documents(bodies: list[str], random, shards: int) -> None:
    documents = [Document(str(number), f"t{number}", "Rome. " + body) for number, body in enumerate(bodies)]
    shuffled = random.sample(documents, len(documents))
    with tempfile.TemporaryDirectory() as scratch:
        for name, order in (("a", documents), ("b", shuffled)):
            write_shards(order, Path(scratch, name), TOKENIZER, shards=shards, limit=32, splitter="simple")
        assert folder_bytes(Path(scratch, "a")) == folder_bytes(Path(scratch, "b"))
        corpus = Corpus.open(Path(scratch, "a"))
        blocks = [corpus.block(row) for row in range(len(corpus))]
        assert {block.doc_id for block in blocks} == {document.doc_id for document in documents}
        check_masking(corpus)
        for document in documents:
            mine = [block for block in blocks if block.doc_id == document.doc_id]
            assert "".join(letters(block.text) for block in mine) == letters(document.text.replace("\0", ""))


def check_masking(corpus: Corpus) -> None:
    """Every scheme hides wordpieces of one stored sentence and remembers what they were."""
    for row in range(len(corpus)):
        for scheme in ("salient", "random_token", "random_span"):
            query, _ = masked_query(corpus, row, np.random.default_rng(row), scheme, 20, 4, corpus.tokenizer)
            if query is None:
                continue
            assert 1 <= len(query.targets) <= 4
            restored = query.token_ids.copy()
            restored[query.positions - 1] = query.targets
            sentences = np.split(corpus.token_ids(row), corpus.sentence_starts(row)[1:])
            still_hidden = restored == corpus.tokenizer.mask_id
            assert any(
                len(sentence) == len(restored) and (still_hidden | (sentence == restored)).all()
                for sentence in sentences
            )


class Special:
    pad_id, cls_id, sep_id = 0, 101, 102


ids = st.lists(st.integers(1, 50), max_size=30)


@given(ids, ids, st.integers(3, 40))
def test_sequences_are_well_formed_at_any_length(first: list[int], second: list[int], length: int) -> None:
    made = document_inputs(first, second, length, Special())
    used = int(made.mask.sum())
    assert len(made.token_ids) == length
    assert made.mask.tolist() == [1] * used + [0] * (length - used)
    assert (made.token_ids[:used] == 102).sum() == 2
    room = length - 3
    kept = [*first[:room], *second[: max(room - len(first), 0)]]
    assert [token for token in made.token_ids.tolist() if 0 < token < 101] == kept
    assert used == len(kept) + 3


@given(ids, ids, st.integers(3, 20), st.integers(3, 20))
def test_joint_input_holds_query_and_document_each_cut_on_its_own(
    query: list[int], body: list[int], query_len: int, doc_len: int
) -> None:
    made = joint_inputs(query, body, query_len, doc_len, Special())
    expected = [101, *query[: query_len - 2], 102, *body[: doc_len - 2], 102]
    assert made.token_ids[: len(expected)].tolist() == expected
    assert not made.token_ids[len(expected) :].any()
    assert made.segment_ids.sum() == len(body[: doc_len - 2]) + 1


@given(ids, ids, st.integers(4, 40))
def test_the_block_mask_marks_exactly_the_block_that_is_there(
    question: list[int], block: list[int], length: int
) -> None:
    made = reader_inputs(question, block, length, Special())
    kept = int(made.block_mask.sum())
    assert made.token_ids[made.block_mask == 1].tolist() == block[:kept]
    assert kept == len(block) or int(made.mask.sum()) == length


@given(st.lists(st.integers(0, 2), max_size=20), st.lists(st.lists(st.integers(0, 2), max_size=3), max_size=3))
def test_gold_spans_are_all_places_where_the_answer_stands(block: list[int], answers: list[list[int]]) -> None:
    expected = [
        [start, start + len(answer) - 1]
        for answer in answers
        for start in range(len(block))
        if answer and block[start : start + len(answer)] == answer
    ]
    assert gold_spans(block, answers).tolist() == expected


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(0, 10**6), st.floats(0, 1))
def test_ict_takes_one_sentence_and_loses_nothing_else(lengths: list[int], seed: int, rate: float) -> None:
    starts = [sum(lengths[:number]) for number in range(len(lengths))]

    class Block:
        title_ids: tuple[int, ...] = ()
        token_ids = list(range(sum(lengths)))
        sentence_starts = starts

    example = ict_example(Block(), np.random.default_rng(seed), rate)
    if example is None:
        assert len(lengths) == 1
        return
    query, body = example.query_ids.tolist(), example.body_ids.tolist()
    assert query[0] in starts
    assert sorted({*body, *query}) == Block.token_ids
    assert example.removed == (not set(query) <= set(body))


@given(st.lists(st.integers(0, 6), max_size=12), st.integers(0, 6), st.integers(2, 8))
def test_candidates_are_distinct_in_order_and_without_the_origin(retrieved: list[int], origin: int, k: int) -> None:
    chosen = select_candidates(retrieved, str(origin), [str(row) for row in retrieved], k)
    expected = [row for row in dict.fromkeys(retrieved) if row != origin][: k - 1]
    assert chosen.rows.tolist() == [NULL_ROW, *expected]
    assert chosen.origin_removed == (origin in retrieved)
    assert chosen.duplicates == (len(set(retrieved)) < len(retrieved))


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 5), st.integers(0, 2**32))
def test_every_row_comes_once_an_epoch(n: int, batch: int, epochs: int, seed: int) -> None:
    steps = ((epochs + 1) * n + batch - 1) // batch
    rows = np.concatenate([rows_for_step(n, batch, step, seed) for step in range(steps)])
    for epoch in range(epochs + 1):
        assert sorted(rows[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(st.integers(0, 10**6))
def test_the_order_at_a_step_needs_no_history(step: int) -> None:
    assert rows_for_step(97, 8, step, 5).tolist() == rows_for_step(97, 8, step, 5).tolist()
    assert rows_for_step(97, 97, step, 5).tolist() != rows_for_step(97, 97, step, 6).tolist()
    assert rows_for_step(97, 97, step, 5).tolist() != rows_for_step(97, 97, step + 1, 5).tolist()
    with pytest.raises(ValueError, match="step=-1"):
        rows_for_step(97, 8, -1, 5)


WORDPIECES = st.lists(st.integers(5, 30_000), min_size=8, max_size=60, unique=True).map(np.array)
FEW_WORDS = st.lists(st.integers(5, 7), max_size=40).map(np.array)  # texts that repeat themselves and each other


@given(WORDPIECES, WORDPIECES, st.floats(0.01, 1))
def test_a_text_repeats_itself_and_whatever_holds_it(a: np.ndarray, b: np.ndarray, share: float) -> None:
    assert near_duplicates(runs_of(a), runs_of(a), share)
    assert near_duplicates(runs_of(a), runs_of(np.concatenate([b, a])), share)
    assert near_duplicates(runs_of(a), runs_of(b), share) == near_duplicates(runs_of(b), runs_of(a), share)


@given(WORDPIECES, st.integers(1, 7))
def test_texts_without_a_common_run_or_too_short_for_one_do_not_repeat_each_other(a: np.ndarray, length: int) -> None:
    assert not near_duplicates(runs_of(a), runs_of(a + 40_000), 0.01)
    assert not near_duplicates(runs_of(a[:length]), runs_of(a), 0.01)


@given(WORDPIECES.filter(lambda ids: len(ids) >= 40))
def test_half_a_copy_counts_at_half_and_not_above(a: np.ndarray) -> None:
    runs = len(a) - 7
    other = np.concatenate([a[: len(a) // 2], a[len(a) // 2 :] + 40_000])
    shared = (len(a) // 2 - 7) / runs
    assert near_duplicates(runs_of(a), runs_of(other), shared)
    assert not near_duplicates(runs_of(a), runs_of(other), shared + 1.5 / runs)


@given(FEW_WORDS, FEW_WORDS, st.floats(0.01, 1))
def test_near_duplicates_share_runs_as_one_would_count_them(a: np.ndarray, b: np.ndarray, share: float) -> None:
    runs = [{tuple(ids[i : i + 8].tolist()) for i in range(len(ids) - 7)} for ids in (a, b)]
    shorter = min(len(each) for each in runs)
    expected = shorter > 0 and len(runs[0] & runs[1]) >= share * shorter
    assert near_duplicates(runs_of(a.astype(int)), runs_of(b.astype(int)), share) == expected


@given(st.lists(st.integers(0, 12), max_size=14), st.integers(2, 6), st.sets(st.integers(0, 12)))
def test_candidates_are_the_first_different_texts_that_do_not_repeat_the_origin(
    texts: list[int], k: int, repeats: set[int]
) -> None:
    """Rows are places, several of which may hold one text; text 0 is the block the query came from."""
    rows = np.arange(100, 100 + len(texts))
    asked: list[int] = []

    def repeats_origin(row: int) -> bool:
        asked.append(row)
        return texts[row - 100] in repeats

    found = select_candidates(rows, "0", [str(text) for text in texts], k, repeats_origin)
    first = dict(reversed([(text, row) for text, row in zip(texts, rows.tolist(), strict=True)]))
    usable = [row for text, row in sorted(first.items(), key=lambda pair: pair[1]) if text and text not in repeats]
    assert found.rows.tolist() == [NULL_ROW, *usable][:k]
    assert found.origin_removed == (0 in texts) and found.duplicates == (len(set(texts)) < len(texts))
    if len(usable) >= k - 1:
        assert asked[-1:] == usable[k - 2 : k - 1]  # nothing is compared once there are enough
