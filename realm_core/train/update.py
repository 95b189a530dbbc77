"""One optimiser update from the gradients of all micro-batches and processes, and the seeds that make every step a function
of (seed, step)."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from realm_core.config import OptimizerConfig
from realm_core.errors import RealmError
from realm_core.model.world import World
from realm_core.train.optimizer import build_optimizer, clip_gradients, set_learning_rate, warmup_steps

_ALONE = World()


def seed_of(*labels: int | str) -> int:
    """A 63-bit seed from labels such as (seed, "ict", step)."""
    text = "\x1f".join(str(label) for label in labels)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class DivergedError(RealmError):
    """Loss or gradient were not finite several times in a row."""


def seed_dropout(seed: int, stage: str, step: int, part: int) -> None:
    """Make dropout a function of the step and of the micro-batch, whichever process computes it."""
    torch.manual_seed(seed_of(seed, stage, step, *([part] if part else [])))


class Updater:
    """Optimiser, schedule, clipping, and the rule for losses that are not finite.

    A step is `begin`, `add` for the loss of every micro-batch, `finish`; `apply` is all three. Losses are parts of one sum:
    the caller divides by the size of the whole batch. `warmup` None follows the rule of the original.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        rates: Mapping[str, float],
        total: int,
        config: OptimizerConfig,
        max_nan_steps: int = 3,
        world: World = _ALONE,
        warmup: int | None = None,
    ) -> None:
        self.modules = dict(modules)
        self.total = total
        self.warmup = warmup or warmup_steps(total)
        self.config = config
        self.max_nan_steps = max_nan_steps
        self.nan_steps = 0
        self.world = world
        self.healthy = True  # whether everything noted since `begin` was finite
        self.optimizer = build_optimizer(
            {role: module.named_parameters() for role, module in modules.items()},
            kind=config.kind,
            learning_rate=dict(rates),
            weight_decay=config.weight_decay,
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [weight for module in self.modules.values() for weight in module.parameters()]

    def apply(self, loss: Tensor, step: int) -> bool:
        """Update from the whole loss of `step` (from 0); see `finish`."""
        self.begin(step)
        self.add(loss)
        return self.finish(step)

    def begin(self, step: int) -> None:
        """Set the learning rate of `step` and forget the gradients."""
        set_learning_rate(self.optimizer, step, self.warmup, self.total)
        self.optimizer.zero_grad(set_to_none=True)
        self.healthy = True

    def note(self, loss: Tensor) -> bool:
        """Remember whether a loss is finite, and say so."""
        finite = bool(torch.isfinite(loss))
        self.healthy = self.healthy and finite
        return finite

    def add(self, loss: Tensor) -> None:
        """Add the gradients of a part of the loss."""
        if self.note(loss):
            loss.backward()

    def finish(self, step: int) -> bool:
        """Sum the gradients over the processes, clip, update. A loss or gradient that is not finite, in whichever
        process, skips the step in all of them and returns False.

        Raises DivergedError after `max_nan_steps` skipped steps in a row.
        """
        if self.world.every(self.healthy):
            self._sum_gradients()
            if bool(torch.isfinite(clip_gradients(self.parameters, self.config.clip_norm))):
                self.optimizer.step()
                self.nan_steps = 0
                return True
        self.nan_steps += 1
        if self.nan_steps >= self.max_nan_steps:
            raise DivergedError(f"step {step}: loss or gradient not finite {self.nan_steps} times in a row")
        return False

    def _sum_gradients(self) -> None:
        if self.world.size == 1:
            return
        weights = self.parameters
        here = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.int32)
        self.world.sum_([here])
        used = [weight for weight, count in zip(weights, here.tolist(), strict=True) if count]
        for weight in used:
            if weight.grad is None:  # a process whose share of the batch is empty
                weight.grad = torch.zeros_like(weight)
        self.world.sum_([weight.grad for weight in used if weight.grad is not None])
