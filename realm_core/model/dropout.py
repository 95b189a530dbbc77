"""Dropout whose mask is cheap to draw on a processor.

torch draws one Bernoulli variable an element there, on one thread: a fifth of a training step of a small BERT. Here one
64-bit random number decides about four elements. On accelerators torch's own kernel is used.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_LEVELS = 1 << 16  # a rate is kept to the nearest 1/65536


class Dropout(nn.Module):
    """Zeroes elements at this rate while training and scales up the rest (Srivastava et al. 2014)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return dropout(x, self.rate) if self.training else x


def dropout(x: Float[Tensor, "..."], rate: float) -> Float[Tensor, "..."]:
    """`x` with each element zeroed at `rate`, the others scaled so that the mean stays."""
    if rate == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, rate)
    dropped = round(rate * _LEVELS)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    keep = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - _LEVELS // 2
    return x * keep.to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))
