"""Documents from text files, one at a time. Whatever is wrong with a line is said with the file and the line number.

A reader is a function (path, on_error, tally) -> documents. With on_error="fail" the first bad record raises DataError;
with "skip" bad records are counted in `tally.dropped` by kind. A damaged file, or one without any document, is always an
error. Repeated ids are found later, when the documents are dealt out to shards.
"""

import html
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from realm_core.corpus.documents import (
    BadLine,
    Document,
    NoArticle,
    Tally,
    bad_record,
    checked_text,
    document_of,
    is_list_page,
    string_field,
    text_digest,
    title_kind,
)
from realm_core.corpus.files import LONGEST_LINE, numbered_lines
from realm_core.errors import ConfigError, DataError

__all__ = [
    "BadLine",
    "Document",
    "checked_text",
    "is_list_page",
    "read_dpr",
    "read_jsonl",
    "read_records",
    "read_wikiextractor",
    "string_field",
    "tab_cells",
    "text_digest",
]

Record = TypeVar("Record")


def read_jsonl(path: str | Path, on_error: str = "fail", tally: Tally | None = None) -> Iterator[Document]:
    """Stream documents {"id"?, "title", "text"} from a .jsonl file (.gz, .bz2 too); other fields are ignored.

    Kinds of bad lines: bad_json, missing_field, wrong_type, bad_text, too_long.
    """
    yield from _documents(path, on_error, tally, lambda record, place: document_of(record, place))


def read_wikiextractor(path: str | Path, on_error: str = "fail", tally: Tally | None = None) -> Iterator[Document]:
    """JSON lines as WikiExtractor writes them: list-like pages are dropped and HTML entities of the text resolved.

    Original code: language/orqa, wiki preprocessor.
    """

    def document(record: dict[str, Any], place: str) -> Document:
        made = document_of(record, place)
        if kind := title_kind(made.title):
            raise NoArticle(kind)
        return replace(made, text=html.unescape(made.text))

    yield from _documents(path, on_error, tally, document)


def read_dpr(path: str | Path, on_error: str = "fail", tally: Tally | None = None) -> Iterator[Document]:
    """Passages of DPR's psgs_w100.tsv (Karpukhin et al. 2020): tab-separated id, text and title, quoted like CSV.

    Every passage is a document of its own, because passages of one article are cut at word counts, not at sentences.
    """
    path, tally = Path(path), tally or Tally()
    columns: list[str] | None = None
    found = 0
    for number, line in numbered_lines(path):
        try:
            cells = tab_cells(line)
            if columns is None:
                columns = _dpr_columns(cells)
                if columns == cells:
                    continue
            if len(cells) != len(columns):
                raise BadLine("missing_field", f"{len(cells)} columns, expected {len(columns)}: {', '.join(columns)}")
            document = document_of(dict(zip(columns, cells, strict=True)), f"{path}:{number}")
        except BadLine as problem:
            bad_record(f"{path}:{number}", problem, on_error, tally.dropped)
            continue
        found += 1
        tally.documents += 1
        yield document
    if not found:
        raise DataError(f"{path}: no passages; expected tab-separated id, text and title a line")


def read_records(
    path: str | Path, parse: Callable[[dict[str, Any]], Record], on_error: str, counts: Counter[str]
) -> Iterator[Record]:
    """Apply `parse` to the JSON object of every line; blank lines are passed over."""
    yield from _placed_records(Path(path), lambda record, _: parse(record), on_error, counts)


def _placed_records(
    path: Path, parse: Callable[[dict[str, Any], str], Record], on_error: str, counts: Counter[str]
) -> Iterator[Record]:
    if on_error not in ("fail", "skip"):
        raise ConfigError(f"on_error={on_error!r} is unknown; choose 'fail' or 'skip'")
    for number, line in numbered_lines(path):
        place = f"{path}:{number}"
        try:
            record = parse(json_object(line), place)
        except BadLine as problem:
            bad_record(place, problem, on_error, counts)
            continue
        except NoArticle as reason:
            counts[reason.kind] += 1
            continue
        yield record


def _documents(
    path: str | Path,
    on_error: str,
    tally: Tally | None,
    parse: Callable[[dict[str, Any], str], Document],
) -> Iterator[Document]:
    tally = tally or Tally()
    before = tally.dropped.total()
    found = 0
    for document in _placed_records(Path(path), parse, on_error, tally.dropped):
        found += 1
        tally.documents += 1
        yield document
    if not found:
        dropped = tally.dropped.total() - before
        raise DataError(
            f"{path}: no documents among {dropped} lines; expected one JSON object with title and text a line"
        )


def json_object(line: bytes | None) -> dict[str, Any]:
    """The JSON object of a line. Raises BadLine."""
    if line is None:
        raise BadLine("too_long", f"longer than {LONGEST_LINE} bytes")
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


def tab_cells(line: bytes | None) -> list[str]:
    """Cells of a tab-separated line, quoted like CSV where they must be. Raises BadLine."""
    if line is None:
        raise BadLine("too_long", f"longer than {LONGEST_LINE} bytes")
    try:
        return [_unquoted(cell) for cell in line.decode("utf-8").split("\t")]
    except UnicodeDecodeError as error:
        raise BadLine("bad_text", f"not UTF-8 at byte {error.start} of the line") from None


def _unquoted(cell: str) -> str:
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"'
    return cell[1:-1].replace('""', '"') if quoted else cell


def _dpr_columns(first: list[str]) -> list[str]:
    """The columns a header names, else those of psgs_w100.tsv."""
    return first if {"text", "title"} <= set(first) else ["id", "text", "title"]
