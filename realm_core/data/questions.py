"""Question sets: JSON lines with answers, and the rule that splits a set that brings no split of its own."""

import gzip
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from realm_core.corpus.readers import BadLine, checked_text, read_records, string_field
from realm_core.data.farmhash import fingerprint64
from realm_core.errors import ConfigError, DataError

ANSWER_TYPES = ("string", "regex", "sentence")
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Question:
    """`answers` are alternatives: strings, regular expressions, or sentences that contain the answer."""

    id: str
    question: str
    answers: tuple[str, ...]
    answer_type: str = "string"
    split: str = "train"


def read_questions(
    path: str | Path,
    on_error: str = "fail",
    counts: Counter[str] | None = None,
    split: str | None = None,
    test_tenth: bool = False,
) -> Iterator[Question]:
    """Stream {"id"?, "question", "answers" (or "answer"), "answer_type"?, "split"?} from a .jsonl file (.gz, .bz2 too).

    A missing id becomes `<file name>-<number>`. The split is the argument, else the record's field, else `split_of` the
    question. Errors carry `path:line`; with on_error="skip" bad lines are counted in `counts`. Raises DataError for a
    file without questions.
    """
    make = QuestionMaker(path, split, test_tenth)
    yield from read_records(path, make, on_error, Counter() if counts is None else counts)
    make.require_some()


class QuestionMaker:
    """Makes questions from the records of one file; ids are unique within it."""

    def __init__(
        self, path: str | Path, split: str | None = None, test_tenth: bool = False, answer_type: str = "string"
    ) -> None:
        if split is not None and split not in SPLITS:
            raise ConfigError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
        self._path, self._split, self._test_tenth, self._answer_type = Path(path), split, test_tenth, answer_type
        self._stem = Path(self._path.name.removesuffix(".gz").removesuffix(".bz2")).stem
        self._seen: set[str] = set()

    def __call__(self, record: dict[str, Any]) -> Question:
        """The question of a record; see read_questions. Raises BadLine."""
        text = string_field(record, "question")
        if not text.strip():
            raise BadLine("empty_question", "the question is empty")
        name = record.get("id")
        made = Question(
            f"{self._stem}-{len(self._seen)}" if name is None else str(name),
            text,
            _answers(record),
            _choice(record, "answer_type", ANSWER_TYPES) or self._answer_type,
            self._split or _choice(record, "split", SPLITS) or split_of(text, self._test_tenth),
        )
        if made.id in self._seen:
            raise BadLine("duplicate_id", f"the id {made.id!r} occurred before; ids must be unique")
        self._seen.add(made.id)
        return made

    def require_some(self) -> None:
        """Raises DataError if the file gave no question."""
        if not self._seen:
            raise DataError(f"{self._path}: no questions; expected one JSON object with question and answers a line")


def write_questions(path: str | Path, questions: Iterable[Question]) -> None:
    """Write what read_questions reads; equal questions give equal bytes, compressed if the name ends in .gz."""
    path = Path(path)
    lines = "".join(json.dumps(_record(question), ensure_ascii=False) + "\n" for question in questions).encode("utf-8")
    if path.suffix == ".gz":
        buffer = io.BytesIO()
        with gzip.GzipFile(fileobj=buffer, mode="wb", filename="", mtime=0) as file:
            file.write(lines)
        lines = buffer.getvalue()
    path.write_bytes(lines)


def orqa_bucket(question: str) -> int:
    """Bucket 0..99999 of a question: TensorFlow's to_hash_bucket_fast, FarmHash Fingerprint64 modulo 100000."""
    return fingerprint64(question.encode("utf-8")) % 100_000


def split_of(question: str, test_tenth: bool = False) -> str:
    """ORQA's re-split of original training data: dev for one question in ten by bucket, else train.

    ORQA tests on another original file. For a set that has no such file, `test_tenth` makes a test split of one
    in ten of the remaining questions, by the sha256 of the question; dev stays what it is without.
    """
    if orqa_bucket(question) % 10 == 0:
        return "dev"
    if test_tenth and int.from_bytes(sha256(question.encode("utf-8")).digest()[:8], "big") % 10 == 0:
        return "test"
    return "train"


def _answers(record: dict[str, Any]) -> tuple[str, ...]:
    name = "answers" if "answers" in record or "answer" not in record else "answer"
    if name not in record:
        raise BadLine("missing_field", f"the field 'answers' is missing; found {', '.join(sorted(map(str, record)))}")
    given = record[name]
    answers = [given] if isinstance(given, str) else given
    if not isinstance(answers, list):
        raise BadLine("wrong_type", f"the field {name!r} is {type(given).__name__}, expected a list of texts")
    # A blank alias, as TriviaQA has some, would be found in every passage.
    texts = tuple(text for answer in answers if (text := checked_text(answer, name)).strip())
    if not texts:
        raise BadLine("no_answer", f"the field {name!r} holds no answer; give at least one or leave the question out")
    return texts


def _choice(record: dict[str, Any], name: str, known: tuple[str, ...]) -> str | None:
    value = record.get(name)
    if value is not None and value not in known:
        raise BadLine("unknown_value", f"{name} is {value!r}, expected one of {', '.join(known)}")
    return value


def _record(question: Question) -> dict[str, Any]:
    return {
        "id": question.id,
        "question": question.question,
        "answers": list(question.answers),
        "answer_type": question.answer_type,
        "split": question.split,
    }
