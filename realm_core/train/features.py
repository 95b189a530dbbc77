"""From masked queries and retrieved rows to the tensors of one REALM step (Guu et al. 2020, figure 2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Integer
from torch import Tensor

from realm_core.corpus.shards import Corpus
from realm_core.data.candidates import NULL_ROW, select_candidates
from realm_core.data.formats import Ids, document_inputs, joint_inputs, query_inputs, stack
from realm_core.data.masking import MaskedQuery, masked_query, pad_masks
from realm_core.model.device import Device
from realm_core.text.tokenizer import Tokenizer

Triple = tuple[Tensor, Tensor, Tensor]  # token ids, segment ids, mask


@dataclass(frozen=True)
class RealmBatch:
    """B queries with C candidates each; candidate 0 is the null document. `present` is False on padded candidates."""

    query: Triple  # "B Lq"
    documents: Triple  # "B*C Ld"
    joint: Triple  # "B*C Lj"
    positions: Integer[Tensor, "B M"]
    targets: Integer[Tensor, "B M"]
    real: Bool[Tensor, "B M"]
    present: Bool[Tensor, "B C"]
    rows: np.ndarray  # "B C", -1 for the null document and for padding


def draw_queries(
    corpus: Corpus,
    rows: Sequence[int],
    rng: np.random.Generator,
    *,
    scheme: str,
    query_len: int,
    max_masks: int,
    tokenizer: Tokenizer,
) -> list[MaskedQuery]:
    """One masked query a row; rows without a usable span give none, so fewer may come back."""
    drawn = (masked_query(corpus, int(row), rng, scheme, query_len, max_masks, tokenizer)[0] for row in rows)
    return [query for query in drawn if query is not None]


def choose_candidates(
    corpus: Corpus,
    origins: Sequence[str] | np.ndarray,
    retrieved: Integer[np.ndarray, "B k"],
    count: int,
    near_duplicate_of: Callable[[int, int], bool] = lambda number, row: False,
) -> list[np.ndarray]:
    """Rows of the documents each query is read with: null first, its own block (by identity) never, equal texts once.

    `near_duplicate_of(number, row)` says of a retrieved row whether it repeats the block that query `number` came from.
    """
    return [
        select_candidates(
            found,
            str(origin),
            [str(x) for x in corpus.block_ids[found]],
            count,
            partial(near_duplicate_of, number),
        ).rows
        for number, (origin, found) in enumerate(zip(origins, retrieved, strict=True))
    ]


def realm_batch(
    corpus: Corpus,
    queries: Sequence[MaskedQuery],
    candidates: Sequence[np.ndarray],
    *,
    query_len: int,
    doc_len: int,
    tokenizer: Tokenizer,
    device: Device,
    max_masks: int,
    count: int,
) -> RealmBatch:
    """Tensors of one pass, trimmed to the longest sequence of each kind, the most masks and the most candidates.

    On a device with static shapes nothing is trimmed: as many as `count` candidates and `max_masks` masks are there.
    """
    width = count if device.static else max(len(rows) for rows in candidates)
    rows = np.full((len(queries), width), NULL_ROW, dtype=np.int64)
    present = np.zeros((len(queries), width), dtype=bool)
    for number, found in enumerate(candidates):
        rows[number, : len(found)] = found
        present[number, : len(found)] = True
    documents, joints = [], []
    for query, found in zip(queries, rows, strict=True):
        for row in found:
            title, body = block_ids(corpus, int(row))
            documents.append(document_inputs(title, body, doc_len, tokenizer))
            joints.append(joint_inputs(query.token_ids, body, query_len, doc_len, tokenizer))
    positions, targets, real = pad_masks(
        queries, max_masks if device.static else max(len(query.targets) for query in queries)
    )

    def move(inputs: list) -> Triple:
        stacked = stack(inputs, tokenizer.pad_id, trim=not device.static)
        ids, segments, mask = (torch.from_numpy(array).to(device.torch_device) for array in stacked[:3])
        return ids, segments, mask

    return RealmBatch(
        query=move([query_inputs(query.token_ids, query_len, tokenizer) for query in queries]),
        documents=move(documents),
        joint=move(joints),
        positions=torch.from_numpy(positions).to(device.torch_device),
        targets=torch.from_numpy(targets).to(device.torch_device),
        real=torch.from_numpy(real).to(device.torch_device).bool(),
        present=torch.from_numpy(present).to(device.torch_device),
        rows=rows,
    )


def block_ids(corpus: Corpus, row: int) -> tuple[Ids, Ids]:
    """(title, body) wordpieces of a block; both empty for the null document."""
    if row == NULL_ROW:
        return [], []
    return corpus.title_ids(row), corpus.token_ids(row)
