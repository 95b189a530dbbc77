"""Pages of a MediaWiki XML dump (export-0.3 of 2006 to today's), streamed through expat.

Expat tells where it stands, so that every complaint names a byte; a document type declaration, the door of entity
bombs, is refused; and no page, tag or nesting is allowed to grow without limit. A dump that ends in the middle keeps its
complete pages, and the tally says where it was cut.
"""

import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.parsers import expat

from realm_core.corpus.documents import Document, Tally, title_kind
from realm_core.corpus.files import DAMAGED, Stream, damage, open_stream
from realm_core.errors import ConfigError, DataError
from realm_core.text.wikitext import FILE_AND_CATEGORY, is_disambiguation, is_redirect

LONGEST_PAGE = 16 << 20  # characters of wikitext; MediaWiki itself stops at 2 MiB
LONGEST_FIELD = 4096  # characters of a title, an id, a namespace
_LONGEST_TAG = 1 << 20  # bytes of a tag or comment, which expat keeps whole
_EXPAT_BUFFER = 1 << 16  # bytes of text handed over at once
_DEEPEST = 32  # elements; a dump needs seven
_MOST_NAMESPACES = 1000  # the largest wikis have some fifty

# What the prefixes of titles meant before dumps carried <ns>. A dump's own <siteinfo> adds its language's names.
_NAMESPACES = {
    "media": -2,
    "special": -1,
    "talk": 1,
    "user": 2,
    "user talk": 3,
    "wikipedia": 4,
    "project": 4,
    "wikipedia talk": 5,
    "image": 6,
    "file": 6,
    "image talk": 7,
    "file talk": 7,
    "mediawiki": 8,
    "mediawiki talk": 9,
    "template": 10,
    "template talk": 11,
    "help": 12,
    "help talk": 13,
    "category": 14,
    "category talk": 15,
    "portal": 100,
    "portal talk": 101,
    "draft": 118,
    "module": 828,
}
_FIELDS = {
    "namespace": ("namespaces",),
    "title": ("page",),
    "ns": ("page",),
    "id": ("page",),
    "model": ("revision",),
    "text": ("revision",),
}


def read_mediawiki(path: str | Path, on_error: str = "fail", tally: Tally | None = None) -> Iterator[Document]:
    """Articles of a dump (.xml, .bz2, .gz, multistream too), their text still wikitext.

    Left out and counted: redirects; in `tally.dropped` pages of other namespaces (`namespace`), list and disambiguation
    pages (`list_page`, `disambiguation`), deleted text (`no_text`), other content than wikitext (`not_wikitext`), pages
    beyond LONGEST_PAGE (`too_long`). Of several revisions the last counts. With on_error="skip" damage in the middle
    ends the reading as a cut does. Raises DataError for a damaged dump, or one without a complete page.
    """
    if on_error not in ("fail", "skip"):
        raise ConfigError(f"on_error={on_error!r} is unknown; choose 'fail' or 'skip'")
    path, tally = Path(path), tally or Tally()
    before = tally.pages
    with open_stream(path) as stream:
        parser = _DumpParser(path)
        for page in _pages(stream, parser, path, on_error, tally):
            if document := _article(page, parser, path, tally):
                tally.documents += 1
                yield document
    if parser.version:
        tally.note("export", parser.version)
    if tally.pages == before:
        where = f" before {parser.cut}" if parser.cut else ""
        raise DataError(
            f"{path}: no complete page{where}; expected a MediaWiki export, as dumps.wikimedia.org offers it"
        )


def _pages(stream: Stream, parser: "_DumpParser", path: Path, on_error: str, tally: Tally) -> Iterator["_Page"]:
    ended = False
    while not ended:
        try:
            piece = stream.read()
        except EOFError:  # the compressed file is cut: what came out of it is sound
            piece = b""
        except (*DAMAGED, OSError) as error:
            found = damage(error, path, f"at byte {stream.position} of its content")
            if on_error == "fail":
                raise found from None
            _note_cut(tally, parser, f"byte {stream.position}: damaged, {error}")
            return
        ended = not piece
        try:
            parser.feed(piece)
        except (LookupError, ValueError) as error:  # Python's word on an encoding that expat does not know itself
            if parser.begun:
                raise
            raise DataError(
                f"{path}: its XML declaration names an encoding that cannot be read ({error}); convert the dump to UTF-8"
            ) from None
        except expat.ExpatError as error:
            reason = expat.errors.messages.get(error.code, "malformed")
            if not ended and on_error == "fail":
                raise DataError(
                    f"{path}: byte {parser.byte}: not well-formed XML ({reason}); fetch the dump again, or keep the "
                    "pages before it with --on-error skip"
                ) from None
            yield from parser.take()
            within = f", inside page {parser.page.title[:100]!r}" if parser.page else ""
            _note_cut(tally, parser, f"byte {parser.byte}: {'ends early' if ended else reason}{within}")
            return
        yield from parser.take()


def _note_cut(tally: Tally, parser: "_DumpParser", where: str) -> None:
    parser.cut = where
    tally.note("cut", where)


def _article(page: "_Page", parser: "_DumpParser", path: Path, tally: Tally) -> Document | None:
    if page.redirect or is_redirect(page.text):
        tally.redirects += 1
        return None
    if reason := _reason_to_drop(page, parser):
        tally.dropped[reason] += 1
        return None
    place = f"{path}: page {page.title[:100]!r}"
    return Document(page.id or page.title, page.title, page.text, place=place, hidden=parser.hidden)


def _reason_to_drop(page: "_Page", parser: "_DumpParser") -> str | None:
    if parser.namespace(page) != 0:
        return "namespace"
    if page.too_long:
        return "too_long"
    if page.model not in ("", "wikitext"):
        return "not_wikitext"
    if page.deleted:
        return "no_text"
    return title_kind(page.title) or ("disambiguation" if is_disambiguation(page.text) else None)


class _Page:
    def __init__(self) -> None:
        self.title = self.id = self.ns = self.model = self.text = ""
        self.redirect = self.deleted = self.too_long = False


class _DumpParser:
    """Turns expat's events into pages."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._expat = expat.ParserCreate()
        self._expat.buffer_text = True
        self._expat.buffer_size = _EXPAT_BUFFER
        self._expat.StartElementHandler = self._start
        self._expat.EndElementHandler = self._end
        self._expat.StartDoctypeDeclHandler = self._doctype
        self._open: list[str] = []
        self._field = ""
        self._parts: list[str] = []
        self._length = 0
        self._fed = 0
        self._done: deque[_Page] = deque()
        self._key = ""
        self._names = dict(_NAMESPACES)
        self.page: _Page | None = None
        self.version = self.cut = ""
        self.hidden = tuple(sorted(FILE_AND_CATEGORY))

    @property
    def begun(self) -> bool:
        """Whether an element has been met: what comes before can only be a declaration."""
        return bool(self._open or self._done)

    @property
    def byte(self) -> int:
        """Where the parser stands, in bytes of the expanded dump."""
        return max(self._expat.CurrentByteIndex, self._expat.ErrorByteIndex, 0)

    def feed(self, piece: bytes) -> None:
        """Parse the next bytes; none at all mean the end."""
        self._fed += len(piece)
        self._expat.Parse(piece, not piece)
        if piece and self._fed - self.byte > _LONGEST_TAG + len(piece):
            raise DataError(f"{self._path}: byte {self.byte}: a tag longer than {_LONGEST_TAG} bytes; this is no dump")

    def take(self) -> Iterator[_Page]:
        """Pages completed since the last call."""
        while self._done:
            yield self._done.popleft()

    def namespace(self, page: _Page) -> int:
        """Number of the page's namespace; without <ns> it follows from the title."""
        if (number := _whole_number(page.ns)) is not None:
            return number
        prefix, colon, _ = page.title.partition(":")
        return self._names.get(_folded(prefix), 0) if colon else 0

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if not self._open:
            if name != "mediawiki":
                raise DataError(
                    f"{self._path}: the root element is <{name[:100]}>, expected <mediawiki>; this is no dump"
                )
            self.version = attributes.get("version", "")[:20]
        if len(self._open) >= _DEEPEST:
            raise DataError(f"{self._path}: byte {self.byte}: elements nested deeper than {_DEEPEST}; this is no dump")
        parent = self._open[-1] if self._open else ""
        self._open.append(name)
        if name == "page":
            self.page = _Page()
        elif name == "redirect" and self.page and parent == "page":
            self.page.redirect = True
        if parent in _FIELDS.get(name, ()):
            self._field, self._parts, self._length = name, [], 0
            self._expat.CharacterDataHandler = self._text
            if name == "namespace":
                self._key = attributes.get("key", "")
            if name == "text" and self.page:
                self.page.deleted, self.page.too_long = "deleted" in attributes, False

    def _text(self, data: str) -> None:
        self._length += len(data)
        if self._length <= (LONGEST_PAGE if self._field == "text" else LONGEST_FIELD):
            self._parts.append(data)
        elif self._field == "text" and self.page:
            self.page.too_long = True
            self._parts = []

    def _end(self, name: str) -> None:
        self._open.pop()
        if self._field == name:
            self._close_field("".join(self._parts))
        if name == "page" and self.page:
            self._done.append(self.page)
            self.page = None

    def _close_field(self, value: str) -> None:
        name, self._field, self._parts = self._field, "", []
        self._expat.CharacterDataHandler = None
        if name == "namespace":
            self._learn(value)
        elif self.page and not (name == "id" and self.page.id):
            setattr(self.page, name, value if name == "text" else value.strip())

    def _learn(self, name: str) -> None:
        number = _whole_number(self._key)
        if not name or number is None:
            return
        self._names[_folded(name)] = number
        if len(self._names) > _MOST_NAMESPACES:
            raise DataError(f"{self._path}: byte {self.byte}: more than {_MOST_NAMESPACES} namespaces; this is no dump")
        if number in (-2, 6, 14):  # media, file, category
            self.hidden = tuple(sorted({*self.hidden, _folded(name)}))

    def _doctype(self, *_: Any) -> None:
        raise DataError(
            f"{self._path}: byte {self.byte}: a document type declaration; dumps have none, and entities could expand "
            "without limit: refused"
        )


def _whole_number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else None


def _folded(name: str) -> str:
    return name.strip().lower().replace("_", " ")
