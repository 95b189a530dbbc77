"""Question sets in the formats of their originals, and the split that ORQA makes of them."""

import bz2
import gzip
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from realm_core.config import Config
from realm_core.data.question_files import form_of, json_items, read_question_file
from realm_core.data.questions import split_of
from realm_core.errors import ConfigError, DataError
from realm_core.ports import NullSink
from realm_core.stages import questions as stage

WEBQUESTIONS = [
    {
        "url": "u",
        "targetValue": '(list (description "Jamaican \\"Creole\\"") (description Patois))',
        "utterance": "what?",
    },
    {"url": "u", "targetValue": "(list)", "utterance": "nothing?"},
]
TRIVIAQA = {
    "Data": [
        {"QuestionId": "tc_1", "Question": "who?", "Answer": {"Value": "Ada", "Aliases": ["Ada", "Lady Lovelace"]}},
        {"QuestionId": "tc_2", "Question": "of the test set?"},
    ],
    "Version": 1.0,
}
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "c",
                    "qas": [
                        {
                            "id": "q1",
                            "question": "who?",
                            "answers": [{"text": "Ada", "answer_start": 1}, {"text": "Ada"}],
                        },
                        {"id": "q2", "question": "impossible?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}


def read(path: Path, **options: Any) -> tuple[list[tuple[str, tuple[str, ...]]], Counter[str]]:
    counts: Counter[str] = Counter()
    found = list(read_question_file(path, counts=counts, **options))
    return [(question.question, question.answers) for question in found], counts


@pytest.mark.parametrize(
    ("name", "content", "form", "expected", "counted"),
    [
        ("nq.jsonl", '{"question": "who?", "answer": ["Ada"]}\n', "jsonl", [("who?", ("Ada",))], {}),
        (
            "wq.json",
            json.dumps(WEBQUESTIONS),
            "webquestions",
            [("what?", ('Jamaican "Creole"', "Patois"))],
            {"no_answer": 1},
        ),
        (
            "tqa.json",
            json.dumps(TRIVIAQA, indent=2),
            "triviaqa",
            [("who?", ("Ada", "Lady Lovelace"))],
            {"no_answer": 1},
        ),
        ("squad.json", json.dumps(SQUAD), "squad", [("who?", ("Ada",))], {"no_answer": 1}),
        ("dpr.csv", "who?\t['Ada', \"O'B\"]\n", "dpr", [("who?", ("Ada", "O'B"))], {}),
        ("ct.tsv", "7\tHUM\twho?\tAda|Lovel.ce \n", "trec", [("who?", ("Ada|Lovel.ce",))], {}),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz", ".bz2"])
def test_originals_are_recognised_and_read(
    tmp_path: Path, name: str, content: str, form: str, expected: list[Any], counted: dict[str, int], ending: str
) -> None:
    path = tmp_path / (name + ending)
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}[ending](content.encode()))
    assert form_of(path) == form
    assert read(path) == (expected, counted)


def test_answers_of_curated_trec_are_regular_expressions(tmp_path: Path) -> None:
    (tmp_path / "ct.txt").write_text('{"question": "who?", "answer": ["Ada( L.*)?"]}\n')
    (question,) = read_question_file(tmp_path / "ct.txt", "trec")
    assert (question.answer_type, question.id) == ("regex", "ct-0")


@pytest.mark.parametrize(
    ("name", "content", "form", "reason"),
    [
        ("d.csv", "who?\t__import__('os')\n", "dpr", r"d\.csv:1: the second column is no list"),
        ("d.csv", "who?\t" + "[" * 5000 + "\n", "dpr", "no list of answers"),
        ("d.csv", "who?\n", "dpr", r"1 columns, expected question and answers"),
        ("d.tsv", "1\t2\t3\n", "trec", "3 columns, expected number"),
        ("d.json", '[{"utterance": 5, "targetValue": "(description x)"}]', "webquestions", "item 0: no text under 'utterance'"),
        ("d.json", '[{"utterance": "a", "targetValue": "(description x)"}, 7]', "webquestions", "item 1: no text under"),
        ("d.json", '[{"utterance": "a"', "webquestions", "item 0: not complete JSON"),
        ("d.json", '{"data": [{"paragraphs": [{"qas": [{"id": "q"}]}]}]}', "squad", "item 0: no text under 'question'"),
        ("d.json", '{"other": 1}', "triviaqa", "no array under 'Data'"),
        ("d.json", "[]", "webquestions", "no questions"),
        ("d.json", '{"data": [{"paragraphs": 7}, "x", {"paragraphs": ["y"]}]}', "squad", "no questions"),
        ("d.json.gz", "not gzip", "squad", "damaged gzip file"),
        ("d.json", b'[{"utterance": "caf\xe9"}]', "webquestions", "not UTF-8"),
        ("d.json", "[" + "[" * 100_000, "webquestions", "not complete JSON"),
    ],
)  # fmt: skip
def test_what_is_not_in_its_format_is_named(
    tmp_path: Path, name: str, content: str | bytes, form: str, reason: str
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=reason):
        read(tmp_path / name, form=form)


def test_bad_items_are_counted_when_skipped(tmp_path: Path) -> None:
    bad = [{"utterance": 5, "targetValue": "(description x)"}, "x"]
    good = {"utterance": "a", "targetValue": '(description "\\q")'}  # an escape that JSON does not know
    (tmp_path / "d.json").write_text(json.dumps([*bad, good]))
    assert read(tmp_path / "d.json", on_error="skip") == ([("a", ("\\q",))], {"missing_field": 2})
    with pytest.raises(ConfigError, match="question format 'x'"):
        read(tmp_path / "d.json", form="x")


def test_items_of_a_large_array_are_read_one_by_one(tmp_path: Path) -> None:
    rows = [{"n": number, "pad": "é" * (number % 7) * 9000} for number in range(60)]
    (tmp_path / "d.json").write_text(json.dumps({"Data": rows}, ensure_ascii=False, indent=1))
    assert [item for _, item in json_items(tmp_path / "d.json", "Data")] == rows


def lines(path: Path, questions: list[str]) -> Path:
    path.write_text("".join(json.dumps({"question": text, "answer": ["x"]}) + "\n" for text in questions))
    return path


def test_train_and_dev_come_from_one_original_and_test_from_the_other(tmp_path: Path) -> None:
    train = lines(tmp_path / "NQ-open.train.jsonl", [f"question {n}" for n in range(200)])
    test = lines(tmp_path / "NQ-open.dev.jsonl", [f"other {n}" for n in range(5)])
    manifest = stage.run(Config(), source=train, test=test, form="nq", out=tmp_path / "q", sink=NullSink())
    dev = sum(split_of(f"question {n}") == "dev" for n in range(200))
    assert manifest.facts == {"train": 200 - dev, "dev": dev, "test": 5, "dropped": {}, "answer_types": {"string": 205}}
    assert [question.id for question in stage.load(tmp_path / "q", "test")][:2] == ["NQ-open.dev-0", "NQ-open.dev-1"]
    assert {question.question for question in stage.load(tmp_path / "q", "dev")} <= {
        f"question {n}" for n in range(200)
    }


def test_a_question_marked_as_test_or_named_twice_is_refused(tmp_path: Path) -> None:
    test = lines(tmp_path / "test.jsonl", ["t"])
    train = tmp_path / "train.jsonl"
    train.write_text('{"question": "a", "answers": ["x"], "split": "test"}\n')
    with pytest.raises(DataError, match="marked as test in the training file"):
        stage.run(Config(), source=train, test=test, out=tmp_path / "q", sink=NullSink())
    train.write_text('{"id": "test-0", "question": "a", "answers": ["x"], "split": "train"}\n')
    with pytest.raises(DataError, match="'test-0' occurs in the training and in the test file"):
        stage.run(Config(), source=train, test=test, out=tmp_path / "q", sink=NullSink())
    with pytest.raises(DataError, match=r"absent: no such question file"):
        stage.run(Config(), source=train, test=tmp_path / "absent", out=tmp_path / "q", sink=NullSink())
    with pytest.raises(ConfigError, match="question format"):
        stage.run(Config(), source=train, form="odd", out=tmp_path / "q", sink=NullSink())


def test_the_published_dev_questions_of_triviaqa_obey_the_rule(shared_data: Path) -> None:
    path = shared_data / "qa" / "triviaqa_open_dev.jsonl.gz"
    questions = islice(read_question_file(path, split="dev"), 500)
    splits = Counter(split_of(question.question) for question in questions)
    assert splits["dev"] / splits.total() > 0.9  # the rest were edited after they had been split
