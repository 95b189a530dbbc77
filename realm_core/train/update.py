"""One optimiser update, and the seeds that make every step a function of (seed, step)."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from realm_core.config import OptimizerConfig
from realm_core.errors import RealmError
from realm_core.train.optimizer import build_optimizer, clip_gradients, set_learning_rate, warmup_steps


def seed_of(*labels: int | str) -> int:
    """A 63-bit seed from labels such as (seed, "ict", step)."""
    text = "\x1f".join(str(label) for label in labels)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class DivergedError(RealmError):
    """Loss or gradient were not finite several times in a row."""


class Updater:
    """Optimiser, schedule, clipping, and the rule for losses that are not finite."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        rates: Mapping[str, float],
        total: int,
        config: OptimizerConfig,
        max_nan_steps: int = 3,
    ) -> None:
        self.modules = dict(modules)
        self.total = total
        self.warmup = warmup_steps(total)
        self.config = config
        self.max_nan_steps = max_nan_steps
        self.nan_steps = 0
        self.optimizer = build_optimizer(
            {role: module.named_parameters() for role, module in modules.items()},
            kind=config.kind,
            learning_rate=dict(rates),
            weight_decay=config.weight_decay,
        )

    def apply(self, loss: Tensor, step: int) -> bool:
        """Update from `loss` at `step` (from 0). A loss or gradient that is not finite skips the step and returns False.

        Raises DivergedError after `max_nan_steps` skipped steps in a row.
        """
        set_learning_rate(self.optimizer, step, self.warmup, self.total)
        self.optimizer.zero_grad(set_to_none=True)
        healthy = bool(torch.isfinite(loss))
        if healthy:
            loss.backward()
            parameters = [weight for module in self.modules.values() for weight in module.parameters()]
            healthy = bool(torch.isfinite(clip_gradients(parameters, self.config.clip_norm)))
        if healthy:
            self.optimizer.step()
            self.nan_steps = 0
            return True
        self.nan_steps += 1
        if self.nan_steps >= self.max_nan_steps:
            raise DivergedError(f"step {step}: loss or gradient not finite {self.nan_steps} times in a row")
        return False
