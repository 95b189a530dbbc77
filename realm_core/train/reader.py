"""Open-domain QA fine-tuning: question tower and reader learn on a frozen index (ORQA, Lee et al. 2019, section 5).

With BM25 instead of an index only the reader learns: the paper's sparse baseline.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.data.answers import gold_spans, has_answer
from realm_core.data.batches import rows_for_step, split_evenly
from realm_core.data.formats import query_inputs, reader_inputs, stack
from realm_core.data.questions import Question
from realm_core.errors import DataError
from realm_core.index.embed import to_tensors
from realm_core.index.version import IndexVersion
from realm_core.model.device import Device
from realm_core.model.embedder import Retriever
from realm_core.model.objectives import reader_loss, retriever_loss
from realm_core.model.reader import Reader, correct_spans, span_candidates
from realm_core.model.world import World
from realm_core.ports import MetricSink, Progress
from realm_core.text.tokenizer import Tokenizer
from realm_core.train.interim import History, Interim, Saved
from realm_core.train.parts import parts_of, sum_metrics
from realm_core.train.step import at_least_float32
from realm_core.train.update import Updater, seed_dropout

_ALONE = World()
_LOOK = 16  # questions that are looked up at a time before training


@dataclass(frozen=True)
class Retrieved:
    """Blocks of one question, best first. `relevance` carries gradient to the question tower; None for BM25."""

    rows: np.ndarray  # "K"
    relevance: Float[Tensor, " K"] | None


class DenseRetrieval:
    """Searches the frozen vectors with the question tower as it is now."""

    def __init__(self, retriever: Retriever, index: IndexVersion, vectors: np.ndarray, config: Config) -> None:
        self.retriever, self.index, self.vectors = retriever, index, vectors
        self.beam = config.reader.searcher_beam

    def __call__(
        self, numbers: Sequence[int] | np.ndarray, questions: Sequence[Sequence[int]], device: Device
    ) -> list[Retrieved]:
        """Retrieval for questions given as wordpieces; their numbers do not matter here."""
        pad = self.index.tokenizer.pad_id
        batch = stack([query_inputs(ids, None, self.index.tokenizer) for ids in questions], pad)
        with device.autocast():
            embedded = at_least_float32(self.retriever.embed_queries(*to_tensors(batch, device)))
        _, rows = self.index.search_vectors(embedded.detach().cpu().numpy(), self.beam)
        found = torch.from_numpy(np.stack([self.vectors[row] for row in rows])).to(embedded)
        relevance_QK = torch.einsum("qd,qkd->qk", embedded, found)
        return [Retrieved(row, relevance) for row, relevance in zip(rows, relevance_QK, strict=True)]


@dataclass(frozen=True)
class FixedRetrieval:
    """Rows found once for every training question, by BM25 for example."""

    rows: np.ndarray  # "N K"

    def __call__(
        self, numbers: Sequence[int] | np.ndarray, questions: Sequence[Sequence[int]], device: Device
    ) -> list[Retrieved]:
        return [Retrieved(self.rows[number], None) for number in numbers]


def train_reader(
    reader: Reader,
    retrieval: DenseRetrieval | FixedRetrieval,
    corpus: Corpus,
    questions: Sequence[Question],
    config: Config,
    device: Device,
    sink: MetricSink,
    interim: Interim | None = None,
) -> dict[str, float]:
    """Train the reader, and the question tower of a dense retrieval, in place; goes on from the state in `interim`, if it
    holds one.

    Returns means over the last tenth. Raises DataError if no question finds its answer among its blocks at the start.
    """
    settings = config.reader
    tuning = _Tuning(reader, retrieval, corpus, questions, config, device)
    tuning.require_an_answer()
    bar = Progress("fine-tune reader", settings.steps)
    history = History(settings.steps)
    saved = Saved(interim, "reader", settings.checkpoint_every, tuning.updater, history)
    for module in tuning.updater.modules.values():
        module.train()
    for step in range(saved.first, settings.steps):
        metrics = tuning.step(step)
        history.add(metrics)
        sink.log(step, metrics)
        bar.update(step + 1, f"loss {metrics['reader/loss']:.3f}")
        saved.after(step + 1)
    return history.means()


class _Tuning:
    """The steps of fine-tuning: each a function of weights, seed, step number and the number of micro-batches.

    Every question has its turn, as in the original code, whether its answer is among the blocks that it retrieves or not:
    without, it adds no loss, and the day the question tower finds one, it does.
    """

    def __init__(
        self,
        reader: Reader,
        retrieval: DenseRetrieval | FixedRetrieval,
        corpus: Corpus,
        questions: Sequence[Question],
        config: Config,
        device: Device,
    ) -> None:
        self.reader, self.retrieval, self.corpus, self.questions = reader, retrieval, corpus, questions
        self.config, self.device, self.parts = config, device, parts_of(config.reader, "reader", _ALONE)
        reader.checkpointing = config.reader.checkpointing
        longest = reader.shape.max_positions - 2  # a longer question is cut; the original code would fail on it
        asked = corpus.tokenizer.batch_ids([question.question for question in questions])
        self.ids = [ids[:longest] for ids in asked]
        self.answer_ids = [corpus.tokenizer.batch_ids(question.answers) for question in questions]
        modules: dict[str, torch.nn.Module] = {"reader": reader}
        if isinstance(retrieval, DenseRetrieval):
            modules["question_tower"] = retrieval.retriever.query_tower
        settings = config.reader
        rates = {"reader": settings.lr, "question_tower": settings.tower_lr}
        self.updater = Updater(modules, rates, settings.steps, config.optimizer, warmup=settings.warmup_steps)

    def require_an_answer(self) -> None:
        """Raise DataError unless some question finds its answer at the start; looks no further than the first that does."""
        if isinstance(self.retrieval, DenseRetrieval):
            self.retrieval.retriever.eval()  # dropout would make it a matter of luck
        for first in range(0, len(self.questions), _LOOK):
            part = range(first, min(first + _LOOK, len(self.questions)))
            with torch.inference_mode():
                found = self.retrieval(part, [self.ids[i] for i in part], self.device)
            for i, retrieved in zip(part, found, strict=True):
                rows = retrieved.rows if retrieved.relevance is not None else self._read(retrieved)
                if any(has_answer(text, self.questions[i].answers) for text in self.corpus.texts(rows.tolist())):
                    return
        raise DataError(
            f"{self.corpus.folder}: no training question finds its answer among its retrieved blocks; "
            "check that questions and corpus belong together"
        )

    def step(self, step: int) -> dict[str, float]:
        """One update. Returns its metrics, means over the questions."""
        settings, seed = self.config.reader, self.config.seed
        chosen = rows_for_step(len(self.questions), settings.batch, step, seed).tolist()
        self.updater.begin(step)
        found = []
        for number, part in enumerate(split_evenly(chosen, self.parts)):
            seed_dropout(seed, "reader", step, number)
            loss, metrics = self._loss(part)
            share = len(part) / len(chosen)
            self.updater.add(loss * share)
            found.append({name: value * share for name, value in metrics.items()})
        self.updater.finish(step)
        self.device.end_step()
        return sum_metrics(_ALONE, found)

    def _loss(self, part: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        retrieved = self.retrieval(part, [self.ids[i] for i in part], self.device)
        asked = [(self.questions[i], self.ids[i], self.answer_ids[i]) for i in part]
        return _batch_loss(self.reader, self.corpus, asked, retrieved, self.config, self.device, self.corpus.tokenizer)

    def _read(self, retrieved: Retrieved) -> np.ndarray:
        return retrieved.rows[: self.config.reader.reader_beam]


Asked = tuple[Question, Sequence[int], Sequence[Sequence[int]]]  # question, its wordpieces, those of its answers


def _batch_loss(
    reader: Reader,
    corpus: Corpus,
    asked: Sequence[Asked],
    found: Sequence[Retrieved],
    config: Config,
    device: Device,
    tokenizer: Tokenizer,
) -> tuple[Tensor, dict[str, float]]:
    """Mean over the questions of retriever loss + reader loss, each zero where nothing is correct."""
    settings, length = config.reader, config.lengths.reader
    beam = min(settings.reader_beam, min(len(item.rows) for item in found))
    items, gold = [], []
    for (_, ids, answers), retrieved in zip(asked, found, strict=True):
        for row in retrieved.rows[:beam]:
            body = corpus.token_ids(int(row))
            items.append(reader_inputs(ids, body, length, tokenizer))
            offset = min(len(ids), length - 3) + 2
            gold.append(gold_spans(body, answers, offset=offset, kept=max(length - offset - 1, 0)))
    batch = stack(items, tokenizer.pad_id)
    tensors = [torch.from_numpy(array).to(device.torch_device) for array in batch]
    with device.autocast():
        spans = reader(*tensors)
    starts, ends = span_candidates(batch.token_ids.shape[1], reader.max_span_width, device.torch_device)
    correct = correct_spans(starts, ends, *_padded(gold, device))
    shape = (len(asked), beam)
    relevance_QK = torch.stack([_relevance(item, beam, device) for item in found])
    read = reader_loss(
        at_least_float32(spans.score).unflatten(0, shape),
        relevance_QK,
        correct.unflatten(0, shape),
        spans.valid.unflatten(0, shape),
    )
    retrieve = _retriever_loss(corpus, asked, found, device)
    hit = (correct & spans.valid).unflatten(0, shape).flatten(start_dim=1).any(dim=1).float().mean()
    loss = read + retrieve
    return loss, {
        "reader/loss": float(read.detach()),
        "reader/retriever_loss": float(retrieve.detach()),
        "reader/readable": float(hit),
    }


def _retriever_loss(corpus: Corpus, asked: Sequence[Asked], found: Sequence[Retrieved], device: Device) -> Tensor:
    losses = []
    for (question, _, _), retrieved in zip(asked, found, strict=True):
        if retrieved.relevance is None:
            return torch.zeros((), device=device.torch_device)
        correct = [has_answer(text, question.answers) for text in corpus.texts(retrieved.rows.tolist())]
        losses.append(retriever_loss(retrieved.relevance, torch.tensor(correct, device=device.torch_device)))
    return torch.stack(losses).mean()


def _relevance(retrieved: Retrieved, beam: int, device: Device) -> Tensor:
    if retrieved.relevance is None:
        return torch.zeros(beam, device=device.torch_device)
    return retrieved.relevance[:beam]


def _padded(gold: Sequence[np.ndarray], device: Device) -> tuple[Tensor, Tensor]:
    """Gold starts and ends, padded with -1, "K G" each."""
    width = max(1, max(len(spans) for spans in gold))
    padded = np.full((2, len(gold), width), -1, dtype=np.int64)
    for number, spans in enumerate(gold):
        padded[:, number, : len(spans)] = spans.T
    starts, ends = torch.from_numpy(padded).to(device.torch_device)
    return starts, ends
