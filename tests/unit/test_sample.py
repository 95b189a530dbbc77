"""The bundled encyclopedia and its questions: what the demonstration relies on."""

import json
import re
from collections import Counter
from importlib.resources import files
from typing import Any

import pytest

from realm_core.data.questions import SPLITS
from realm_core.evaluate.text import normalize_answer
from realm_core.text.sentences import split_sentences

Row = dict[str, Any]
DOMAINS = {"arts", "geography", "history", "nature", "people", "science", "technology"}
SEVERAL_FORMS = 0.88  # share of questions with two or more accepted forms


def rows(name: str) -> list[Row]:
    return [json.loads(line) for line in (files("realm_core.sample") / name).read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def articles() -> dict[str, Row]:
    return {article["id"]: article for article in rows("encyclopedia.jsonl")}


@pytest.fixture(scope="module")
def questions() -> list[Row]:
    return rows("questions.jsonl")


def squeezed(text: str) -> str:
    return f" {normalize_answer(text)} "


def test_there_are_at_least_400_articles_with_names_of_their_own(articles: dict[str, Row]) -> None:
    assert len(articles) == len(rows("encyclopedia.jsonl")) >= 400
    assert len({article["title"] for article in articles.values()}) == len(articles)


def test_every_article_has_80_to_250_words(articles: dict[str, Row]) -> None:
    lengths = {name: len(article["text"].split()) for name, article in articles.items()}
    assert {name: length for name, length in lengths.items() if not 80 <= length <= 250} == {}


def test_every_domain_is_there_and_none_is_a_token_presence(articles: dict[str, Row]) -> None:
    counts = Counter(article["domain"] for article in articles.values())
    assert set(counts) == DOMAINS
    assert min(counts.values()) >= 20


def test_no_two_articles_share_a_sentence(articles: dict[str, Row]) -> None:
    homes: dict[str, set[str]] = {}
    for name, article in articles.items():
        for paragraph in article["text"].split("\n"):
            for low, high in split_sentences(paragraph, "simple"):
                sentence = normalize_answer(paragraph[low:high])
                if len(sentence.split()) > 3:
                    homes.setdefault(sentence, set()).add(name)
    assert {sentence: names for sentence, names in homes.items() if len(names) > 1} == {}


def test_there_are_at_least_700_questions_in_all_three_splits(questions: list[Row]) -> None:
    assert len(questions) >= 700
    counts = Counter(question["split"] for question in questions)
    assert set(counts) == set(SPLITS)
    assert min(counts.values()) >= 100


def test_no_question_repeats(questions: list[Row]) -> None:
    for key in (lambda row: row["id"], lambda row: squeezed(row["question"])):
        counts = Counter(map(key, questions))
        assert [entry for entry, count in counts.items() if count > 1] == []


def test_the_first_answer_stands_word_for_word_in_the_article_of_its_question(
    articles: dict[str, Row], questions: list[Row]
) -> None:
    assert all(question["answers"] for question in questions)
    missing = []
    for question in questions:
        text, answer = articles[question["article"]]["text"], question["answers"][0]
        if answer not in text or squeezed(answer) not in squeezed(text):  # case counts too: has_answer is that strict
            missing.append((question["id"], answer))
    assert missing == []


def test_the_accepted_forms_of_an_answer_differ_when_normalised(questions: list[Row]) -> None:
    forms = {question["id"]: [normalize_answer(answer) for answer in question["answers"]] for question in questions}
    assert [name for name, found in forms.items() if not all(found) or len(set(found)) < len(found)] == []


def test_most_questions_accept_several_forms(questions: list[Row]) -> None:
    several = sum(len(question["answers"]) > 1 for question in questions)
    assert several / len(questions) >= SEVERAL_FORMS


def test_no_question_gives_its_answer_away(questions: list[Row]) -> None:
    told = [
        (question["question"], answer)
        for question in questions
        for answer in question["answers"]
        if squeezed(answer) in squeezed(question["question"])
    ]
    assert told == []


def test_no_article_has_questions_in_two_splits(questions: list[Row]) -> None:
    asked = {split: {row["article"] for row in questions if row["split"] == split} for split in SPLITS}
    assert asked["test"] & asked["train"] == set()
    assert asked["dev"] & (asked["train"] | asked["test"]) == set()


def test_every_question_is_one_and_asks_about_an_article(articles: dict[str, Row], questions: list[Row]) -> None:
    assert {question["article"] for question in questions} <= set(articles)
    assert [row["question"] for row in questions if not row["question"].endswith("?")] == []


def test_the_texts_are_clean(articles: dict[str, Row]) -> None:
    for article in articles.values():
        assert article["text"] == article["text"].strip()
        assert not re.search(r"<[a-z/]|\[\[|\{\{|https?://|&[a-z]+;|  |\t", article["text"]), article["id"]
