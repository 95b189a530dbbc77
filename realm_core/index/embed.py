"""Vectors of blocks and queries: the forward pass behind snapshots, retrieval and question answering."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from realm_core.corpus.shards import Corpus
from realm_core.data.formats import Ids, Inputs, document_inputs, query_inputs, stack
from realm_core.model.device import Device
from realm_core.model.embedder import Retriever
from realm_core.text.tokenizer import Tokenizer


def embed_blocks(
    retriever: Retriever,
    corpus: Corpus,
    rows: Sequence[int],
    *,
    tokenizer: Tokenizer,
    length: int,
    batch: int,
    device: Device,
    progress: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "N D"]:
    """Document vectors of the rows, float32, in the order given. Blocks of like length share a batch; on a device with
    static shapes the last one is filled up."""
    inputs = [document_inputs(corpus.title_ids(row), corpus.token_ids(row), length, tokenizer) for row in rows]
    return _embed(
        retriever, retriever.embed_documents, inputs, tokenizer.pad_id, batch, device, progress, fill=device.static
    )


def embed_queries(
    retriever: Retriever,
    queries: Sequence[Ids],
    *,
    tokenizer: Tokenizer,
    length: int | None,
    device: Device,
    batch: int = 64,
) -> Float[np.ndarray, "Q D"]:
    """Query vectors, float32, from wordpiece ids without special tokens; `length` None neither cuts nor pads."""
    inputs = [query_inputs(ids, length, tokenizer) for ids in queries]
    return _embed(retriever, retriever.embed_queries, inputs, tokenizer.pad_id, batch, device, None)


def to_tensors(inputs: Inputs, device: Device) -> tuple[Tensor, Tensor, Tensor]:
    """token ids, segment ids and mask as tensors on the device."""
    ids, segments, mask = (torch.from_numpy(array).to(device.torch_device) for array in inputs[:3])
    return ids, segments, mask


def _embed(
    retriever: Retriever,
    tower: Callable[..., Tensor],
    inputs: Sequence[Inputs],
    pad_id: int,
    batch: int,
    device: Device,
    progress: Callable[[int], None] | None,
    fill: bool = False,
) -> np.ndarray:
    was_training = retriever.training
    retriever.eval()
    vectors = np.empty((len(inputs), retriever.embedder.projection_size), dtype=np.float32)
    order = np.argsort([int(item.mask.sum()) for item in inputs], kind="stable")
    with torch.inference_mode(), device.autocast():
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            if fill:
                chosen = np.resize(chosen, batch)  # the first ones once more
            tensors = to_tensors(stack([inputs[i] for i in chosen], pad_id, trim=not device.static), device)
            vectors[chosen] = tower(*tensors).float().cpu().numpy()
            if progress is not None:
                progress(min(batch, len(order) - start))
    retriever.train(was_training)
    return vectors
