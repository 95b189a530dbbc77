"""Salient spans: names, dates and quantities worth asking the language model about.

Guu et al. 2020 (section 3.4) mask named entities, found by a tagger trained on CoNLL-2003, and dates, found by a
regular expression. Neither was published; the rule tagger here needs no model, others are in `text.taggers`.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from realm_core.text.names import name_spans
from realm_core.text.quantities import date_spans, number_spans

LabelledSpan = tuple[int, int, str]  # start and right-exclusive stop in characters, label


@runtime_checkable
class Tagger(Protocol):
    """Finds salient spans. `name` and `version` are recorded with the corpus."""

    name: str
    version: str

    def spans(self, text: str, links: Sequence[LabelledSpan] = ()) -> list[LabelledSpan]:
        """Spans in order of their start, not overlapping. `links` are those of the source; a tagger may ignore them."""
        ...


class RuleTagger:
    """Dates, numbers with a unit, and capitalised names; no model needed."""

    name = "rules"
    version = "1"

    def spans(self, text: str, links: Sequence[LabelledSpan] = ()) -> list[LabelledSpan]:
        """Spans in order of their start, not overlapping."""
        dates = date_spans(text)
        # Names lie beside the dates: in "… in the United States July 18, 2018" the month is no part of the name.
        undated = _blank_out(text, dates)
        return merge_spans([*dates, *number_spans(text), *name_spans(undated)])


def _blank_out(text: str, spans: Sequence[LabelledSpan]) -> str:
    """The text with the spans overwritten by zeros; offsets stay."""
    parts, end = [], 0
    for start, stop, _ in spans:
        parts += [text[end:start], "0" * (stop - start)]
        end = stop
    return "".join([*parts, text[end:]])


def merge_spans(spans: Iterable[LabelledSpan]) -> list[LabelledSpan]:
    """Overlapping spans become one that covers them all; it takes the label of its longest member."""
    merged: list[LabelledSpan] = []
    longest = 0
    for start, stop, label in sorted(spans, key=lambda span: (span[0], -span[1], span[2])):
        if not merged or start >= merged[-1][1]:
            merged.append((start, stop, label))
            longest = stop - start
            continue
        first, last, kept = merged[-1]
        if stop - start > longest:
            longest, kept = stop - start, label
        merged[-1] = (first, max(last, stop), kept)
    return merged


def tokens_within(starts: Sequence[int], stops: Sequence[int], span: tuple[int, int]) -> tuple[int, int]:
    """Range (first, right-exclusive last) of the tokens that lie wholly inside the span; (0, 0) when there is none.

    Original code: language/realm masks exactly the wordpieces fully inside the span.
    """
    inside = [
        number
        for number, (start, stop) in enumerate(zip(starts, stops, strict=True))
        if span[0] <= start and stop <= span[1]
    ]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
