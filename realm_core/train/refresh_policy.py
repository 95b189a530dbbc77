"""When a new checkpoint is worth an index of its own. The original refreshes at a fixed interval (Guu et al. 2020, section
3.3: every 500 steps); here the interval, or the change that an estimate finds, is a setting."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from realm_core.config import RefreshConfig


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What becomes of a checkpoint, and why."""

    what: Literal["refresh", "pass over", "estimate"]  # estimate: ask again once there is one
    reason: str


def decide(
    settings: RefreshConfig,
    *,
    step: int,
    last_step: int,
    refreshed_step: int | None,
    estimate: Mapping[str, Any] | None = None,
) -> Decision:
    """Decide about the checkpoint of `step` in a run that ends at `last_step`.

    `refreshed_step` is the step of the run's newest checkpoint that was refreshed, None if none was. `estimate` compares a
    checkpoint at or before `step` with the live index: {"step", "top_k_overlap"}, overlap as a share of [0, 1].
    """
    if settings.policy == "every_checkpoint":
        return Decision(what="refresh", reason="every checkpoint is")
    if refreshed_step is None:
        return Decision(what="refresh", reason="the first of its run")
    if step >= last_step:
        return Decision(what="refresh", reason="the last of its run")
    if settings.policy == "every_steps":
        gone = step - refreshed_step
        found = f"{gone} steps after the last one, refresh.every_steps={settings.every_steps}"
        return Decision(what="refresh" if gone >= settings.every_steps else "pass over", reason=found)
    if estimate is None:
        return Decision(what="estimate", reason="its drift is not known yet")
    changed = 1.0 - float(estimate["top_k_overlap"])
    found = f"{changed:.3f} of the top k changed by step {estimate['step']}, threshold {settings.drift_threshold:g}"
    if changed >= settings.drift_threshold:
        return Decision(what="refresh", reason=found)
    return Decision(what="pass over" if estimate["step"] == step else "estimate", reason=found)
