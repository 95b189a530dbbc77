"""Token sequences as the models read them: special tokens, segments, truncation and padding.

Truncation (original code: language/realm): room = length - 1 - number of sequences; each sequence in turn takes what is
left, so earlier sequences win, and every [SEP] is always there. The null document is two empty sequences:
[CLS] [SEP] [SEP] with segments 0 0 1.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

Ids = Sequence[int] | ndarray  # wordpieces without special tokens
Column = Int64[ndarray, "*B L"]


@runtime_checkable
class SpecialIds(Protocol):
    """Ids of the special tokens; a Tokenizer has them."""

    pad_id: int
    cls_id: int
    sep_id: int


class Inputs(NamedTuple):
    """Arrays of one sequence [L], or of a batch [B, L] after `stack`. Padding has token pad, segment 0, mask 0."""

    token_ids: Column
    segment_ids: Column
    mask: Column


class ReaderInputs(NamedTuple):
    """As Inputs, with block_mask 1 on the wordpieces of the block only (not on the question or special tokens)."""

    token_ids: Column
    segment_ids: Column
    mask: Column
    block_mask: Column


AnyInputs = TypeVar("AnyInputs", Inputs, ReaderInputs)


def document_inputs(title_ids: Ids, body_ids: Ids, length: int, special: SpecialIds) -> Inputs:
    """[CLS] title [SEP] body [SEP], padded to `length`; the title has priority."""
    return _format([title_ids, body_ids], length, special)


def null_document(length: int, special: SpecialIds) -> Inputs:
    """The document with neither title nor body."""
    return document_inputs([], [], length, special)


def query_inputs(ids: Ids, length: int | None, special: SpecialIds) -> Inputs:
    """[CLS] ids [SEP], padded to `length`; with None neither cut nor padded (questions in fine-tuning)."""
    return _format([ids], len(ids) + 2 if length is None else length, special)


def joint_inputs(query_ids: Ids, body_ids: Ids, query_len: int, doc_len: int, special: SpecialIds) -> Inputs:
    """[CLS] query [SEP] body [SEP] without the title, padded to query_len + doc_len.

    The query is cut to query_len - 2 and the body to doc_len - 2 first, so a long query never costs the document room.
    """
    return _format([query_ids[: query_len - 2], body_ids[: doc_len - 2]], query_len + doc_len, special)


def reader_inputs(question_ids: Ids, block_ids: Ids, length: int, special: SpecialIds) -> ReaderInputs:
    """[CLS] question [SEP] block [SEP] without the title, padded to `length`.

    The question is kept and the block is cut; a question beyond length - 3 wordpieces is cut too and leaves no block,
    where the original code ran out of its buffer. Block token i is at position 2 + len(question_ids) + i.
    """
    inputs = _format([question_ids, block_ids], length, special)
    block_mask = np.zeros_like(inputs.mask)
    first = len(question_ids) + 2
    block_mask[first : first + min(len(block_ids), length - first - 1)] = 1
    return ReaderInputs(*inputs, block_mask)


def stack(items: Sequence[AnyInputs], pad_id: int = 0, trim: bool = True) -> AnyInputs:
    """Batch [B, L]. With trim, L is the longest real sequence; without, the longest padded one (a static shape)."""
    if trim:
        longest = max(int(item.mask.sum()) for item in items)
    else:
        longest = max(len(item.mask) for item in items)
    columns = []
    for name, arrays in zip(items[0]._fields, zip(*items, strict=True), strict=True):
        columns.append(np.stack([_resized(array, longest, pad_id if name == "token_ids" else 0) for array in arrays]))
    return type(items[0])(*columns)


def prefixed(inputs: Inputs | ReaderInputs, prefix: str) -> dict[str, Column]:
    """{prefix_token_ids, prefix_segment_ids, prefix_mask, …}."""
    return {f"{prefix}_{name}": array for name, array in inputs._asdict().items()}


def _format(sequences: Sequence[Ids], length: int, special: SpecialIds) -> Inputs:
    room = length - 1 - len(sequences)
    if room < 0:
        raise ValueError(f"length {length} has no room for {1 + len(sequences)} special tokens")
    token_ids = np.full(length, special.pad_id, dtype=np.int64)
    segment_ids = np.zeros(length, dtype=np.int64)
    mask = np.zeros(length, dtype=np.int64)
    token_ids[0] = special.cls_id
    position = 1
    for segment, ids in enumerate(sequences):
        kept = ids[:room]
        room -= len(kept)
        stop = position + len(kept)
        token_ids[position:stop] = kept
        token_ids[stop] = special.sep_id
        segment_ids[position : stop + 1] = segment
        position = stop + 1
    mask[:position] = 1
    return Inputs(token_ids, segment_ids, mask)


def _resized(array: Int64[ndarray, "K"], length: int, fill: int) -> Int64[ndarray, "L"]:
    if len(array) >= length:
        return array[:length]
    return np.concatenate([array, np.full(length - len(array), fill, dtype=array.dtype)])
