"""Documents from files, one at a time. Whatever is wrong with a line is said with the file and the line number."""

import gzip
import html
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from realm_core.errors import ConfigError, DataError

Record = TypeVar("Record")


@dataclass(frozen=True)
class Document:
    """One page or article. `doc_id` is unique within a corpus and stable from one version to the next."""

    doc_id: str
    title: str
    text: str


class BadLine(Exception):
    """One line that cannot be used; the kind names the counter it goes to."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def text_digest(*parts: str) -> str:
    """32 hexadecimal digits that identify a sequence of strings."""
    return sha256("".join(f"{len(part)}\n{part}" for part in parts).encode("utf-8", "replace")).hexdigest()[:32]


def read_jsonl(path: str | Path, on_error: str = "fail", counts: Counter[str] | None = None) -> Iterator[Document]:
    """Stream documents {"id"?, "title", "text"} from a .jsonl or .jsonl.gz file; other fields are ignored.

    A missing id becomes the digest of title and text. With on_error="fail" the first bad line raises DataError with
    `path:line`; with "skip" bad lines are counted in `counts` by kind (bad_json, missing_field, wrong_type,
    duplicate_id, bad_text). A file without any document, or a damaged gzip file, is always an error.
    """
    counts = Counter() if counts is None else counts
    seen: set[str] = set()

    def document(record: dict[str, Any]) -> Document:
        title, text = string_field(record, "title"), string_field(record, "text")
        made = Document(_identifier(record, title, text), title, text)
        if made.doc_id in seen:
            what = "same title and text" if record.get("id") is None else f"id {made.doc_id!r}"
            raise BadLine("duplicate_id", f"the {what} occurred before; every document needs an id of its own")
        seen.add(made.doc_id)
        return made

    yield from read_records(path, document, on_error, counts)
    if not seen:
        raise DataError(f"{path}: no documents; expected one JSON object with title and text a line")


def read_wikiextractor(
    path: str | Path, on_error: str = "fail", counts: Counter[str] | None = None
) -> Iterator[Document]:
    """JSON lines as WikiExtractor writes them: list-like pages are dropped and HTML entities of the text resolved.

    Original code: language/orqa, wiki preprocessor. Dropped pages are counted as `list_page`.
    """
    counts = Counter() if counts is None else counts
    for document in read_jsonl(path, on_error, counts):
        if is_list_page(document.title):
            counts["list_page"] += 1
        else:
            yield replace(document, text=html.unescape(document.text))


Reader = Callable[..., Iterator[Document]]
READERS: dict[str, Reader] = {"jsonl": read_jsonl, "wikiextractor": read_wikiextractor}


def is_list_page(title: str) -> bool:
    """Lists, indexes, outlines and disambiguation pages, by their title (original code: language/orqa)."""
    return bool(re.match(r"(?:List|Index|Outline) of .+", title)) or "(disambiguation)" in title


def read_records(
    path: str | Path, parse: Callable[[dict[str, Any]], Record], on_error: str, counts: Counter[str]
) -> Iterator[Record]:
    """Apply `parse` to the JSON object of every line; blank lines are passed over."""
    if on_error not in ("fail", "skip"):
        raise ConfigError(f"on_error={on_error!r} is unknown; choose 'fail' or 'skip'")
    for number, line in _lines(Path(path)):
        try:
            record = parse(_json_object(line))
        except BadLine as problem:
            if on_error == "fail":
                raise DataError(f"{path}:{number}: {problem}") from None
            counts[problem.kind] += 1
            continue
        yield record


def string_field(record: dict[str, Any], name: str) -> str:
    """A field that must be there and hold text."""
    if name not in record:
        found = ", ".join(sorted(map(str, record))) or "nothing"
        raise BadLine("missing_field", f"the field {name!r} is missing; found {found}")
    return checked_text(record[name], name)


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
    if given is None:
        return text_digest(title, text)
    if isinstance(given, int) and not isinstance(given, bool):
        return str(given)
    if checked_text(given, "id") == "":
        raise BadLine("wrong_type", "the field 'id' is empty; leave it out or give every document its own")
    return str(given)


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLine("bad_text", f"not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise BadLine("bad_json", f"not JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError):
        raise BadLine("bad_json", "not usable JSON (nested too deeply, or a number with too many digits)") from None
    if not isinstance(value, dict):
        raise BadLine("wrong_type", f"a JSON {type(value).__name__}, expected an object")
    return value


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank, without byte order mark and line end."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                line = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
                if line:
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file after line {number} ({error}); fetch the file again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
