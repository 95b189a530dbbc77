"""Does a passage contain an answer, and where? The rules differ between papers; a report must name the one it used."""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import regex
from jaxtyping import Int64
from numpy import ndarray

from realm_core.errors import ConfigError

_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


RULES = ("substring", "tokens")


def has_answer(text: str, answers: Sequence[str], rule: str = "substring") -> bool:
    """Whether the passage contains one of the answers.

    "substring": raw and case-sensitive, without word borders; an empty answer is in every text (original code:
    HasAnswer of language/orqa). "tokens": see has_answer_tokens.
    """
    if rule == "substring":
        return any(answer in text for answer in answers)
    if rule == "tokens":
        return has_answer_tokens(text, answers)
    raise ConfigError(f"answer rule {rule!r} is unknown; choose one of {', '.join(RULES)}")


def has_answer_tokens(text: str, answers: Sequence[str]) -> bool:
    """An answer's words occur in a row in the text, in NFD and lower case, as DPR counts (Karpukhin et al. 2020).

    An answer without any word is in no text.
    """
    words = f" {' '.join(answer_words(text))} "
    return any(wanted != "  " and wanted in words for wanted in map(_as_words, answers))


@lru_cache(maxsize=65_536)  # the answers of a question are looked for in thousands of passages
def _as_words(answer: str) -> str:
    return f" {' '.join(answer_words(answer))} "


def answer_words(text: str) -> list[str]:
    """Lower-cased words and single symbols in NFD."""
    return [word.lower() for word in _TOKEN.findall(unicodedata.normalize("NFD", text))]


def gold_spans(
    block_ids: Sequence[int] | ndarray, answer_ids: Sequence[Sequence[int]], offset: int = 0, kept: int | None = None
) -> Int64[ndarray, "M 2"]:
    """Inclusive (start, end) of every occurrence, overlapping ones too, of every answer's wordpieces in a block.

    Order: by answer, then by position. Only the first `kept` block tokens are searched (those the reader sees);
    `offset` is added to all positions. Original code: ReaderInputs of language/orqa.
    """
    block = np.asarray(block_ids, dtype=np.int64)[:kept]
    found: list[tuple[int, int]] = []
    for answer in answer_ids:
        width = len(answer)
        if not 0 < width <= len(block):
            continue
        windows = np.lib.stride_tricks.sliding_window_view(block, width)
        starts = np.flatnonzero((windows == np.asarray(answer, dtype=np.int64)).all(axis=1))
        found.extend((offset + start, offset + start + width - 1) for start in starts.tolist())
    return np.array(found, dtype=np.int64).reshape(-1, 2)
