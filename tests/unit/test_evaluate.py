"""Scores of answers and of retrieval, and how stale an index is."""

import time
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from realm_core.data.questions import Question
from realm_core.errors import ConfigError, DataError
from realm_core.evaluate.drift import index_drift
from realm_core.evaluate.questions import bootstrap_interval, evaluate_predictions, paired_difference
from realm_core.evaluate.retrieval import first_hits, reader_oracle, retrieval_recall, summarize_hits
from realm_core.evaluate.text import exact_match, match_pattern, normalize_answer, regex_match

# The engine's own guards do not see through this one.
CATASTROPHIC = r"(.*?,){14}P"
VICTIM = ",".join(str(number) for number in range(60))


def ask(text: str, *answers: str, kind: str = "string") -> Question:
    return Question(id=text, question=text, answers=answers, answer_type=kind)


@given(st.text(alphabet="atheAnTÉé\u0301 .,'–\t1"))
def test_case_punctuation_articles_and_space_do_not_matter(text: str) -> None:
    once = normalize_answer(text)
    assert normalize_answer(once) == once
    assert exact_match(text, [f" The {text.upper()}! "])


def test_marks_and_foreign_punctuation_matter() -> None:
    assert not exact_match("Café", ["Cafe"])
    assert not exact_match("well–known", ["wellknown"])
    assert exact_match("Caf\u00e9", ["cafe\u0301"])


def test_a_catastrophic_pattern_costs_its_bound_and_is_reported() -> None:
    began = time.monotonic()
    verdict = regex_match(VICTIM, [CATASTROPHIC, "nothing"], seconds=0.1)
    assert time.monotonic() - began < 2
    assert not verdict.matched
    assert verdict.timed_out == (CATASTROPHIC,)


def test_a_later_pattern_still_matches_after_one_that_ran_out_of_time() -> None:
    assert regex_match(VICTIM, [CATASTROPHIC, "0,1"], seconds=0.05).matched


@pytest.mark.parametrize("pattern", ["a(b", "*", "(?P<x", "[z-a]", "a{2,1}", "\\", "(?<=a+)b"])
def test_an_invalid_pattern_is_reported_and_scores_nothing(pattern: str) -> None:
    verdict = regex_match("a(b", [pattern])
    assert (verdict.matched, verdict.invalid) == (False, (pattern,))


def test_a_pattern_that_would_fill_memory_is_refused_at_once() -> None:
    tracemalloc.start()
    assert match_pattern("aaa", "((((a{1000}){1000}){1000}){1000})") == "invalid pattern"
    assert match_pattern("aaa", "((((a?){1000}){1000}){1000})") == "invalid pattern"
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()
    assert match_pattern("2024-01-02", r"\d{4}-\d{2}-\d{2}|\d{4}|(\d{3}){2}") == "match"


def test_all_questions_count_and_a_missing_prediction_is_wrong() -> None:
    questions = [ask("q1", "Paris"), ask("q2", "Rome", "roma"), ask("q3", "x"), ask("q4", r"19\d\d", kind="regex")]
    result = evaluate_predictions(questions, {"q1": "the Paris!", "q2": "Roma", "q4": "1969, July", "other": "x"})
    assert result["exact_match"] == 0.75
    assert (result["questions"], result["missing"]) == (4, 1)
    assert [row["correct"] for row in result["per_question"]] == [True, True, False, True]
    low, high = result["interval"]
    assert 0 <= low <= 0.75 <= high <= 1


def test_questions_of_one_text_count_once_with_the_last_answers() -> None:
    result = evaluate_predictions([ask("q", "a1"), ask("q", "b1")], {"q": "b1"})
    assert (result["questions"], result["exact_match"]) == (1, 1.0)


def test_bad_patterns_of_a_question_set_are_listed_and_the_evaluation_ends() -> None:
    questions = [ask("q1", "a(b", kind="regex"), ask("q2", CATASTROPHIC, kind="regex"), ask("q3", "ok", kind="regex")]
    result = evaluate_predictions(questions, {"q1": "a(b", "q2": VICTIM, "q3": "OK then"}, regex_seconds=0.05)
    assert result["exact_match"] == pytest.approx(1 / 3)
    assert result["invalid_patterns"] == [{"question": "q1", "pattern": "a(b"}]
    assert result["timed_out_patterns"] == [{"question": "q2", "pattern": CATASTROPHIC}]


def test_no_questions_is_an_error_not_a_zero() -> None:
    with pytest.raises(DataError):
        evaluate_predictions([], {"q": "a"})


def test_the_interval_repeats_with_its_seed_and_narrows_with_more_questions() -> None:
    few, many = [0.0, 1.0] * 10, [0.0, 1.0] * 1000
    assert bootstrap_interval(few, seed=3) == bootstrap_interval(few, seed=3)
    assert bootstrap_interval(few, seed=3) != bootstrap_interval(few, seed=4)
    widths = [high - low for low, high in (bootstrap_interval(few), bootstrap_interval(many))]
    assert widths[0] > 5 * widths[1]
    assert widths[1] == pytest.approx(2 * 1.96 * 0.5 / 2000**0.5, rel=0.15)


def test_a_paired_difference_sees_what_two_intervals_hide() -> None:
    old = [False] * 90 + [True] * 60
    new = [True] * 8 + old[8:]
    result = paired_difference(old, new)
    assert result["difference"] == pytest.approx(8 / 150)
    assert result["interval"][0] > 0
    with pytest.raises(DataError):
        paired_difference([True], [True, False])


PASSAGES = [["no", "about paris", "Paris it is"], ["Rome-born", "x"], ["", ""]]
ANSWERS = [["Paris"], ["Rome"], ["z"]]


def test_the_two_rules_differ_in_case_and_in_word_borders() -> None:
    assert first_hits(PASSAGES, ANSWERS, "substring") == [2, 0, None]
    assert first_hits(PASSAGES, ANSWERS, "tokens") == [1, 0, None]
    assert first_hits([["Romeo"]], [["Rome"]], "substring") == [0]
    assert first_hits([["Romeo"]], [["Rome"]], "tokens") == [None]


def test_recall_is_a_share_of_all_questions_and_names_its_rule() -> None:
    result = retrieval_recall(PASSAGES, ANSWERS, ks=(1, 2, 5), rule="tokens")
    assert result == {
        "recall_at_1": 1 / 3, "recall_at_2": 2 / 3, "recall_at_5": 2 / 3, "mean_reciprocal_rank": 0.5,
        "rule": "tokens", "questions": 3,
    }  # fmt: skip


def test_regex_answers_are_searched_anywhere_and_bad_ones_match_nothing() -> None:
    retrieved, answers = [["It was in July 1969.", "x"]], [["a(b", r"19\d\d"]]
    assert first_hits(retrieved, answers, answer_types=["regex"]) == [0]
    assert first_hits(retrieved, answers) == [None]
    began = time.monotonic()
    assert first_hits([[VICTIM] * 50], [[CATASTROPHIC]], answer_types=["regex"]) == [None]
    assert time.monotonic() - began < 5


@given(st.lists(st.one_of(st.none(), st.integers(0, 30)), min_size=1), st.lists(st.integers(1, 40), min_size=1))
def test_recall_grows_with_k(hits: list[int | None], ks: list[int]) -> None:
    result = summarize_hits(hits, ks, "tokens")
    recalls = [result[f"recall_at_{k}"] for k in sorted(set(ks))]
    assert recalls == sorted(recalls)
    assert 0 <= result["mean_reciprocal_rank"] <= 1


def test_the_reader_oracle_sees_only_what_the_reader_sees() -> None:
    assert reader_oracle([["about par", "x"], ["in Rome"]], [["Paris"], ["rome"]]) == 0.5


def test_impossible_retrieval_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="substring, tokens"):
        retrieval_recall(PASSAGES, ANSWERS, rule="fuzzy")
    with pytest.raises(ConfigError, match="every question"):
        retrieval_recall(PASSAGES[:2], ANSWERS)
    with pytest.raises(ConfigError):
        retrieval_recall([], [])
    with pytest.raises(ConfigError):
        retrieval_recall(PASSAGES, ANSWERS, ks=(0,))


def test_drift_reports_what_can_be_told_and_no_more() -> None:
    assert index_drift() == {}
    rows = torch.tensor([[1, 2]])
    drift = index_drift(
        old_rows=rows, new_rows=torch.tensor([[2, 3]]), old_vectors=torch.eye(2), new_vectors=torch.eye(2),
        index_step=500, trainer_step=1250, built_at=100.0, now=90.0,
    )  # fmt: skip
    assert (drift["top_k_overlap"], drift["cosine_mean"]) == (0.5, 1.0)
    assert (drift["age_steps"], drift["age_seconds"]) == (750, 0.0)
    with pytest.raises(ConfigError, match="another run"):
        index_drift(index_step=5, trainer_step=4)
