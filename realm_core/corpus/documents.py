"""What every reader gives: documents, and a tally of what became of the records it read."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from realm_core.errors import DataError, quoted


@dataclass(frozen=True)
class Document:
    """One page or article. `doc_id` is unique within a corpus and stable from one version to the next.

    `links` are character ranges of `text`, in order. `place` says where the document stood. With `hidden` the text is
    wikitext, still to be converted, and `hidden` are the namespaces whose links show nothing.
    """

    doc_id: str
    title: str
    text: str
    links: Sequence[tuple[int, int]] = ()
    place: str = field(default="", compare=False)
    hidden: tuple[str, ...] | None = None


@dataclass
class Tally:
    """What a reader met: every page or record is a document, a redirect, or dropped for a reason."""

    documents: int = 0
    redirects: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: dict[str, str] = field(default_factory=dict)  # the kind of dump, where a truncated one was cut

    @property
    def pages(self) -> int:
        """All pages or records read."""
        return self.documents + self.redirects + self.dropped.total()

    def note(self, name: str, value: str) -> None:
        """Remember a fact about the input; several files may each add one."""
        known = self.notes.get(name)
        self.notes[name] = value if known in (None, value) else f"{known}; {value}"

    def to_json(self) -> dict[str, Any]:
        """Plain values; see restore."""
        return {**vars(self), "dropped": dict(self.dropped)}

    def restore(self, values: dict[str, Any]) -> None:
        """Take over what `to_json` gave."""
        self.documents, self.redirects = values["documents"], values["redirects"]
        self.dropped, self.notes = Counter(values["dropped"]), dict(values["notes"])


class BadLine(Exception):
    """One record that cannot be used; the kind names the counter it goes to."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class NoArticle(Exception):
    """A sound record that is no article, and is left out for the reason `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


def bad_record(place: str, problem: BadLine, on_error: str, dropped: Counter[str]) -> None:
    """Count a bad record, or stop at it. Raises DataError naming the place."""
    if on_error == "fail":
        raise DataError(
            f"{place}: {problem}; mend it, or leave such records out with --set corpus.on_error=skip"
        ) from None
    dropped[problem.kind] += 1


def document_of(record: dict[str, Any], place: str = "") -> Document:
    """The document of {"id"?, "title", "text"}; a missing id becomes the digest of title and text. Raises BadLine."""
    title, text = string_field(record, "title"), string_field(record, "text")
    return Document(_identifier(record, title, text), title, text, place=place)


def text_digest(*parts: str) -> str:
    """32 hexadecimal digits that identify a sequence of strings."""
    return sha256("".join(f"{len(part)}\n{part}" for part in parts).encode("utf-8", "replace")).hexdigest()[:32]


def is_list_page(title: str) -> bool:
    """Lists, indexes, outlines and disambiguation pages, by their title (original code: language/orqa)."""
    return title_kind(title) is not None


def title_kind(title: str) -> str | None:
    """ "list_page" or "disambiguation" for titles that are no articles (original code: language/orqa)."""
    if re.match(r"(?:List|Index|Outline) of .+", title):
        return "list_page"
    return "disambiguation" if "(disambiguation)" in title else None


def string_field(record: dict[str, Any], name: str) -> str:
    """A field that must be there and hold text."""
    if name not in record:
        raise BadLine("missing_field", f"the field {name!r} is missing; found {names_of(record)}")
    return checked_text(record[name], name)


def names_of(fields: Iterable[Any]) -> str:
    """Names of fields as a message shows them: those of an input may be many, long, or no text at all."""
    names = sorted(map(str, fields))
    shown = [name if name.isprintable() and len(name) <= 40 else quoted(name, 40) for name in names[:10]]
    return ", ".join([*shown, *([f"and {len(names) - 10} more"] if len(names) > 10 else [])]) or "nothing"


def identifier(given: Any) -> str:
    """The id of a document as a file gives it: text, or a whole number. Raises BadLine."""
    if isinstance(given, int) and not isinstance(given, bool):
        return str(given)
    if checked_text(given, "id") == "":
        raise BadLine("wrong_type", "the field 'id' is empty; leave it out or give every document its own")
    return str(given)


def checked_text(value: Any, name: str) -> str:
    """`value` if it is text that a UTF-8 file can hold."""
    if not isinstance(value, str):
        raise BadLine("wrong_type", f"the field {name!r} is {type(value).__name__}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadLine("bad_text", f"the field {name!r} holds half a surrogate pair, which is no character") from None
    return value


def _identifier(record: dict[str, Any], title: str, text: str) -> str:
    given = record.get("id")
    return text_digest(title, text) if given is None else identifier(given)
