"""Where sentences begin and end, as character ranges of the text they came from."""

import re
from collections.abc import Callable

from syntok import segmenter

from realm_core.errors import ConfigError

Range = tuple[int, int]  # start and right-exclusive stop, in characters
Splitter = Callable[[str], list[Range]]

_PARAGRAPH_BREAK = re.compile(r"\n[^\S\n]*\n")
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++[\"'”’)\]]*+(?=\s+[\"'“‘(\[]*[A-Z0-9À-Þ])")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Gen|Col|Capt|Lt|Sgt|Rev|Hon|Gov|Sen|Rep|vs|etc|e\.g|i\.e|cf|ca|c|"
    r"No|Nos|Vol|pp|Fig|Inc|Ltd|Co|Corp|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|approx|U\.S|U\.K)\.$"
)
_LONGEST_STRETCH = 20_000  # characters given to syntok at once; its run time must not depend on one hostile line


def split_sentences(text: str, splitter: str = "syntok") -> list[Range]:
    """Ranges of the sentences of `text`, in order, not overlapping, trimmed, together covering all non-space text.

    "syntok" is the good one; "simple" is a rule without dependencies, some ten times faster. Blank lines always end
    a sentence; single line breaks do not, because many corpora wrap their lines.
    """
    return make_splitter(splitter)(text)


def make_splitter(name: str) -> Splitter:
    """The splitter with that name."""
    if name not in SPLITTERS:
        raise ConfigError(f"sentence splitter {name!r} is unknown; choose one of {', '.join(sorted(SPLITTERS))}")
    return SPLITTERS[name]


def _simple(text: str) -> list[Range]:
    starts = [match.end() for match in _PARAGRAPH_BREAK.finditer(text)]
    for match in _SENTENCE_END.finditer(text):
        before = text[max(0, match.start() - 12) : match.start() + 1]
        if not _ABBREVIATION.search(before):
            starts.append(match.end())
    return _ranges(text, starts)


def _syntok(text: str) -> list[Range]:
    starts = []
    for begin, end in _stretches(text):
        starts.append(begin)
        for paragraph in segmenter.analyze(text[begin:end]):
            starts.extend(begin + sentence[0].offset for sentence in paragraph)
    return _ranges(text, starts)


def _stretches(text: str) -> list[Range]:
    """Cut a text at blank lines, and an over-long paragraph at a space near the permitted length."""
    stretches, begin = [], 0
    ends = [*(match.start() for match in _PARAGRAPH_BREAK.finditer(text)), len(text)]
    for end in ends:
        while end - begin > _LONGEST_STRETCH:
            space = text.rfind(" ", begin + _LONGEST_STRETCH // 2, begin + _LONGEST_STRETCH)
            cut = space if space > 0 else begin + _LONGEST_STRETCH
            stretches.append((begin, cut))
            begin = cut
        stretches.append((begin, end))
        begin = end
    return stretches


def _ranges(text: str, starts: list[int]) -> list[Range]:
    """Ranges between neighbouring starts, without surrounding white space; empty ones vanish."""
    ranges = []
    ordered = sorted({0, *starts})
    for start, stop in zip(ordered, [*ordered[1:], len(text)], strict=True):
        piece = text[start:stop]
        lead = len(piece) - len(piece.lstrip())
        trimmed = piece.strip()
        if trimmed:
            ranges.append((start + lead, start + lead + len(trimmed)))
    return ranges


SPLITTERS: dict[str, Splitter] = {"syntok": _syntok, "simple": _simple}
