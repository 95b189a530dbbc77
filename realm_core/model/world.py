"""The world: the processes that train one model together, and what they say to each other.

Every process runs the same steps on its share of each batch. Messages are JSON and tensors, never pickles. All methods but
the properties are collective: every process calls them in the same order. A world of one makes each of them do nothing.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from realm_core.errors import RealmError

T = TypeVar("T")
_BUCKET = 1 << 25  # numbers summed by one collective; bounds the copy that it needs


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`; `local` counts the processes of one machine and picks its accelerator."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process publishes checkpoints, moves the index and talks to trackers."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"process {self.rank} of {self.size}"

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's contiguous share; the shares of all processes, in order, are `items`."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors (equal shapes everywhere, one type and device) by their sums; the same bits in every process."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(
                list(bucket), [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)]
            )

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes in order of rank; sizes may differ. No gradient passes."""
        tensor = tensor.detach().contiguous()
        if self.size == 1:
            return [tensor]
        shape = torch.tensor(tensor.shape, device=tensor.device)
        shapes = [torch.empty_like(shape) for _ in range(self.size)]
        dist.all_gather(shapes, shape)
        sizes = [torch.Size(found.tolist()) for found in shapes]
        widest = max(size.numel() for size in sizes)
        sent = tensor.new_zeros(widest)
        sent[: tensor.numel()] = tensor.reshape(-1)
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent)
        return [flat[: size.numel()].view(size) for flat, size in zip(received, sizes, strict=True)]

    def exchange(self, message: Any) -> list[Any]:
        """The JSON values of all processes in order of rank."""
        if self.size == 1:
            return [message]
        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        return [json.loads(found.numpy().tobytes()) for found in self.gather(data)]

    def every(self, truth: bool) -> bool:
        """Whether it is true in every process."""
        return all(self.exchange(bool(truth)))

    def some(self, truth: bool) -> bool:
        """Whether it is true in at least one process."""
        return any(self.exchange(bool(truth)))

    def together(self, work: Callable[[], T]) -> T:
        """Each process's own result of `work`, which is not collective. If it fails in one, RealmError in all."""
        problem: RealmError | None = None
        try:
            result = work()
        except RealmError as error:
            problem = error
        found = self.exchange(None if problem is None else str(problem))
        if problem is not None:
            raise problem
        for rank, text in enumerate(found):
            if text is not None:
                raise RealmError(f"{World(rank, self.size)}: {text}")
        return result

    def lead(self, work: Callable[[], T]) -> T:
        """The first process's result of `work` (a JSON value), which the others do not run. If it fails, RealmError in all."""
        if self.size == 1:
            return work()
        own = self.together(work if self.leads else lambda: None)
        told: T = self.exchange(own)[0]
        return told

    def require_same(self, tensors: Sequence[Tensor], what: str) -> None:
        """Raise RealmError unless the tensors hold the same bits in every process."""
        if self.size == 1:
            return
        sums = [
            int(tensor.detach().contiguous().view(-1).view(torch.uint8).sum(dtype=torch.int64)) for tensor in tensors
        ]
        if any(found != sums for found in self.exchange(sums)):
            raise RealmError(f"{what}: not the same in all {self.size} processes; resume from the last checkpoint")


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(x.numel() for x in bucket) + tensor.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
