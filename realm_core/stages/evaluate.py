"""Stage `evaluate`: questions, a retriever and a reader -> recall@k and exact match, with every prediction kept."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from realm_core.artifacts.manifest import Manifest, Plan, open_artifact, read_manifest
from realm_core.artifacts.publish import building, finished
from realm_core.baselines.bm25 import Bm25
from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.data.questions import Question
from realm_core.errors import ArtifactError
from realm_core.evaluate.questions import evaluate_predictions
from realm_core.evaluate.reading import Reading, read_answer
from realm_core.evaluate.retrieval import retrieval_recall
from realm_core.index.version import IndexVersion, open_version
from realm_core.model.device import Device, resolve
from realm_core.model.reader import Reader
from realm_core.ports import MetricSink, Progress
from realm_core.stages import CODE
from realm_core.stages.finetune import QUESTION_TOWER, load_reader, with_question_tower
from realm_core.stages.questions import load as load_questions
from realm_core.text.tokenizer import Tokenizer

SECTIONS = ("runtime", "lengths", "reader", "evaluate")


def plan(
    config: Config,
    *,
    index: Path | None,
    checkpoint: Path | None,
    reader: Path,
    corpus: Path,
    questions: Path,
    split: str,
) -> Plan:
    """What `run` would make; `index` None means BM25."""
    parents = {
        "reader": read_manifest(reader),
        "corpus": read_manifest(corpus),
        "questions": read_manifest(questions),
    }
    if index is not None and checkpoint is not None:
        parents |= {"index": read_manifest(index), "checkpoint": read_manifest(checkpoint)}
    asked = parents["questions"].files.get(f"{split}.jsonl")
    if asked is None:
        raise ArtifactError(f"{questions}: holds no {split} questions; pass the folder of a question set")
    return Plan(
        stage="evaluate",
        code=CODE["evaluate"],
        config_digest=config.digest(*SECTIONS),
        parents=parents,
        sources={split: asked},
    )


def run(
    config: Config,
    *,
    index: Path | None,
    checkpoint: Path | None,
    reader: Path,
    reader_start: Path,
    corpus: Path,
    questions: Path,
    split: str,
    out: Path,
    sink: MetricSink,
) -> Manifest:
    """Score one split. `reader_start` is the checkpoint the reader was fine-tuned from."""
    doing = plan(
        config,
        index=index,
        checkpoint=checkpoint,
        reader=reader,
        corpus=corpus,
        questions=questions,
        split=split,
    )
    if done := finished(out, doing):
        return done
    open_artifact(reader, "finetune")
    open_artifact(questions, "questions")
    config.require_fits(len(Corpus.open(corpus)), "evaluate.ks")
    device = resolve(config.runtime, shared=split == "dev")
    asked = load_questions(questions, split)
    if split == "dev":
        asked = asked[: config.evaluate.dev_questions]
    with building(out, doing) as build:
        pipeline = open_pipeline(
            config,
            index=index,
            checkpoint=checkpoint,
            reader=reader,
            reader_start=reader_start,
            corpus=corpus,
            device=device,
        )
        scores, rows = score(pipeline, asked, config)
        with (build.folder / "predictions.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        facts: dict[str, Any] = {"split": split, "questions": len(asked), "metrics": scores}
        if index is not None:
            facts["step"] = read_manifest(index).facts["step"]
        sink.log(int(facts.get("step", 0)), scores)
        return build.commit(facts)


@dataclass(frozen=True)
class Pipeline:
    """Everything that turns a question into an answer."""

    corpus: Corpus
    tokenizer: Tokenizer
    reader: Reader
    index: IndexVersion | None  # None: BM25
    adds_relevance: bool  # whether the reader was trained with the retriever's score in its softmax
    device: Device
    reader_length: int
    reader_beam: int

    def retrieve(self, questions: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, scores) of the k best blocks of every question, "Q k" each."""
        if self.index is None:
            scores, rows = Bm25.over(self.corpus).search(questions, k)
            return rows, scores
        longest = self.index.retriever.query_tower.shape.max_positions - 2
        asked = [ids[:longest] for ids in self.tokenizer.batch_ids(questions)]
        vectors = self.index.embed(asked, length=None)
        scores, rows = self.index.search_vectors(vectors, k)
        return rows, scores

    def read(self, question: str, rows: Sequence[int], scores: Sequence[float]) -> Reading | None:
        """The best span over the first blocks of `rows`."""
        beam = list(rows[: self.reader_beam])
        relevance = list(scores[: len(beam)]) if self.adds_relevance else [0.0] * len(beam)
        return read_answer(
            self.reader,
            self.corpus,
            self.tokenizer.ids(question),
            beam,
            relevance,
            tokenizer=self.tokenizer,
            length=self.reader_length,
            device=self.device,
        )


def open_pipeline(
    config: Config,
    *,
    index: Path | None,
    checkpoint: Path | None,
    reader: Path,
    reader_start: Path,
    corpus: Path,
    device: Device,
) -> Pipeline:
    """Open retriever and reader. The fine-tuned question tower is used only on indexes of the checkpoint it was tuned on: on
    any other, questions are embedded by the checkpoint the index was built from."""
    made = read_manifest(reader)
    if made.parents["checkpoint"] != read_manifest(reader_start).digest:
        raise ArtifactError(f"{reader}: not fine-tuned from {reader_start}; pass the checkpoint it started from")
    version = None
    adds_relevance = False
    if index is not None:
        assert checkpoint is not None, "an index comes with its checkpoint"
        version = open_version(index, checkpoint=checkpoint, corpus=corpus, device=device)
        # Whatever the corpus, the vectors of one checkpoint are of one space: a tower tuned on them fits all its versions.
        adds_relevance = (
            "index" in made.parents and made.parents["checkpoint"] == version.manifest.parents["checkpoint"]
        )
        if adds_relevance and (reader / QUESTION_TOWER).is_file():
            with_question_tower(version.retriever, reader).to(device.torch_device)
    opened = version.corpus if version is not None else Corpus.open(corpus)
    return Pipeline(
        corpus=opened,
        tokenizer=opened.tokenizer,
        reader=load_reader(reader).to(device.torch_device),
        index=version,
        adds_relevance=adds_relevance,
        device=device,
        reader_length=config.lengths.reader,
        reader_beam=config.reader.reader_beam,
    )


# The gate compares the first and the report shows both, whatever else `evaluate.ks` asks for. A corpus of fewer blocks than
# the first is looked at whole.
REPORTED_KS = (5, 20)


def score(
    pipeline: Pipeline, asked: Sequence[Question], config: Config
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(metrics, one row a question with prediction and evidence)."""
    ks = {*config.evaluate.ks, *(k for k in REPORTED_KS if k <= max(REPORTED_KS[0], len(pipeline.corpus)))}
    widest = min(max(*ks, config.reader.reader_beam), len(pipeline.corpus))
    rows_QK, scores_QK = pipeline.retrieve([question.question for question in asked], widest)
    bar = Progress("answer questions", len(asked), unit="questions")
    predictions, records, texts = {}, [], []
    for number, (question, rows, scores) in enumerate(zip(asked, rows_QK, scores_QK, strict=True), start=1):
        reading = pipeline.read(question.question, rows.tolist(), scores.tolist())
        if reading is not None:
            predictions[question.question] = reading.text
        texts.append(pipeline.corpus.texts(rows.tolist()))
        records.append(
            {
                "question": question.question,
                "answers": list(question.answers),
                "prediction": reading.text if reading else None,
                "block": str(pipeline.corpus.block_ids[reading.row]) if reading else None,
                "retrieved": [str(pipeline.corpus.block_ids[row]) for row in rows[: config.reader.reader_beam]],
            }
        )
        bar.update(number)
    recall = retrieval_recall(
        texts,
        [question.answers for question in asked],
        sorted(ks),
        config.evaluate.rule,
        answer_types=[question.answer_type for question in asked],
    )
    metrics = {name: float(value) for name, value in recall.items() if name.startswith(("recall_at_", "mean_"))}
    matched = evaluate_predictions(asked, predictions, seed=config.seed)
    metrics["exact_match"] = float(matched["exact_match"])
    correct = {row["question"]: row["correct"] for row in matched["per_question"]}
    return metrics, [{**record, "correct": correct[record["question"]]} for record in records]
