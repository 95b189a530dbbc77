"""Question -> answer with its evidence and the index version it came from."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from realm_core.artifacts.manifest import open_artifact
from realm_core.artifacts.store import Live, Store
from realm_core.errors import ArtifactError, DataError
from realm_core.model.device import resolve
from realm_core.stages.evaluate import Pipeline, open_pipeline


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One retrieved block."""

    title: str
    text: str
    block_id: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What `realm ask` prints. `passages` are best first; `evidence` is the one the answer was read from."""

    question: str
    answer: str | None
    evidence: Passage | None
    passages: list[Passage]
    index: str
    index_digest: str
    reader: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Answerer:
    """Answers from one index version: the one that was live when it was opened, unless another is named."""

    def __init__(self, live: Live, pipeline: Pipeline, reader: str) -> None:
        self.live, self.pipeline, self.reader = live, pipeline, reader

    @classmethod
    def open(cls, store: Store, version: str | None = None) -> "Answerer":
        """Open an index version, the live one by default, with the reader fine-tuned on it, else with the newest reader
        there is.

        Raises ArtifactError if nothing is live, the version is gone, or no reader has been trained.
        """
        live = store.require_live() if version is None else _as_live(store, version)
        config = store.config()
        index = store.path("indexes", live.index)
        if open_artifact(index, "index").digest != live.index_digest:
            raise ArtifactError(f"{index}: not the index live.json names; promote a version again")
        reader = _reader_for(store, live)
        pipeline = open_pipeline(
            config,
            index=index,
            checkpoint=store.parent(index, "checkpoint"),
            reader=reader,
            reader_start=store.parent(reader, "checkpoint"),
            corpus=store.parent(index, "corpus"),
            device=resolve(config.runtime),
        )
        return cls(live, pipeline, f"{reader.parent.name}/{reader.name}")

    def ask(self, question: str, k: int = 5) -> Answer:
        """Answer one question from the k best passages shown and the reader's beam read."""
        if not question.strip():
            raise DataError("the question is empty; ask something")
        if k > (blocks := len(self.pipeline.corpus)):
            raise DataError(f"k={k}: more than the {blocks} blocks of the corpus; ask for fewer")
        width = max(k, self.pipeline.reader_beam)
        rows, scores = (array[0].tolist() for array in self.pipeline.retrieve([question], width))
        reading = self.pipeline.read(question, rows, scores)
        passages = [self._passage(row, score) for row, score in zip(rows, scores, strict=True)]
        return Answer(
            question=question,
            answer=reading.text if reading else None,
            evidence=passages[reading.place] if reading else None,
            passages=passages[:k],
            index=self.live.index,
            index_digest=self.live.index_digest,
            reader=self.reader,
        )

    def _passage(self, row: int, score: float) -> Passage:
        block = self.pipeline.corpus.block(row)
        return Passage(title=block.title, text=block.text, block_id=block.block_id, score=score)


def _as_live(store: Store, version: str) -> Live:
    """A version named by a caller in the place of the pointer."""
    made = store.manifest("indexes", version)
    return Live(
        index=version,
        index_digest=made.digest,
        checkpoint_digest=made.parents["checkpoint"],
        generation=0,
        promoted_at=0.0,
        reason="asked for by name",
    )


def _reader_for(store: Store, live: Live) -> Path:
    """The reader tuned on the live index; else the newest one tuned on another; else the sparse baseline's."""
    tuned = store.names("readers")
    for name in reversed(tuned):
        if store.manifest("readers", name).parents.get("index") == live.index_digest:
            return store.path("readers", name)
    return store.path("readers", tuned[-1]) if tuned else store.newest("sparse_readers")
