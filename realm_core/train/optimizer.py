"""The optimiser of BERT, its learning-rate schedule, clipping, and its state as flat tensors.

Source: the optimiser of the bert-tensorflow package, which the original REALM and ORQA code import.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast, overload

import torch
from jaxtyping import Float
from torch import Tensor

from realm_core.errors import ArtifactError, ConfigError

OptimizerKind = str  # "bert_adam" or "adamw"
NO_DECAY = re.compile("LayerNorm|layer_norm|bias")


class BertAdam(torch.optim.Optimizer):
    """Adam without bias correction, with decoupled weight decay: w -= lr * (m / (sqrt(v) + eps) + decay * w).

    `lr`, `betas`, `eps` and `weight_decay` can differ between parameter groups. Gradients are not clipped here; see
    `clip_gradients`. A parameter without a gradient is left alone, decay included.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        if lr < 0.0 or eps <= 0.0 or weight_decay < 0.0 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(
                f"optimizer lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}: "
                "lr and weight_decay must not be negative, eps must be positive, betas must lie in [0, 1)"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        weights = [weight for weight in group["params"] if weight.grad is not None]
        if not weights:
            return
        grads = [cast(Tensor, weight.grad) for weight in weights]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["exp_avg"] = torch.zeros_like(weight)
                self.state[weight]["exp_avg_sq"] = torch.zeros_like(weight)
        first = [self.state[weight]["exp_avg"] for weight in weights]
        second = [self.state[weight]["exp_avg_sq"] for weight in weights]
        beta1, beta2 = group["betas"]
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, grads, alpha=1.0 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, value=1.0 - beta2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(weights, first, denominator, value=-group["lr"])


def bert_learning_rate(step: int, base: float, warmup: int, total: int) -> float:
    """Learning rate of update number `step`, counted from 0.

    Linear warm-up from 0, so the very first update changes nothing; afterwards linear decay to 0 at `total`, measured
    from step 0, which makes a small jump down at the end of the warm-up. Beyond `total` it stays 0.
    """
    if step < warmup:
        return base * step / warmup
    return base * (1.0 - min(step, total) / total)


def warmup_steps(total: int) -> int:
    """min(10000, max(100, total // 10)), the rule of all three stages (original code: language/realm, language/orqa).

    A run of 100 steps or fewer ends within it; short runs name a warm-up of their own.
    """
    if total < 1:
        raise ConfigError(f"training steps={total}: must be at least 1")
    return min(10_000, max(100, total // 10))


def build_optimizer(
    groups: Mapping[str, Iterable[tuple[str, torch.nn.Parameter]]],
    *,
    kind: OptimizerKind = "bert_adam",
    learning_rate: float | Mapping[str, float],
    weight_decay: float = 0.01,
    eps: float | None = None,
) -> torch.optim.Optimizer:
    """An optimiser over named groups, for example `{"retriever": retriever.named_parameters(), "encoder": ...}`.

    `learning_rate` is one base rate, or one for each group. Every group is split in two: weights that decay and those
    that do not (norms and biases). Parameter groups carry `role` (the name given) and `base_lr`, which
    `set_learning_rate` reads. Parameters are known as `role/name`, the key of their state in `optimizer_tensors`.
    Parameters that need no gradient are left out. `eps` None is 1e-6 for "bert_adam" and 1e-8 for "adamw".
    """
    param_groups: list[dict[str, Any]] = []
    for role, parameters in groups.items():
        base = learning_rate if isinstance(learning_rate, int | float) else _rate_of(role, learning_rate)
        trainable = [(name, weight) for name, weight in parameters if weight.requires_grad]
        for decays in (True, False):
            members = [(f"{role}/{name}", w) for name, w in trainable if decays != bool(NO_DECAY.search(name))]
            if members:
                decay = weight_decay if decays else 0.0
                param_groups.append(
                    {"params": members, "lr": base, "base_lr": base, "weight_decay": decay, "role": role}
                )
    if not param_groups:
        raise ConfigError("optimizer: no parameter needs a gradient; give it at least one trainable module")
    if kind == "bert_adam":
        return BertAdam(param_groups, lr=0.0, eps=1e-6 if eps is None else eps)
    if kind == "adamw":
        return torch.optim.AdamW(param_groups, lr=0.0, eps=1e-8 if eps is None else eps)
    raise ConfigError(f"optimizer kind={kind!r}: must be 'bert_adam' or 'adamw'")


def _rate_of(role: str, rates: Mapping[str, float]) -> float:
    if role not in rates:
        raise ConfigError(f"optimizer learning_rate: none for group {role!r}, only for {sorted(rates)}; add it")
    return rates[role]


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, warmup: int, total: int) -> dict[str, float]:
    """Give every group the rate of update `step`, from its own base rate. Returns the rate of each role."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        group["lr"] = rates[group["role"]] = bert_learning_rate(step, group["base_lr"], warmup, total)
    return rates


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float = 1.0) -> Float[Tensor, ""]:
    """Scale all gradients so that their common norm is at most `max_norm`. Returns the norm before clipping.

    Exactly max_norm / max(norm, max_norm), as in TensorFlow; the routine of torch adds 1e-6 to the norm. A norm that is
    not finite gives gradients that are not finite: the caller decides whether to skip the step.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if grads:
        torch._foreach_mul_(grads, max_norm / norm.clamp(min=max_norm))
    return norm


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The whole state as one flat dictionary of tensors, `role/parameter name/entry`, ready for safetensors.

    Learning rates are not in it: they follow from the step and the configuration.
    """
    return {
        f"{name}/{entry}": value if isinstance(value, Tensor) else torch.tensor(value)
        for name, weight in _named_weights(optimizer)
        for entry, value in optimizer.state.get(weight, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put a state of `optimizer_tensors` back into an optimiser built from the same parameters.

    Raises ArtifactError when the state belongs to other parameters or other shapes.
    """
    weights = dict(_named_weights(optimizer))
    fresh: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        if name not in weights:
            raise ArtifactError(f"optimizer state {key}: the model has no such parameter; resume with the same model")
        weight = weights[name]
        if value.dim() and value.shape != weight.shape:
            raise ArtifactError(
                f"optimizer state {key}: shape {tuple(value.shape)}, the parameter has {tuple(weight.shape)}; "
                "resume with the same model"
            )
        # AdamW keeps its step count as a float32 scalar on the processor; moments live where the weight lives.
        fresh.setdefault(name, {})[entry] = value.clone() if value.dim() == 0 else value.to(weight, copy=True)
    expected = {"exp_avg", "exp_avg_sq"} | ({"step"} if isinstance(optimizer, torch.optim.AdamW) else set())
    for name, entries in fresh.items():
        if set(entries) != expected:
            raise ArtifactError(
                f"optimizer state of {name}: holds {sorted(entries)}, this optimizer needs {sorted(expected)}; "
                "resume with the optimizer kind that wrote it"
            )
    optimizer.state.clear()
    for name, entries in fresh.items():
        optimizer.state[weights[name]] = cast(dict[Any, Any], entries)


def _named_weights(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    return [
        (name, weight)
        for group in optimizer.param_groups
        for name, weight in zip(group["param_names"], group["params"], strict=True)
    ]
