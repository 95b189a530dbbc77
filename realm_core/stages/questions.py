"""Stage `questions`: a question file -> train, dev and test sets."""

from collections import Counter
from pathlib import Path

from realm_core.artifacts.manifest import Manifest, Plan, file_sha256
from realm_core.artifacts.publish import building, finished
from realm_core.config import Config
from realm_core.data.question_files import FORMATS, read_question_file
from realm_core.data.questions import Question, read_questions, write_questions
from realm_core.errors import ConfigError, DataError
from realm_core.ports import MetricSink
from realm_core.stages import CODE

SPLITS = ("train", "dev", "test")


def plan(config: Config, *, source: Path, test: Path | None = None, form: str = "auto") -> Plan:
    """What `run` would make from `source`."""
    for path in (source, *([test] if test else [])):
        if not path.is_file():
            raise DataError(f"{path}: no such question file; pass a JSON-lines file with question and answers")
    if form not in FORMATS:
        raise ConfigError(f"question format {form!r} is unknown; choose one of {', '.join(FORMATS)}")
    sources = {"questions": file_sha256(source)}
    if test is not None:
        sources["test questions"] = file_sha256(test)
    if form != "auto":
        sources[f"as {form}"] = form
    return Plan(stage="questions", code=CODE["questions"], config_digest=config.digest(), sources=sources)


def run(
    config: Config, *, source: Path, out: Path, sink: MetricSink, test: Path | None = None, form: str = "auto"
) -> Manifest:
    """Split by the field `split`, or by ORQA's rule where a question has none.

    With `test`, the original's own dev or test file, train and dev come from `source` and test from `test`, as in ORQA.
    Without, a tenth of what is not dev is held out for test. `form` is one of data.question_files.FORMATS.
    Raises DataError naming file and line, or the split that came out empty.
    """
    doing = plan(config, source=source, test=test, form=form)
    if done := finished(out, doing):
        return done
    questions, dropped = _read(config, source, test, form)
    counts = Counter(question.split for question in questions)
    with building(out, doing) as build:
        for split in SPLITS:
            write_questions(build.folder / f"{split}.jsonl", [item for item in questions if item.split == split])
        sink.log(0, {f"questions/{split}": counts[split] for split in SPLITS})
        kinds = Counter(question.answer_type for question in questions)
        facts = {"dropped": dict(sorted(dropped.items())), "answer_types": dict(sorted(kinds.items()))}
        return build.commit({**{split: counts[split] for split in SPLITS}, **facts})


def require_readable(config: Config, source: Path) -> None:
    """Raise what `run` would say of this file, before hours are spent on the stages that come first."""
    plan(config, source=source)
    _read(config, source, None, "auto")


def _read(config: Config, source: Path, test: Path | None, form: str) -> tuple[list[Question], Counter[str]]:
    """(questions, how many were left out and why)."""
    dropped: Counter[str] = Counter()
    on_error = config.corpus.on_error
    questions = list(read_question_file(source, form, on_error=on_error, counts=dropped, test_tenth=test is None))
    if test is not None:
        questions = [_without_test(question) for question in questions]
        questions += read_question_file(test, form, on_error=on_error, counts=dropped, split="test")
    _require_unique([question.id for question in questions], source)
    counts = Counter(question.split for question in questions)
    for split in SPLITS:
        if not counts[split]:
            raise DataError(f"{source}: no {split} questions among {len(questions)}; add some, or a split field")
    return questions, dropped


def load(folder: Path, split: str) -> list[Question]:
    """Questions of one split of a finished question set."""
    return list(read_questions(folder / f"{split}.jsonl"))


def _without_test(question: Question) -> Question:
    if question.split == "test":
        raise DataError(f"question {question.id!r} is marked as test in the training file; drop --test, or the mark")
    return question


def _require_unique(ids: list[str], source: Path) -> None:
    name, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise DataError(f"{source}: the id {name!r} occurs in the training and in the test file; ids must be unique")
