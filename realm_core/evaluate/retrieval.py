"""Retrieval scores: does an answer stand in one of the first k retrieved passages?

Two rules are in use and give different numbers, so every result names its rule. "substring" is that of the original
code (language/orqa, op HasAnswer): the raw answer occurs in the raw text, case and all. "tokens" is DPR's: the answer's
normalised words occur in a row. Answers that are regular expressions (CuratedTREC) are searched for under either rule.
"""

from collections.abc import Callable, Sequence
from typing import Any

from realm_core.data.answers import has_answer, has_answer_tokens
from realm_core.errors import ConfigError
from realm_core.evaluate.text import match_pattern

RULES: dict[str, Callable[[str, Sequence[str]], bool]] = {"substring": has_answer, "tokens": has_answer_tokens}


def retrieval_recall(
    retrieved: Sequence[Sequence[str]],
    answers: Sequence[Sequence[str]],
    ks: Sequence[int] = (1, 5, 20),
    rule: str = "tokens",
    answer_types: Sequence[str] | None = None,
) -> dict[str, Any]:
    """`recall_at_K` for every k, `mean_reciprocal_rank`, the `rule` and the number of `questions`.

    Shares of all questions. A k larger than the number of passages retrieved for a question uses those there are.
    """
    return summarize_hits(first_hits(retrieved, answers, rule, answer_types), ks, rule)


def first_hits(
    retrieved: Sequence[Sequence[str]],
    answers: Sequence[Sequence[str]],
    rule: str = "tokens",
    answer_types: Sequence[str] | None = None,
) -> list[int | None]:
    """For every question the place (0 = best) of the first passage with an answer, or None.

    `answer_types` says "regex" where a question's answers are regular expressions; without it none are.
    """
    if rule not in RULES:
        raise ConfigError(f"answer rule {rule!r}; choose one of {', '.join(RULES)}")
    kinds = ["string"] * len(answers) if answer_types is None else answer_types
    if not len(retrieved) == len(answers) == len(kinds):
        counts = f"{len(retrieved)} lists of passages, {len(answers)} of answers, {len(kinds)} answer types"
        raise ConfigError(f"retrieval scores: {counts}; pass one of each for every question")
    return [
        _first_pattern(texts, accepted) if kind == "regex" else _first_answer(texts, accepted, rule)
        for texts, accepted, kind in zip(retrieved, answers, kinds, strict=True)
    ]


def summarize_hits(hits: Sequence[int | None], ks: Sequence[int], rule: str) -> dict[str, Any]:
    """The numbers of `retrieval_recall` from the places `first_hits` found."""
    if not hits or not ks or min(ks) < 1:
        raise ConfigError(f"recall of {len(hits)} questions at k in {list(ks)}; give at least one of each, k from 1")
    total = len(hits)
    found = [place for place in hits if place is not None]
    result: dict[str, Any] = {f"recall_at_{k}": sum(place < k for place in found) / total for k in sorted(set(ks))}
    result["mean_reciprocal_rank"] = sum(1 / (place + 1) for place in found) / total
    return {**result, "rule": rule, "questions": total}


def reader_oracle(
    read: Sequence[Sequence[str]],
    answers: Sequence[Sequence[str]],
    rule: str = "tokens",
    answer_types: Sequence[str] | None = None,
) -> float:
    """Share of questions a perfect reader could answer: some block it reads holds an answer.

    `read` holds, for every question, the block texts as the reader sees them, that is after truncation.
    """
    hits = first_hits(read, answers, rule, answer_types)
    if not hits:
        raise ConfigError("reader oracle of no questions; evaluate at least one")
    return sum(place is not None for place in hits) / len(hits)


def _first_answer(texts: Sequence[str], answers: Sequence[str], rule: str) -> int | None:
    return next((place for place, text in enumerate(texts) if RULES[rule](text, answers)), None)


def _first_pattern(texts: Sequence[str], patterns: Sequence[str]) -> int | None:
    usable = list(patterns)
    for place, text in enumerate(texts):
        for pattern in list(usable):
            outcome = match_pattern(text, pattern, anywhere=True)
            if outcome == "match":
                return place
            if outcome != "no match":
                usable.remove(pattern)  # one bad pattern costs its time once a question, not once a passage
    return None
