"""The guard against collapse: a retriever that only ever prefers the null document has lost its corpus, and does not find back.

Seen at small scale: with a cold encoder, too high a retriever rate or a stale index p(null) goes to 1 within some hundred
steps. The paper's remedy is the warm start (Guu et al. 2020, section 3.3); the guard is for the day it was not enough.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

from realm_core.errors import RealmError

_DOUBTFUL = 0.5  # part of the limit above which a checkpoint is taken for one on its way down


class CollapseError(RealmError):
    """The retriever has collapsed onto the null document, or what it finds adds nothing."""


class CollapseGuard:
    """Watches the last steps: p(null), the share of retrieval probability on the null document, and retrieval utility, the
    nats a masked wordpiece that documents add. `utility_steps` 0 lets any utility pass."""

    def __init__(self, window: int, limit: float, utility_steps: int = 0) -> None:
        self.limit, self.watches_utility = limit, utility_steps > 0
        self._null: deque[float] = deque(maxlen=window)
        self._utility: deque[float] = deque(maxlen=utility_steps)

    def observe(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take in a step. Raises CollapseError when the mean p(null) over a full window exceeds the limit, or when the mean
        utility over its own is not above 0."""
        if "null_probability" not in metrics:
            return
        self._null.append(metrics["null_probability"])
        if (null := _mean_of_full(self._null)) is not None and null > self.limit:
            raise CollapseError(
                f"step {step}: the retriever has collapsed onto the null document, p(null) {null:.3f} over "
                f"{len(self._null)} steps"
            )
        self._utility.append(metrics.get("utility", 0.0))
        if self.watches_utility and (utility := _mean_of_full(self._utility)) is not None and utility <= 0.0:
            raise CollapseError(
                f"step {step}: documents add nothing, retrieval utility {utility:.3f} over {len(self._utility)} steps"
            )

    def trusts(self, metrics: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with these mean metrics may be resumed from after a collapse that was seen later."""
        unknown = 1.0 if "skipped" in metrics else 0.0  # without a single update there is nothing to trust
        useful = not self.watches_utility or metrics.get("utility", 1.0) > 0.0
        return useful and metrics.get("null_probability", unknown) <= _DOUBTFUL * self.limit


def _mean_of_full(window: deque[float]) -> float | None:
    return sum(window) / len(window) if window and len(window) == window.maxlen else None
