"""In-batch negatives over more examples than one forward pass can hold, with the exact gradient of the whole batch.

Gradient caching (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"): the vectors
of every micro-batch are computed without a graph, the softmax over all of them gives a gradient for each vector, and a
second forward pass with the same dropout carries those gradients into the weights. What it costs is one more forward pass;
what it holds is one micro-batch of activations. Several processes gather each other's vectors, so that the negatives are
those of the whole batch; the gradients of a document's vector from all processes are summed where it was computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from realm_core.model.objectives import ict_loss, in_batch_accuracy
from realm_core.model.world import World

Pair = tuple[Tensor, Tensor]  # vectors "b D" of queries and of their documents


@dataclass(frozen=True)
class InBatch:
    """This process's share of a batch: `loss` adds up over the processes to the mean of the batch; `hits` [B] says which
    query scored its own document highest."""

    loss: Float[Tensor, ""]
    hits: Bool[Tensor, " B"]


def contrast(
    parts: Sequence[Callable[[], Pair]],
    real: Bool[Tensor, " B"],
    *,
    total: int,
    width: int,
    world: World,
) -> InBatch:
    """Loss and gradients of this process's micro-batches within a batch of `total` examples. Collective.

    `parts[i]()` computes the vectors of micro-batch i, the same whenever it is called: it seeds dropout itself. Their
    lengths add up to that of `real`, False where a pair is padding. `width` is that of the vectors. Gradients are added
    to those of the weights, unless the loss of some process is not finite.
    """
    once = len(parts) == 1  # a single micro-batch keeps its graph and needs no second pass
    with torch.set_grad_enabled(once):
        made = [embed() for embed in parts]
    queries_BD, documents_BD = (_joined([pair[side] for pair in made], real, width) for side in (0, 1))
    gathered = world.gather(documents_BD)
    first = sum(len(vectors) for vectors in gathered[: world.rank])
    all_ND = torch.cat(gathered).requires_grad_()
    queries_BD.requires_grad_()
    real_N = torch.cat([flags.bool() for flags in world.gather(real.to(torch.uint8))])
    loss = ict_loss(queries_BD, all_ND, first=first, real=real_N, total=total)
    hits = in_batch_accuracy(queries_BD.detach(), all_ND.detach(), first=first, real=real_N) & real
    if world.every(bool(torch.isfinite(loss))):
        loss.backward()
        assert queries_BD.grad is not None and all_ND.grad is not None
        world.sum_([all_ND.grad])
        _carry(parts, made, once, queries_BD.grad, all_ND.grad[first : first + len(documents_BD)])
    return InBatch(loss.detach(), hits)


def _joined(vectors: Sequence[Tensor], real: Tensor, width: int) -> Tensor:
    if not vectors:
        return torch.zeros(0, width, device=real.device)
    return torch.cat([part.detach() for part in vectors])


def _carry(
    parts: Sequence[Callable[[], Pair]], made: Sequence[Pair], once: bool, queries_BD: Tensor, documents_BD: Tensor
) -> None:
    """Carry the gradients of the vectors into the weights, one micro-batch at a time."""
    sizes = [len(pair[0]) for pair in made]
    for embed, pair, query_bD, document_bD in zip(
        parts, made, queries_BD.split(sizes), documents_BD.split(sizes), strict=True
    ):
        torch.autograd.backward(pair if once else embed(), (query_bD, document_bD))
