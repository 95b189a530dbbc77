"""Exact search over vectors that are spread over the processes of a run: each holds and searches a share of the rows."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from realm_core.index.backends import ExactIndex
from realm_core.index.exact import merge_topk
from realm_core.model.world import World


class ShardedIndex:
    """One process's share of an exact index. Finds what the whole index finds, bit for bit."""

    def __init__(self, whole: ExactIndex, world: World, device: torch.device) -> None:
        self.world, self.size, self.dimension = world, whole.size, whole.dimension
        rows = world.share(range(whole.size))
        self.first = rows[0]
        self.own = ExactIndex(whole.vectors[rows[0] : rows[-1] + 1], whole.params).to(device)

    def search(self, queries: Float[Tensor, "Q D"], k: int) -> tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]:
        """See `SearchIndex.search`. Collective: every process asks for its own queries, of which there may be none.

        All queries go to all processes; each searches its rows; the k best of all shares are merged. Per process and step
        that is Q D numbers sent and Q k scores and rows of every process received.
        """
        asked = self.world.gather(queries)
        scores, rows = self.own.search(torch.cat(asked), k)
        found = list(zip(self.world.gather(scores), self.world.gather(rows + self.first), strict=True))
        low = sum(len(part) for part in asked[: self.world.rank])
        mine = slice(low, low + len(queries))
        return merge_topk([(score[mine], row[mine]) for score, row in found], k)


def shardable(index: object, world: World) -> bool:
    """Whether the rows of an index can be spread over the processes: the vectors are its only content."""
    return world.size > 1 and isinstance(index, ExactIndex) and index.size >= world.size
