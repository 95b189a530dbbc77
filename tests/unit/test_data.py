"""Sequence formats, ICT, masking, candidates, answers and question files on small, visible inputs."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from realm_core.corpus.readers import Document
from realm_core.corpus.shards import Corpus, write_shards
from realm_core.data.answers import gold_spans, has_answer, has_answer_tokens
from realm_core.data.candidates import NULL_ROW, select_candidates
from realm_core.data.formats import document_inputs, joint_inputs, null_document, query_inputs, reader_inputs, stack
from realm_core.data.ict import ict_batch
from realm_core.data.masking import NO_SPAN, NO_TOKENS, TRUNCATED, mask_tokens, masked_query, pad_masks
from realm_core.data.questions import Question, read_questions, split_of, write_questions
from realm_core.errors import ConfigError, DataError
from realm_core.params import load_config
from realm_core.text.tokenizer import Tokenizer, build_vocabulary

DOCUMENTS = [
    Document("a", "Elbert", "Snow fell on Mount Elbert in July 1969. Nobody was there. They went home by noon."),
    Document("b", "Plain", "There is no name and no date in here."),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    write_shards(DOCUMENTS, folder, Tokenizer(build_vocabulary([d.text for d in DOCUMENTS], 300)), limit=40)
    return Corpus.open(folder)


class Special:
    pad_id, cls_id, sep_id, mask_id = 0, 101, 102, 103


def test_the_null_document_is_three_special_tokens() -> None:
    made = null_document(6, Special())
    assert made.token_ids.tolist() == [101, 102, 102, 0, 0, 0]
    assert made.segment_ids.tolist() == [0, 0, 1, 0, 0, 0]
    assert made.mask.tolist() == [1, 1, 1, 0, 0, 0]


def test_the_title_has_priority_and_every_separator_stays() -> None:
    made = document_inputs([1, 2, 3, 4, 5, 6, 7], [8, 9], 8, Special())
    assert made.token_ids.tolist() == [101, 1, 2, 3, 4, 5, 102, 102]
    assert made.segment_ids.tolist() == [0] * 7 + [1]


def test_a_long_query_costs_the_document_no_room() -> None:
    made = joint_inputs([1] * 50, [2] * 50, 6, 8, Special())
    assert made.token_ids.tolist() == [101, 1, 1, 1, 1, 102, 2, 2, 2, 2, 2, 2, 102, 0]


def test_a_question_is_neither_cut_nor_padded() -> None:
    assert query_inputs([7] * 600, None, Special()).token_ids.shape == (602,)


def test_the_reader_keeps_the_question_and_survives_an_endless_one() -> None:
    made = reader_inputs([1, 2], [3, 4, 5, 6, 7], 8, Special())
    assert made.token_ids.tolist() == [101, 1, 2, 102, 3, 4, 5, 102]
    assert made.block_mask.tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
    endless = reader_inputs([1] * 500, [3, 4], 8, Special())
    assert endless.token_ids.tolist() == [101, 1, 1, 1, 1, 1, 102, 102]
    assert endless.block_mask.sum() == 0


def test_a_batch_is_trimmed_to_its_longest_sequence_or_keeps_its_shape() -> None:
    items = [query_inputs([5], 9, Special()), query_inputs([5, 6, 7], 9, Special())]
    assert stack(items).token_ids.tolist() == [[101, 5, 102, 0, 0], [101, 5, 6, 7, 102]]
    assert stack(items, trim=False).mask.shape == (2, 9)
    unpadded = [query_inputs([5], None, Special()), query_inputs([5, 6, 7], None, Special())]
    assert stack(unpadded, pad_id=9, trim=False).token_ids[0].tolist() == [101, 5, 102, 9, 9]


def test_a_length_without_room_is_a_bug() -> None:
    with pytest.raises(ValueError, match="no room"):
        document_inputs([], [], 2, Special())


def test_an_ict_batch_removes_the_query_from_nine_blocks_in_ten(corpus: Corpus) -> None:
    row = row_of(corpus, "a")
    batch = ict_batch(corpus, [row] * 400, np.random.default_rng(0), 20, 40, corpus.tokenizer)
    assert 0.84 < batch["removed"].mean() < 0.96
    assert len({tuple(query) for query in batch["query_token_ids"].tolist()}) == 3
    starts = corpus.sentence_starts(row).tolist()
    for query, query_mask, body_mask, removed in zip(
        batch["query_token_ids"], batch["query_mask"], batch["doc_mask"], batch["removed"], strict=True
    ):
        sentence = query[1 : query_mask.sum() - 1].tolist()
        assert sentence in [part.tolist() for part in np.split(corpus.token_ids(row), starts[1:])]
        expected = len(corpus.token_ids(row)) - removed * len(sentence)
        assert body_mask.sum() == 3 + len(corpus.title_ids(row)) + expected


def row_of(corpus: Corpus, doc_id: str) -> int:
    return next(row for row in range(len(corpus)) if corpus.block(row).doc_id == doc_id)


def test_a_block_of_one_sentence_is_left_out_when_it_would_be_emptied(corpus: Corpus) -> None:
    rows = [row_of(corpus, "b"), row_of(corpus, "a")]
    batch = ict_batch(corpus, rows, np.random.default_rng(0), 20, 40, corpus.tokenizer, mask_rate=1.0)
    assert batch["rows"].tolist() == rows[1:]
    nothing = ict_batch(corpus, rows[:1], np.random.default_rng(0), 20, 40, corpus.tokenizer, mask_rate=1.0)
    assert nothing["query_token_ids"].shape == (0, 20)
    kept = ict_batch(corpus, rows, np.random.default_rng(0), 20, 40, corpus.tokenizer, mask_rate=0.0, trim=False)
    assert kept["doc_token_ids"].shape == (2, 40)
    assert not kept["removed"].any()


def test_salient_masking_hides_one_span_of_one_sentence(corpus: Corpus) -> None:
    tokenizer, row, seen = corpus.tokenizer, row_of(corpus, "a"), set()
    first = corpus.token_ids(row)[: corpus.sentence_starts(row)[1]].tolist()
    for seed in range(30):
        query, reason = masked_query(corpus, row, np.random.default_rng(seed), "salient", 30, 10, tokenizer)
        assert query is not None
        assert reason == ""
        hidden = " ".join(tokenizer.pieces(query.targets))
        seen.add(hidden)
        restored = query.token_ids.copy()
        restored[query.positions - 1] = query.targets
        assert restored.tolist() == first
        assert (query.token_ids == tokenizer.mask_id).sum() == len(query.targets)
    assert seen == {"mount elbert", "july 1969"}


def test_masking_says_why_it_gave_nothing(corpus: Corpus) -> None:
    tokenizer, rng = corpus.tokenizer, np.random.default_rng(0)
    assert masked_query(corpus, row_of(corpus, "b"), rng, "salient", 30, 10, tokenizer) == (None, NO_SPAN)
    assert masked_query(corpus, row_of(corpus, "a"), rng, "salient", 6, 10, tokenizer) == (None, TRUNCATED)
    assert mask_tokens([1, 2], [], 0, 30, 10, 103) == (None, NO_TOKENS)
    with pytest.raises(ConfigError, match="scheme 'all'"):
        masked_query(corpus, 0, rng, "all", 30, 10, tokenizer)


def test_the_last_mask_must_stand_before_the_closing_separator() -> None:
    assert mask_tokens(list(range(20)), [7], 0, 10, 4, 103)[0] is not None
    assert mask_tokens(list(range(20)), [8], 0, 10, 4, 103) == (None, TRUNCATED)


def test_a_long_span_is_masked_whole_but_predicted_in_part() -> None:
    query, _ = mask_tokens(list(range(20)), list(range(3, 9)), 0, 30, 4, 103)
    assert query is not None
    assert (query.token_ids == 103).sum() == 6
    assert query.targets.tolist() == [3, 4, 5, 6]
    positions, targets, mask = pad_masks([query], 6)
    assert positions.tolist() == [[4, 5, 6, 7, 0, 0]]
    assert targets.tolist() == [[3, 4, 5, 6, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize("scheme", ["random_token", "random_span"])
def test_random_masking_hides_fifteen_percent_within_the_limits(corpus: Corpus, scheme: str) -> None:
    row, tokenizer = row_of(corpus, "a"), corpus.tokenizer
    for seed in range(40):
        query, _ = masked_query(corpus, row, np.random.default_rng(seed), scheme, 12, 10, tokenizer)
        assert query is not None
        assert len(query.targets) == max(1, round(0.15 * min(len(query.token_ids), 10)))
        assert query.positions.max() <= 10
        assert (query.token_ids[query.positions - 1] == tokenizer.mask_id).all()
        assert tokenizer.mask_id not in query.targets


@pytest.mark.parametrize("scheme", ["random_token", "random_span"])
def test_the_longest_query_of_a_random_scheme_has_all_of_its_fifteen_percent_to_predict(
    tmp_path: Path, scheme: str
) -> None:
    text = " ".join(["word"] * 94) + "."
    write_shards([Document("a", "T", text)], tmp_path, Tokenizer(build_vocabulary([text], 300)), limit=288)
    long, rng = Corpus.open(tmp_path), np.random.default_rng(5)
    for profile, expected in ((["pretrain.max_masks=10"], 10), ([], 14)):
        config = load_config(None, "base", [f"pretrain.masking={scheme}", *profile])
        query, _ = masked_query(long, 0, rng, scheme, config.lengths.query, config.max_masks, long.tokenizer)
        assert len(query.targets) == expected <= config.max_masks
    assert load_config(None, "base").max_masks == 10


def test_a_budget_of_no_masks_and_of_no_candidates_is_a_bug() -> None:
    with pytest.raises(ValueError, match="max_masks=0"):
        mask_tokens([11, 12], [0], 0, 20, 0, 103)
    with pytest.raises(ValueError, match="k=0"):
        select_candidates([1, 2], None, ["a", "b"], 0)


def test_the_origin_never_comes_back_and_repetitions_count_once() -> None:
    chosen = select_candidates([5, 6, 7, 8, 9], "u6", ["u5", "u6", "u5", "u8", "u9"], 3)
    assert chosen.rows.tolist() == [NULL_ROW, 5, 8]
    assert chosen.origin_removed
    assert chosen.duplicates
    foreign = select_candidates(np.array([5]), None, np.array(["u5"]), 3)
    assert foreign.rows.tolist() == [NULL_ROW, 5]
    assert not foreign.origin_removed
    assert not foreign.duplicates


def test_the_two_answer_rules_differ_where_the_papers_say() -> None:
    assert has_answer("the theatre", ["the"])
    assert not has_answer_tokens("Theatre", ["the"])
    assert not has_answer("in PARIS", ["Paris"])
    assert has_answer("in PARIS,", ["Paris"], "tokens")
    assert has_answer("Café du Monde", ["cafe\u0301 DU monde"], "tokens")
    assert has_answer("anything", [""])
    assert not has_answer_tokens("anything", ["", " "])
    with pytest.raises(ConfigError, match="rule 'regex'"):
        has_answer("x", ["x"], "regex")


def test_gold_spans_overlap_and_stay_within_what_the_reader_sees() -> None:
    assert gold_spans([1, 1, 1, 2], [[1, 1], [2], [9], []], offset=4).tolist() == [[4, 5], [5, 6], [7, 7]]
    assert gold_spans([1, 1, 1, 2], [[2], [1, 2]], kept=3).tolist() == []


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_questions_are_read_with_and_without_the_optional_fields(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "q.jsonl",
        {"id": 3, "question": "who?", "answers": ["me", "I"], "answer_type": "regex", "split": "test"},
        {"question": "what?", "answer": "that"},
    )
    first, second = read_questions(path)
    assert first == Question("3", "who?", ("me", "I"), "regex", "test")
    assert second == Question("q-1", "what?", ("that",), "string", split_of("what?"))
    assert {question.split for question in read_questions(path, split="dev")} == {"dev"}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"question": "x"}, "'answers' is missing"),
        ({"answers": ["x"]}, "'question' is missing"),
        ({"question": " ", "answers": ["x"]}, "question is empty"),
        ({"question": "x", "answers": [1]}, "'answers' is int"),
        ({"question": "x", "answers": {"a": 1}}, "'answers' is dict"),
        ({"question": "x", "answers": []}, "'answers' holds no answer; give at least one"),
        ({"question": "x", "answers": [" "]}, "'answers' holds no answer"),
        ({"question": "x", "answers": ["x"], "split": "prod"}, "split is 'prod'"),
        ({"question": "x", "answers": ["x"], "answer_type": ["regex"]}, "answer_type is"),
        ({"id": "a", "question": "x", "answers": ["x"]}, "'a' occurred before"),
        ("nonsense", "not JSON"),
    ],
)
def test_a_bad_question_is_named_or_counted(tmp_path: Path, record: object, reason: str) -> None:
    path = write_lines(tmp_path / "q.jsonl", {"id": "a", "question": "q", "answers": ["x"], "split": "dev"}, record)
    with pytest.raises(DataError, match=rf"q\.jsonl:2: .*{reason}"):
        list(read_questions(path))
    counts: Counter[str] = Counter()
    assert len(list(read_questions(path, "skip", counts))) == 1
    assert counts.total() == 1


def test_no_questions_is_an_error_and_an_unknown_split_too(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no questions"):
        list(read_questions(write_lines(tmp_path / "q.jsonl")))
    with pytest.raises(ConfigError, match="split 'prod'"):
        list(read_questions(tmp_path / "q.jsonl", split="prod"))


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz"])
def test_written_questions_are_read_back_and_equal_bytes_come_out(tmp_path: Path, name: str) -> None:
    questions = [Question("1", "Où?", ("là",), "string", "dev"), Question("2", "x\u2028?", ("y",), "sentence", "test")]
    write_questions(tmp_path / name, questions)
    first = (tmp_path / name).read_bytes()
    write_questions(tmp_path / name, iter(questions))
    assert (tmp_path / name).read_bytes() == first
    assert list(read_questions(tmp_path / name)) == questions


def test_blank_aliases_are_no_answers(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", {"question": "x", "answers": ["a", " ", ""]})
    assert [question.answers for question in read_questions(path)] == [("a",)]


def test_a_test_tenth_leaves_the_dev_questions_alone() -> None:
    pytest.importorskip("farmhash")
    questions = [f"what is number {number}" for number in range(3000)]
    plain = [split_of(question) for question in questions]
    tenth = [split_of(question, test_tenth=True) for question in questions]
    assert 230 < plain.count("dev") < 370
    assert [a == "dev" for a in plain] == [b == "dev" for b in tenth]
    assert 200 < tenth.count("test") < 340
    assert plain.count("test") == 0
