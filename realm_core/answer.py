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
    """Answers from the index that was live when it was opened, or from the one that was asked for."""

    def __init__(self, live: Live, pipeline: Pipeline, reader: str) -> None:
        self.live, self.pipeline, self.reader = live, pipeline, reader

    @classmethod
    def open(cls, store: Store, as_of: str | None = None) -> "Answerer":
        """Open the live index with the reader fine-tuned on it, else with the newest reader there is.

        `as_of` is the name of another index version, or its digest or the beginning of that: it answers as it did when it
        was live, for as long as the version and the weights of its checkpoint are kept. Raises ArtifactError if nothing is
        live, no reader has been trained, or there is no such version.
        """
        live = store.require_live() if as_of is None else _version(store, as_of)
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


def _reader_for(store: Store, live: Live) -> Path:
    """The reader tuned on the index; else on another of its checkpoint; else on any; else the sparse baseline's."""
    tuned = store.names("readers")
    for name in reversed(tuned):
        if store.manifest("readers", name).parents.get("index") == live.index_digest:
            return store.path("readers", name)
    for name in reversed(tuned):
        if store.manifest("readers", name).parents.get("checkpoint") == live.checkpoint_digest:
            return store.path("readers", name)
    return store.path("readers", tuned[-1]) if tuned else store.newest("sparse_readers")


def _version(store: Store, as_of: str) -> Live:
    """An index version by name or digest, as the pointer would name it."""
    for name in store.keys("indexes"):
        made = store.manifest("indexes", name)
        if name == as_of or (len(as_of) >= 6 and made.digest.startswith(as_of)):
            return Live(
                index=name,
                index_digest=made.digest,
                checkpoint_digest=made.parents["checkpoint"],
                generation=0,
                promoted_at=0.0,
                reason="as of",
            )
    known = ", ".join(store.keys("indexes")[-5:]) or "none yet"
    raise ArtifactError(f"{store.home}: no index version named or digested {as_of!r}; newest: {known}")
