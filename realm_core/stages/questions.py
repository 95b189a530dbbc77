"""Stage `questions`: a question file -> train, dev and test sets."""

from collections import Counter
from pathlib import Path

from realm_core.artifacts.manifest import Manifest, Plan, file_sha256
from realm_core.artifacts.publish import building, finished
from realm_core.config import Config
from realm_core.data.questions import Question, read_questions, write_questions
from realm_core.errors import DataError
from realm_core.ports import MetricSink
from realm_core.stages import CODE

SPLITS = ("train", "dev", "test")


def plan(config: Config, *, source: Path) -> Plan:
    """What `run` would make from `source`."""
    if not source.is_file():
        raise DataError(f"{source}: no such question file; pass a JSON-lines file with question and answers")
    sources = {"questions": file_sha256(source)}
    return Plan(stage="questions", code=CODE["questions"], config_digest=config.digest(), sources=sources)


def run(config: Config, *, source: Path, out: Path, sink: MetricSink) -> Manifest:
    """Split by the field `split`, or by ORQA's rule plus a held-out tenth for test where a question has none.

    Raises DataError naming file and line, or the split that came out empty.
    """
    doing = plan(config, source=source)
    if done := finished(out, doing):
        return done
    questions = list(read_questions(source, on_error=config.corpus.on_error, test_tenth=True))
    counts = Counter(question.split for question in questions)
    for split in SPLITS:
        if not counts[split]:
            raise DataError(f"{source}: no {split} questions among {len(questions)}; add some, or a split field")
    with building(out, doing) as build:
        for split in SPLITS:
            write_questions(build.folder / f"{split}.jsonl", [item for item in questions if item.split == split])
        sink.log(0, {f"questions/{split}": counts[split] for split in SPLITS})
        return build.commit({split: counts[split] for split in SPLITS})


def load(folder: Path, split: str) -> list[Question]:
    """Questions of one split of a finished question set."""
    return list(read_questions(folder / f"{split}.jsonl"))
