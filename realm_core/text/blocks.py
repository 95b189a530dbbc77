"""From a document to blocks: the passages that are embedded, retrieved and read.

Sentences are packed greedily until the title, the block and three special tokens fill 288 wordpieces (original code:
language/orqa, wiki preprocessor). A block is tokenised once, here; every later stage reads the stored ids.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha1, sha256
from typing import NamedTuple, Protocol, runtime_checkable

from realm_core.errors import ConfigError
from realm_core.text.sentences import Range, Splitter, make_splitter
from realm_core.text.spans import LabelledSpan, RuleTagger, Tagger, tokens_within
from realm_core.text.tokenizer import Tokenizer, encodable

SPECIALS_PER_BLOCK = 3  # [CLS] title [SEP] body [SEP]
SMALLEST_LIMIT = 16  # wordpieces; below this a title and one word hardly fit


@runtime_checkable
class SourceDocument(Protocol):
    """What packing needs of a document; `corpus.readers.Document` is one."""

    @property
    def doc_id(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def links(self) -> Sequence[Range]: ...


@dataclass(frozen=True, kw_only=True)
class Block:
    """One passage with its wordpieces. Token ranges and character ranges are right-exclusive.

    `sentence_starts` and `spans` index `token_ids`; `sentences` index `text`; `start` and `stop` are characters of the
    document. A span lies within one sentence.
    """

    block_id: str
    doc_id: str
    title: str
    text: str
    title_ids: Sequence[int]
    token_ids: Sequence[int]
    sentence_starts: Sequence[int]
    sentences: Sequence[Range]
    spans: Sequence[Range]
    start: int
    stop: int


class _Sentence(NamedTuple):
    start: int  # characters of the document
    stop: int
    text: str  # as it appears in the block
    ids: list[int]
    starts: list[int]  # characters of `text`
    stops: list[int]


def block_digest(title: str, text: str) -> str:
    """Identity of a block: 32 hexadecimal digits of sha256 over title and text. Never a row number."""
    return sha256(f"{len(title)}\n{title}\n{text}".encode("utf-8", "replace")).hexdigest()[:32]


def document_uid(title: str, body: str) -> str:
    """Identity of a retrieved document in the original code (language/realm): SHA-1 in hexadecimal."""
    return sha1(f"{title} <sep> {body}".encode("utf-8", "replace")).hexdigest()


def pack_document(
    doc: SourceDocument,
    tokenizer: Tokenizer,
    limit: int = 288,
    splitter: str | Splitter = "syntok",
    tagger: Tagger | None = None,
    split_long: bool = True,
    counts: Counter[str] | None = None,
    labels: Counter[str] | None = None,
) -> list[Block]:
    """Blocks of one document, in order; none for a document without a single wordpiece.

    `limit` counts wordpieces with the title and three special tokens. With `split_long` a sentence that cannot fit is
    split at word borders so that no block exceeds the limit; without it such a sentence becomes a block of its own, as
    in the original code. A title longer than half the limit is cut in `title_ids` (never in `title`). NUL characters
    are removed. The document's links are offered to the tagger. `counts`, if given, receives `sentences_split`,
    `titles_cut` and `characters_removed`, and `labels` the number of spans a label.
    """
    if limit < SMALLEST_LIMIT:
        raise ConfigError(f"block limit {limit} wordpieces is too small; use {SMALLEST_LIMIT} or more")
    counts = Counter() if counts is None else counts
    tagger = tagger or RuleTagger()
    split = make_splitter(splitter) if isinstance(splitter, str) else splitter
    title = _clean(doc.title).strip()
    title_ids = tokenizer.ids(title)
    if len(title_ids) > limit // 2:
        counts["titles_cut"] += 1
        title_ids = title_ids[: limit // 2]
    counts["characters_removed"] += doc.text.count("\0")
    room = limit - SPECIALS_PER_BLOCK - len(title_ids)
    sentences = _sentences(doc.text, tokenizer, split)
    if split_long:
        sentences = list(_fit_all(doc.text, sentences, room, tokenizer, counts))
    blocks = []
    for first, last in pack_lengths([len(sentence.ids) for sentence in sentences], room):
        packed = _packed(doc.doc_id, title, title_ids, sentences[first:last])
        links = _block_links(doc, sentences[first:last], packed.sentences)
        spans = _token_spans(tagger.spans(packed.text, links), sentences[first:last], packed, labels)
        blocks.append(replace(packed, spans=spans))
    return blocks


def pack_lengths(lengths: Sequence[int], room: int) -> list[Range]:
    """Greedy packing: ranges of consecutive sentences whose lengths (in wordpieces) add up to at most `room`.

    A sentence longer than `room` makes a range of its own.
    """
    ranges, first, filled = [], 0, 0
    for number, length in enumerate(lengths):
        if filled + length > room and number > first:
            ranges.append((first, number))
            first, filled = number, 0
        filled += length
    if lengths:
        ranges.append((first, len(lengths)))
    return ranges


def _clean(text: str) -> str:
    return encodable(text.replace("\0", ""))


def _sentences(text: str, tokenizer: Tokenizer, split: Splitter) -> list[_Sentence]:
    """Tokenised sentences; none if there is no wordpiece at all.

    Text without a wordpiece (control characters) belongs to the sentence before it, at the front to the one after it.
    """
    made: list[_Sentence] = []
    ends: list[int] = []  # where each sentence ends together with what follows it without a wordpiece
    lead: int | None = None
    for start, stop in split(encodable(text.replace("\0", " "))):  # keeps offsets, and sentences apart
        sentence = _sentence(text, start, stop, tokenizer)
        if sentence.ids:
            made.append(sentence if lead is None else _sentence(text, lead, stop, tokenizer))
            ends.append(stop)
            lead = None
        elif made:
            ends[-1] = stop
        elif lead is None:
            lead = start
    return [
        sentence if sentence.stop == end else sentence._replace(stop=end, text=_clean(text[sentence.start : end]))
        for sentence, end in zip(made, ends, strict=True)
    ]


def _sentence(text: str, start: int, stop: int, tokenizer: Tokenizer) -> _Sentence:
    body = _clean(text[start:stop])
    return _Sentence(start, stop, body, *tokenizer.ids_with_offsets(body))


def _fit_all(
    text: str, sentences: Sequence[_Sentence], room: int, tokenizer: Tokenizer, counts: Counter[str]
) -> Iterator[_Sentence]:
    for sentence in sentences:
        if len(sentence.ids) <= room:
            yield sentence
            continue
        counts["sentences_split"] += 1
        for start, stop in _parts(text, sentence.start, sentence.stop, room, tokenizer):
            part = _sentence(text, start, stop, tokenizer)
            if part.ids:
                yield part


def _parts(text: str, start: int, stop: int, room: int, tokenizer: Tokenizer) -> Iterator[Range]:
    """Ranges of at most `room` wordpieces that together cover text[start:stop], cut at white space where there is some.

    A cut inside a word can change how its pieces are cut, so every part is tokenised again and shortened until it fits.
    """
    ids, offsets, _ = tokenizer.ids_with_offsets(text[start:stop])
    starts = [start + offset for offset in offsets]
    begin, token = start, 0
    while begin < stop:
        last = min(token + room, len(ids))
        cut = _cut(text, starts, token, last, stop)
        excess = len(tokenizer.ids(text[begin:cut])) - room
        while excess > 0 and last > token + 1:
            last = max(token + 1, last - excess)
            cut = _cut(text, starts, token, last, stop)
            excess = len(tokenizer.ids(text[begin:cut])) - room
        stripped = text[begin:cut].strip()
        if stripped:
            lead = text[begin:cut].index(stripped)
            yield begin + lead, begin + lead + len(stripped)
        begin = cut
        while token < len(starts) and starts[token] < cut:
            token += 1


def _cut(text: str, starts: Sequence[int], first: int, last: int, stop: int) -> int:
    """Character before which to cut so that only tokens first..last-1 come before: a word border if one is near."""
    if last == len(starts):
        return stop
    for token in range(last, first + (last - first) // 2, -1):
        if text[starts[token] - 1].isspace():
            return starts[token]
    for token in range(last, first, -1):
        if starts[token] > starts[token - 1]:
            return starts[token]
    return _next_start(starts, last, stop)


def _next_start(starts: Sequence[int], token: int, stop: int) -> int:
    """First character after one that alone made all the tokens up to `token`."""
    return next((start for start in starts[token:] if start > starts[token]), stop)


def _packed(doc_id: str, title: str, title_ids: list[int], sentences: Sequence[_Sentence]) -> Block:
    """The block of these sentences, still without spans."""
    text = " ".join(sentence.text for sentence in sentences)
    token_ids: list[int] = []
    sentence_starts, ranges = [], []
    character = 0
    for sentence in sentences:
        sentence_starts.append(len(token_ids))
        token_ids.extend(sentence.ids)
        ranges.append((character, character + len(sentence.text)))
        character += len(sentence.text) + 1
    return Block(
        block_id=block_digest(title, text),
        doc_id=doc_id,
        title=title,
        text=text,
        title_ids=title_ids,
        token_ids=token_ids,
        sentence_starts=sentence_starts,
        sentences=ranges,
        spans=(),
        start=sentences[0].start,
        stop=sentences[-1].stop,
    )


def _block_links(doc: SourceDocument, sentences: Sequence[_Sentence], ranges: Sequence[Range]) -> list[LabelledSpan]:
    """Links of the document as ranges of the block's text; one that leaves its sentence is left out."""
    links, found = doc.links, []
    number = bisect_left(links, (sentences[0].start, 0)) if links else 0
    for sentence, (low, _) in zip(sentences, ranges, strict=True):
        while number < len(links) and links[number][0] < sentence.start:
            number += 1
        while number < len(links) and links[number][0] < sentence.stop:
            start, stop = links[number]
            number += 1
            if start < stop <= sentence.stop:
                before = len(_clean(doc.text[sentence.start : start]))
                found.append((low + before, low + before + len(_clean(doc.text[start:stop])), "LINK"))
    return found


def _token_spans(
    tagged: Sequence[LabelledSpan], sentences: Sequence[_Sentence], block: Block, labels: Counter[str] | None
) -> list[Range]:
    """Tagged spans as ranges of block tokens; a span that crosses a sentence border or covers no token is left out."""
    found: dict[Range, str] = {}
    number = 0
    for start, stop, label in tagged:
        while number < len(sentences) and block.sentences[number][1] <= start:
            number += 1
        if number == len(sentences):
            break
        low, high = block.sentences[number]
        if start < low or stop > high:
            continue
        sentence, begin = sentences[number], block.sentence_starts[number]
        first, last = tokens_within(sentence.starts, sentence.stops, (start - low, stop - low))
        if last > first:
            found[begin + first, begin + last] = label
    if labels is not None:
        labels.update(found.values())
    return sorted(found)
