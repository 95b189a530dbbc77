"""Capitalised names, by rule: good enough to choose what to mask where no trained tagger is at hand."""

import re
from collections.abc import Sequence
from typing import NamedTuple

# A dotted title, initials ("J.R.R.", "U.S."), or a word; the possessive 's is no part of it.
_WORD = re.compile(
    r"(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Gen|Col|Lt|Capt|Sgt|Rev|Gov|Sen)\."
    r"|(?:[A-Z]\.)+"
    r"|[^\W\d_]\w*(?:[-'’](?!s\b)\w+)*"
)
_SENTENCE_BORDER = re.compile(r"[.!?:][^\w]*\s|\n\s*\n|[\"“”‘]")
_JOINS_WORDS = re.compile(r"\s")
_MOST_CONNECTORS = 2  # lower-case words in a row inside a name: "Bank of the West"
_CONNECTORS = frozenset("of the de la le du des del della di da do dos van von der den ter bin ibn al el".split())
# Words that are capitalised because of where they stand, not because they name something.
_COMMON = frozenset(
    """
a about above according after afterwards again against all almost along already also although always am among an and
another any are around as at away back be because been before behind being below between both but by can cannot could
currently despite did do does during each earlier early either eight even eventually every except few finally five
following for former formerly four from further generally had has have having he hence her here hers him his
historically how however i i'm if in including indeed instead into is it its itself just last late later less like
lists many may me meanwhile might more moreover most mostly much must my near nearly neither never nevertheless next
nine no nobody none nor not nothing now of off often on once one only onto or originally other others our out over own
part perhaps previously rather recently see seven several shall she should similarly since six so some sometimes soon
still subsequently such ten than that the their them themselves then there thereafter therefore these they this those
though three through throughout thus to today together too toward two typically ultimately under unlike until up upon
us usually various very was we well were what when where whereas whether which while who whom whose why will with
within without would yes yet you your
""".split()
)


class _Word(NamedTuple):
    start: int  # characters
    stop: int
    text: str
    opens: bool  # stands where any word would be capitalised

    @property
    def capitalised(self) -> bool:
        return self.text[0].isupper()

    @property
    def common(self) -> bool:
        return self.text.lower() in _COMMON and not (len(self.text) > 1 and self.text.isupper())


def name_spans(text: str) -> list[tuple[int, int, str]]:
    """Maximal runs of capitalised words, possibly joined by short connectors ("Bank of England").

    A word that opens a sentence counts only if it is no function word and the text gives another reason to believe in
    the name: a capitalised neighbour, or the same word capitalised in mid-sentence. A word that the text also writes
    in lower case is no name there. A text mostly in capitals gives nothing.
    """
    words = _words(text)
    if 2 * sum(len(word.text) > 1 and word.text.isupper() for word in words) > len(words):
        return []
    lowered = {word.text for word in words if word.text.islower()}
    inside = {word.text for word in words if word.capitalised and not word.opens}
    found = []
    position = 0
    while position < len(words):
        stop = _run_end(words, position, text)
        run = _without_lead(words[position:stop], lowered, inside)
        position = max(position + 1, stop)
        if run and not (len(run) == 1 and (len(run[0].text) < 2 or run[0].text.endswith("."))):
            found.append((run[0].start, run[-1].stop, "NAME"))
    return found


def _words(text: str) -> list[_Word]:
    words: list[_Word] = []
    before = 0
    for match in _WORD.finditer(text):
        opens = before == 0 or _SENTENCE_BORDER.search(text, before, match.start()) is not None
        words.append(_Word(match.start(), match.end(), match.group(), opens))
        before = match.end()
    return words


def _run_end(words: Sequence[_Word], first: int, text: str) -> int:
    """End of the longest run of capitalised words from `first` on; connectors count only between two of them."""
    if not words[first].capitalised:
        return first
    end = first + 1
    for number in range(first + 1, len(words)):
        word, previous = words[number], words[number - 1]
        if word.opens or not _JOINS_WORDS.fullmatch(text, previous.stop, word.start):
            break
        if word.capitalised and not (previous.text.endswith(".") and word.common):
            end = number + 1
        elif word.text not in _CONNECTORS or number - end >= _MOST_CONNECTORS:
            break
    return end


def _without_lead(run: Sequence[_Word], lowered: set[str], inside: set[str]) -> Sequence[_Word]:
    """Drop function words at the front, and a sentence's first word that nothing else marks as a name."""
    for number, word in enumerate(run):
        several = number + 1 < len(run)
        named = not word.opens or (word.text.lower() not in lowered and (several or word.text in inside))
        if named and not word.common and word.text not in _CONNECTORS:
            return run[number:]
    return []
