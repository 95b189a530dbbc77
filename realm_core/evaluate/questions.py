"""Scores of a set of predictions: accuracy over all questions, with a bootstrap interval."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from realm_core.data.questions import Question
from realm_core.errors import DataError
from realm_core.evaluate.text import REGEX_SECONDS, exact_match, regex_match


def evaluate_predictions(
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    seed: int = 0,
    resamples: int = 1000,
    regex_seconds: float = REGEX_SECONDS,
) -> dict[str, Any]:
    """Exact match of `predictions` (question text -> answer) as a share of all questions.

    As in the original evaluation, questions of one text count once (the last one) and a missing prediction is wrong.
    Returns `exact_match`, `interval` (95 % bootstrap, seeded), `questions`, `missing`, `per_question` (text, prediction
    or None, correct), and the patterns that were invalid or ran out of time. Raises DataError for no questions.
    """
    asked = {item.question: item for item in questions}
    if not asked:
        raise DataError("no questions to evaluate; pass a question file that is not empty")
    rows: list[dict[str, Any]] = []
    invalid: list[dict[str, str]] = []
    timed_out: list[dict[str, str]] = []
    for text, item in asked.items():
        prediction = predictions.get(text)
        correct = False
        if prediction is not None and item.answer_type == "regex":
            verdict = regex_match(prediction, item.answers, regex_seconds)
            correct = verdict.matched
            invalid.extend({"question": text, "pattern": pattern} for pattern in verdict.invalid)
            timed_out.extend({"question": text, "pattern": pattern} for pattern in verdict.timed_out)
        elif prediction is not None:
            correct = exact_match(prediction, item.answers)
        rows.append({"question": text, "prediction": prediction, "correct": correct})
    hits = np.array([row["correct"] for row in rows], dtype=np.float64)
    return {
        "exact_match": float(hits.mean()),
        "interval": bootstrap_interval(hits, seed, resamples),
        "questions": len(rows),
        "missing": sum(row["prediction"] is None for row in rows),
        "per_question": rows,
        "invalid_patterns": invalid,
        "timed_out_patterns": timed_out,
    }


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; the same seed gives the same interval."""
    observed = np.asarray(values, dtype=np.float64)
    if observed.size == 0:
        raise DataError("a bootstrap interval of no values; evaluate at least one question")
    rng = np.random.default_rng(seed)
    means = [float(observed[rng.integers(observed.size, size=observed.size)].mean()) for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    old: Sequence[bool] | np.ndarray, new: Sequence[bool] | np.ndarray, seed: int = 0, resamples: int = 1000
) -> dict[str, Any]:
    """Mean difference new - old over the same questions, with its bootstrap interval.

    Narrower than comparing two intervals, because both systems saw the same questions.
    """
    if len(old) != len(new):
        raise DataError(f"{len(old)} results against {len(new)}; compare systems on the same questions")
    change = np.asarray(new, dtype=np.float64) - np.asarray(old, dtype=np.float64)
    return {"difference": float(change.mean()), "interval": bootstrap_interval(change, seed, resamples)}
