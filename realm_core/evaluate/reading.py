"""Reading: questions and retrieved blocks -> the best answer span of each (original code: language/orqa)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from realm_core.corpus.shards import Corpus
from realm_core.data.formats import reader_inputs, stack
from realm_core.model.device import Device
from realm_core.model.reader import Reader, best_span, span_candidates
from realm_core.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Reading:
    """An answer: its text as it stands in the block, its total score, and the block's row and place among the blocks read."""

    text: str
    score: float
    row: int
    place: int


def read_answer(
    reader: Reader,
    corpus: Corpus,
    question_ids: Sequence[int],
    rows: Sequence[int],
    relevance: Sequence[float],
    *,
    tokenizer: Tokenizer,
    length: int,
    device: Device,
) -> Reading | None:
    """The best span over all blocks, with the block's relevance added to its spans; None if no block has text."""
    items = [reader_inputs(question_ids, corpus.token_ids(int(row)), length, tokenizer) for row in rows]
    batch = stack(items, tokenizer.pad_id)
    tensors = [torch.from_numpy(array).to(device.torch_device) for array in batch]
    with torch.inference_mode(), device.autocast():
        spans = reader(*tensors)
    if not bool(spans.valid.any()):
        return None
    scores = torch.tensor(np.asarray(relevance, dtype=np.float32), device=device.torch_device)
    block, candidate, score = best_span(spans._replace(score=spans.score.float()), scores)
    starts, ends = span_candidates(batch.token_ids.shape[1], reader.max_span_width)
    first = min(len(question_ids), length - 3) + 2
    place = int(block)
    start, end = int(starts[int(candidate)]) - first, int(ends[int(candidate)]) - first
    return Reading(span_text(corpus, int(rows[place]), start, end, tokenizer), float(score), int(rows[place]), place)


def span_text(corpus: Corpus, row: int, start: int, end: int, tokenizer: Tokenizer) -> str:
    """Original text of wordpieces start..end (inclusive) of a block, whole words at both ends."""
    text = corpus.text(row)
    ids, starts, stops = tokenizer.ids_with_offsets(text)
    if list(ids) != list(corpus.token_ids(row)):  # a sentence border inside a word: fall back to the pieces
        pieces = tokenizer.pieces(corpus.token_ids(row)[start : end + 1].tolist())
        return " ".join(pieces).replace(" ##", "").removeprefix("##")
    low, high = starts[start], stops[end]
    while low > 0 and text[low - 1].isalnum():
        low -= 1
    while high < len(text) and text[high].isalnum():
        high += 1
    return text[low:high]
