"""Public question sets in the formats of their originals: NQ-open, WebQuestions, CuratedTREC, TriviaQA, SQuAD, DPR.

All end as `Question`s. The big JSON files are one array each, and are read item by item in constant memory.
"""

import ast
import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from realm_core.corpus.documents import BadLine, bad_record
from realm_core.corpus.files import DAMAGED, LONGEST_LINE, Stream, damage, numbered_lines, open_stream
from realm_core.corpus.readers import read_records, tab_cells
from realm_core.data.questions import Question, QuestionMaker
from realm_core.errors import ConfigError, DataError

FORMATS = ("auto", "jsonl", "nq", "webquestions", "trec", "triviaqa", "squad", "dpr")
_DESCRIPTION = re.compile(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^\s()"]+))\)')
_MOST_ANSWERS = 1 << 20  # characters of a Python list in a DPR file


def read_question_file(
    path: str | Path,
    form: str = "auto",
    *,
    on_error: str = "fail",
    counts: Counter[str] | None = None,
    split: str | None = None,
    test_tenth: bool = False,
) -> Iterator[Question]:
    """Questions of a file (.gz, .bz2 too) in one of FORMATS; "auto" goes by the file's name and first characters.

    jsonl, nq: one JSON object a line with question and answer(s). trec: the same, or tab-separated number, kind,
    question, pattern; its answers are regular expressions. webquestions: an array with utterance and targetValue.
    triviaqa: {"Data": […]}; an answer's value and its aliases count. squad: {"data": […]}; questions without an answer
    are left out and counted as `no_answer`. dpr: tab-separated question and list of answers.
    Splits, ids and errors are those of `read_questions`. Raises DataError for a file without questions.
    """
    if form not in FORMATS:
        raise ConfigError(f"question format {form!r} is unknown; choose one of {', '.join(FORMATS)}")
    path, counts = Path(path), Counter() if counts is None else counts
    chosen = form_of(path) if form == "auto" else form
    make = QuestionMaker(path, split, test_tenth, "regex" if chosen == "trec" else "string")
    if chosen in ("jsonl", "nq") or (chosen == "trec" and not _tabular(path)):
        yield from read_records(path, make, on_error, counts)
    else:
        for place, record in _RECORDS[chosen](path):
            try:
                yield make(record())
            except BadLine as problem:
                if problem.kind == "no_answer":
                    counts["no_answer"] += 1
                else:
                    bad_record(place, problem, on_error, counts)
    make.require_some()


def form_of(path: Path) -> str:
    """The format that the file's name or its first characters suggest."""
    if _tabular(path):
        with open_stream(path) as stream:
            first = _read(stream, path)[:4096].split(b"\n")[0]
        return "trec" if first.count(b"\t") == 3 else "dpr"
    with open_stream(path) as stream:
        head = _read(stream, path)[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(b"["):
        return "webquestions"
    if re.match(rb'\{\s*"Data"\s*:', head):
        return "triviaqa"
    if re.match(rb'\{\s*("version"\s*:\s*"[^"]*"\s*,\s*)?"data"\s*:', head):
        return "squad"
    return "jsonl"


Records = Iterator[tuple[str, Callable[[], dict[str, Any]]]]  # a place, and what makes the record or raises BadLine


def _webquestions(path: Path) -> Records:
    for place, item in json_items(path, None):

        def record(item: Any = item) -> dict[str, Any]:
            target = _field(item, "targetValue")
            found = [plain or _unescaped(quoted) for quoted, plain in _DESCRIPTION.findall(target)]
            if not found:
                raise BadLine("no_answer", "no description in targetValue")
            return {"question": _field(item, "utterance"), "answers": list(dict.fromkeys(found))}

        yield place, record


def _triviaqa(path: Path) -> Records:
    for place, item in json_items(path, "Data"):

        def record(item: Any = item) -> dict[str, Any]:
            answer = item.get("Answer") if isinstance(item, dict) else None
            if not isinstance(answer, dict):
                raise BadLine("no_answer", "no Answer: the test questions are published without")
            given = [answer.get("Value"), *_list(answer, "Aliases")]
            found = [text for text in given if isinstance(text, str) and text]
            if not found:
                raise BadLine("no_answer", "no Value and no Aliases")
            return {
                "id": _field(item, "QuestionId"),
                "question": _field(item, "Question"),
                "answers": list(dict.fromkeys(found)),
            }

        yield place, record


def _squad(path: Path) -> Records:
    for place, article in json_items(path, "data"):
        for paragraph in _list(article, "paragraphs"):
            for item in _list(paragraph, "qas"):

                def record(item: Any = item) -> dict[str, Any]:
                    question = _field(item, "question")
                    found = [_field(answer, "text") for answer in _list(item, "answers")]
                    if not found:
                        raise BadLine("no_answer", "no answers")
                    return {"id": item.get("id"), "question": question, "answers": list(dict.fromkeys(found))}

                yield place, record


def _dpr(path: Path) -> Records:
    for number, line in numbered_lines(path):

        def record(line: bytes | None = line) -> dict[str, Any]:
            question, *rest = tab_cells(line)
            if len(rest) != 1:
                raise BadLine("bad_row", f"{1 + len(rest)} columns, expected question and answers")
            return {"question": question, "answers": _python_list(rest[0])}

        yield f"{path}:{number}", record


def _trec(path: Path) -> Records:
    for number, line in numbered_lines(path):

        def record(line: bytes | None = line) -> dict[str, Any]:
            cells = tab_cells(line)
            if len(cells) != 4:
                raise BadLine("bad_row", f"{len(cells)} columns, expected number, kind, question, pattern")
            return {"id": cells[0], "question": cells[2], "answers": [cells[3].strip()]}

        yield f"{path}:{number}", record


_RECORDS: dict[str, Callable[[Path], Records]] = {
    "webquestions": _webquestions,
    "triviaqa": _triviaqa,
    "squad": _squad,
    "dpr": _dpr,
    "trec": _trec,
}


def json_items(path: Path, key: str | None) -> Iterator[tuple[str, Any]]:
    """Place and value of every item of the array under `key` (or of the array that is the file), one at a time.

    Raises DataError for anything that is not such an array, naming the item.
    """
    decoder = json.JSONDecoder()
    with open_stream(path) as stream:
        text = _Text(stream, path)
        opening = r"\s*\[" if key is None else rf'"{key}"\s*:\s*\['
        while (start := re.search(opening, text.buffer)) is None:
            if len(text.buffer) > 1 << 20 or not text.more():
                raise DataError(f"{path}: no array {f'under {key!r} ' if key else ''}in it; is this the original file?")
        text.drop(start.end())
        for number in range(1 << 62):
            while not (rest := text.buffer.lstrip(", \t\r\n")) and text.more():
                pass
            if rest.startswith("]"):
                return
            text.buffer = rest
            yield f"{path}: item {number}", _next_item(decoder, text, f"{path}: item {number}")


def _next_item(decoder: json.JSONDecoder, text: "_Text", place: str) -> Any:
    while True:
        try:
            value, end = decoder.raw_decode(text.buffer)
        except (ValueError, RecursionError) as error:
            if len(text.buffer) > LONGEST_LINE or not text.more():
                reason = getattr(error, "msg", type(error).__name__)
                raise DataError(f"{place}: not complete JSON ({reason}); fetch the file again") from None
            continue
        text.drop(end)
        return value


class _Text:
    """Decoded text of a stream, as much as has been asked for."""

    def __init__(self, stream: Stream, path: Path) -> None:
        self._stream, self._path = stream, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.buffer = ""

    def more(self) -> bool:
        """Read on: as much again as there is, so that an item is tried few times. False at the end."""
        wanted, parts = max(len(self.buffer), 1), []
        while wanted > 0:
            piece = _read(self._stream, self._path)
            try:
                decoded = self._decoder.decode(piece, final=not piece)
            except UnicodeDecodeError:
                raise DataError(f"{self._path}: not UTF-8 near byte {self._stream.position}; fetch it again") from None
            if not piece:
                break
            parts.append(decoded)
            wanted -= len(decoded)
        self.buffer += "".join(parts)
        return bool(parts)

    def drop(self, count: int) -> None:
        """Forget the first characters."""
        self.buffer = self.buffer[count:]


def _read(stream: Stream, path: Path) -> bytes:
    try:
        return stream.read()
    except (*DAMAGED, OSError) as error:
        raise damage(error, path, f"at byte {stream.position} of its content") from None


def _tabular(path: Path) -> bool:
    name = path.name.lower().removesuffix(".gz").removesuffix(".bz2")
    return name.endswith((".tsv", ".csv"))


def _python_list(text: str) -> list[Any]:
    """A list written as Python source, as DPR does. Only literals are understood."""
    try:
        value = ast.literal_eval(text) if len(text) <= _MOST_ANSWERS else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        value = None
    if not isinstance(value, list):
        raise BadLine("bad_row", "the second column is no list of answers")
    return value


def _unescaped(quoted: str) -> str:
    try:
        return str(json.loads(f'"{quoted}"'))
    except ValueError:
        return quoted


def _list(record: Any, name: str) -> list[Any]:
    value = record.get(name) if isinstance(record, dict) else None
    return value if isinstance(value, list) else []


def _field(record: Any, name: str) -> str:
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, str):
        raise BadLine("missing_field", f"no text under {name!r}")
    return value
