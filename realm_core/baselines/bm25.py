"""BM25, the sparse baseline every dense retriever has to beat.

Lucene's variant with k1 = 0.9 and b = 0.4, as Pyserini sets them for passages of Wikipedia. Lower-cased words, a short
list of English stop words, no stemmer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex
from jaxtyping import Float, Int
from numpy import ndarray

from realm_core.corpus.shards import Corpus
from realm_core.errors import ConfigError, DataError

_WORD = regex.compile(r"[\p{L}\p{N}\p{M}]+")
# Lucene's EnglishAnalyzer list, plus question words: they carry the form of a question, not its subject.
_STOP_WORDS = frozenset(
    "a,an,and,are,as,at,be,but,by,for,if,in,into,is,it,no,not,of,on,or,such,that,the,their,then,there,these,they,this,to,"
    "was,will,with,what,when,where,which,who,whom,whose,why,how,did,does,do".split(",")
)


@dataclass(frozen=True, kw_only=True)
class Bm25Params:
    k1: float = 0.9  # saturation of term frequency
    b: float = 0.4  # strength of length normalisation
    method: str = "lucene"  # any of bm25s' variants

    def __post_init__(self) -> None:
        if self.k1 < 0 or not 0 <= self.b <= 1:
            raise ConfigError(f"bm25: k1={self.k1}, b={self.b}; k1 must not be negative and b lies in [0, 1]")
        if self.method not in ("robertson", "lucene", "atire", "bm25l", "bm25+"):
            raise ConfigError(f"bm25: method {self.method!r}; choose robertson, lucene, atire, bm25l or bm25+")


class Bm25:
    """An inverted index over titles and texts."""

    def __init__(
        self, texts: Sequence[str], titles: Sequence[str] | None = None, params: Bm25Params | None = None
    ) -> None:
        if not texts:
            raise DataError("bm25 over no passages; build the corpus first")
        if titles is not None and len(titles) != len(texts):
            raise ConfigError(f"bm25: {len(titles)} titles for {len(texts)} texts; pass one a text")
        self.size, self.params = len(texts), params or Bm25Params()
        self.vocabulary: dict[str, int] = {}
        joined = texts if titles is None else [f"{title} {text}" for title, text in zip(titles, texts, strict=True)]
        ids = [[self.vocabulary.setdefault(word, len(self.vocabulary)) for word in words(text)] for text in joined]
        self._index = _bm25s().BM25(k1=self.params.k1, b=self.params.b, method=self.params.method)
        if self.vocabulary:
            self._index.index((ids, self.vocabulary), show_progress=False)

    @classmethod
    def over(cls, corpus: Corpus, params: Bm25Params | None = None) -> "Bm25":
        """BM25 over title and text of every block; rows are the corpus's."""
        blocks = [corpus.block(row) for row in range(len(corpus))]
        return cls([block.text for block in blocks], [block.title for block in blocks], params)

    def search(self, queries: Sequence[str], k: int) -> tuple[Float[ndarray, "Q k"], Int[ndarray, "Q k"]]:
        """The min(k, N) best passages of every query: float32 scores and int64 rows, equal scores by ascending row.

        A passage that shares no word with the query scores 0 and still fills a place.
        """
        if k < 1:
            raise ConfigError(f"bm25: k={k}; ask for at least one passage")
        k = min(k, self.size)
        scores = np.zeros((len(queries), k), dtype=np.float32)
        rows = np.zeros((len(queries), k), dtype=np.int64)
        for i, query in enumerate(queries):
            score_N = self._scores(query)
            rows[i] = _best(score_N, k)
            scores[i] = score_N[rows[i]]
        return scores, rows

    def _scores(self, query: str) -> Float[ndarray, " N"]:
        known = [self.vocabulary[word] for word in words(query) if word in self.vocabulary]
        if not known:
            return np.zeros(self.size, dtype=np.float32)
        return np.asarray(self._index.get_scores_from_ids(known), dtype=np.float32)


def words(text: str) -> list[str]:
    """Lower-cased runs of letters, digits and marks without stop words."""
    return [word for word in _WORD.findall(text.lower()) if word not in _STOP_WORDS]


def _best(score_N: Float[ndarray, " N"], k: int) -> Int[ndarray, " k"]:
    floor = np.partition(score_N, len(score_N) - k)[len(score_N) - k]
    above = np.flatnonzero(score_N > floor)
    level = np.flatnonzero(score_N == floor)[: k - len(above)]
    rows = np.sort(np.concatenate([above, level]))
    return rows[np.argsort(-score_N[rows], kind="stable")]


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError:
        raise ConfigError("bm25: the package bm25s is not installed; pip install bm25s") from None
    return bm25s
