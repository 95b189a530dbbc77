"""Answer scoring against results of the original evaluation code, and against Python's `re` on real patterns."""

import gzip
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from realm_core.evaluate.text import exact_match, match_pattern, normalize_answer


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, Any]:
    return json.loads((golden_dir / "tf_original_a.json").read_text(encoding="utf-8"))["evaluation"]


def test_answers_normalise_as_in_the_original_code(golden: dict[str, Any]) -> None:
    assert [normalize_answer(case["text"]) for case in golden["normalize"]] == [c["out"] for c in golden["normalize"]]


def test_exact_match_agrees_with_the_original_code(golden: dict[str, Any]) -> None:
    for case in golden["exact"]:
        assert exact_match(case["prediction"], [case["answer"]]) == case["match"], case


def test_regex_match_agrees_with_the_original_code(golden: dict[str, Any]) -> None:
    for case in golden["regex"]:
        assert (match_pattern(case["prediction"], case["pattern"]) == "match") == case["match"], case


@pytest.mark.slow
def test_every_real_trec_pattern_behaves_as_under_re(shared_data: Path) -> None:
    path = shared_data / "qa" / "trec_large2470_train_regex.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is absent")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        questions = [json.loads(line) for line in file]
    began = time.monotonic()
    for question in questions:
        for pattern in question["answers"]:
            try:
                compiled = re.compile(pattern, re.IGNORECASE | re.UNICODE | re.MULTILINE)
            except re.error:
                assert match_pattern("x", pattern) == "invalid pattern"
                continue
            plain = re.sub(r"\\(.)", r"\1", pattern)
            for text in (plain, plain.split("|")[0].upper(), question["question"]):
                expected = "match" if compiled.match(text) else "no match"
                assert match_pattern(text, pattern) == expected, (pattern, text)
    assert time.monotonic() - began < 10
