"""Answer scoring: normalised exact match, and regular expressions for CuratedTREC.

Both follow the original evaluation code (google-research/language, orqa/evaluation and orqa/utils/eval_utils). What is
added is a bound on the time a regular expression may take, since patterns come from data.
"""

import functools
import re
import string
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import regex

Outcome = Literal["match", "no match", "invalid pattern", "timeout"]

REGEX_SECONDS = 0.5  # for one pattern on one prediction; honest patterns need microseconds
_MAX_PATTERN = 10_000  # characters
_MAX_COPIES = 100_000  # parts a pattern may have once its least repeat counts are written out, as `regex` does
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """NFD, lower case, no ASCII punctuation, articles to a space, white space squeezed.

    Combining marks and non-ASCII punctuation stay: "Café" is not "Cafe".
    """
    lowered = unicodedata.normalize("NFD", text).lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", lowered).split())


def exact_match(prediction: str, answers: Iterable[str]) -> bool:
    """True if the normalised prediction equals a normalised answer."""
    normalised = normalize_answer(prediction)
    return any(normalised == normalize_answer(answer) for answer in answers)


@dataclass(frozen=True, kw_only=True)
class RegexVerdict:
    """Whether a prediction matched, and the patterns that could not be tried."""

    matched: bool
    invalid: tuple[str, ...] = ()
    timed_out: tuple[str, ...] = ()


def regex_match(prediction: str, patterns: Iterable[str], seconds: float = REGEX_SECONDS) -> RegexVerdict:
    """Whether a pattern matches at the *start* of the raw prediction (`re.match`; case ignored, Unicode, multi-line).

    "Newtonian" matches `Newton`, "Sir Isaac Newton" does not. An invalid pattern, and one that takes longer than
    `seconds`, counts as no match and is named in the verdict.
    """
    outcomes = [(pattern, match_pattern(prediction, pattern, seconds)) for pattern in patterns]
    return RegexVerdict(
        matched=any(outcome == "match" for _, outcome in outcomes),
        invalid=tuple(pattern for pattern, outcome in outcomes if outcome == "invalid pattern"),
        timed_out=tuple(pattern for pattern, outcome in outcomes if outcome == "timeout"),
    )


def match_pattern(text: str, pattern: str, seconds: float = REGEX_SECONDS, anywhere: bool = False) -> Outcome:
    """Try one pattern within `seconds`, at the start of the text or anywhere in it."""
    compiled = _compile(pattern)
    if compiled is None:
        return "invalid pattern"
    attempt = compiled.search if anywhere else compiled.match
    try:
        return "match" if attempt(text, timeout=seconds) else "no match"
    except TimeoutError:
        return "timeout"
    except (MemoryError, RecursionError, regex.error):
        return "invalid pattern"


@functools.lru_cache(maxsize=4096)
def _compile(pattern: str) -> Any:
    """The pattern if Python's `re` (the reference) and `regex` (which can be interrupted) both accept it, else None."""
    if len(pattern) > _MAX_PATTERN:
        return None
    flags = re.IGNORECASE | re.UNICODE | re.MULTILINE
    try:
        re.compile(pattern, flags)
        if _copies(re._parser.parse(pattern, flags)) > _MAX_COPIES:  # type: ignore[attr-defined]
            return None
        return regex.compile(pattern, regex.VERSION0 | regex.IGNORECASE | regex.UNICODE | regex.MULTILINE)
    except (re.error, regex.error, OverflowError, RecursionError, MemoryError, ValueError):
        return None


def _copies(part: Any) -> int:
    """Size of a parsed pattern with its least repeats written out: `((a{1000}){1000}){1000}` would fill memory."""
    if isinstance(part, re._parser.SubPattern):  # type: ignore[attr-defined]
        return sum(_copies(item) for item in part)
    if not isinstance(part, tuple | list):
        return 1
    if len(part) == 2 and str(part[0]).endswith("_REPEAT"):
        least, _, repeated = part[1]
        return max(1, int(least)) * _copies(repeated)
    return sum(_copies(item) for item in part)
