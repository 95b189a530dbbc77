"""BM25 against its formula, with ties in a known order."""

import math
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_core.baselines.bm25 import Bm25, Bm25Params, words
from realm_core.errors import ConfigError, DataError

pytest.importorskip("bm25s")


def lucene(query: str, texts: list[str], k1: float, b: float) -> list[float]:
    """The formula, term by term: idf(t) * tf / (tf + k1 (1 - b + b length / mean length))."""
    documents = [words(text) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        counts, score = Counter(document), 0.0
        for word in words(query):
            holding = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            score += (
                idf * counts[word] / (counts[word] + k1 * (1 - b + b * len(document) / mean)) if counts[word] else 0
            )
        scores.append(score)
    return scores


@given(st.lists(st.lists(st.sampled_from("uvwxyz"), min_size=1, max_size=6), min_size=1, max_size=12), st.data())
@settings(max_examples=40, deadline=None)
def test_scores_follow_the_formula_and_ties_the_row(texts: list[list[str]], data: st.DataObject) -> None:
    joined = [" ".join(text) for text in texts]
    query = " ".join(data.draw(st.lists(st.sampled_from("uvwxyzq"), min_size=1, max_size=3, unique=True)))
    k = data.draw(st.integers(1, 15))
    scores, rows = Bm25(joined).search([query], k)
    expected = lucene(query, joined, 0.9, 0.4)
    assert rows.shape == (1, min(k, len(joined)))
    assert np.allclose(scores[0], [expected[row] for row in rows[0]], rtol=1e-5)
    assert np.allclose(scores[0], sorted(expected, reverse=True)[:k], rtol=1e-5)
    assert all(
        a > b or (a == b and i < j) for a, b, i, j in zip(scores[0], scores[0][1:], rows[0], rows[0][1:], strict=False)
    )


def test_titles_count_as_text() -> None:
    index = Bm25(["it flows north", "it flows south"], ["Nile", "Danube"])
    assert index.search(["where does the Danube flow?"], 1)[1].tolist() == [[1]]


def test_a_query_without_known_words_returns_the_first_rows_with_zero() -> None:
    scores, rows = Bm25(["u v", "w"]).search(["qqq", "", "what is the"], 5)
    assert rows.tolist() == [[0, 1]] * 3
    assert not scores.any()


def test_passages_without_any_word_are_kept_as_rows() -> None:
    assert Bm25(["", "...", "the"]).search(["u"], 2)[1].tolist() == [[0, 1]]
    assert Bm25(["", "u"]).search(["u"], 2)[1].tolist() == [[1, 0]]


def test_words_are_unicode_and_lower_case_without_stop_words() -> None:
    assert words("What is the Straße of Łódź, 1.5 km?") == ["straße", "łódź", "1", "5", "km"]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="b="):
        Bm25Params(b=1.5)
    with pytest.raises(ConfigError, match="lucene"):
        Bm25Params(method="okapi")
    with pytest.raises(DataError):
        Bm25([])
    with pytest.raises(ConfigError, match="titles"):
        Bm25(["a1", "b1"], ["t"])
    with pytest.raises(ConfigError, match="k=0"):
        Bm25(["u"]).search(["u"], 0)


def test_without_bm25s_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ConfigError, match="install bm25s"):
        Bm25(["u"])
