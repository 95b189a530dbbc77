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
    """The retriever has collapsed onto the null document."""


class CollapseGuard:
    """Watches p(null), the share of retrieval probability on the null document, over the last `window` steps."""

    def __init__(self, window: int, limit: float) -> None:
        self.window, self.limit = window, limit
        self._recent: deque[float] = deque(maxlen=window)

    def observe(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take in a step. Raises CollapseError when the mean over a full window exceeds the limit."""
        if "null_probability" not in metrics:
            return
        self._recent.append(metrics["null_probability"])
        mean = sum(self._recent) / len(self._recent)
        if len(self._recent) == self.window and mean > self.limit:
            raise CollapseError(
                f"step {step}: the retriever has collapsed onto the null document, p(null) {mean:.3f} over {self.window} steps"
            )

    def trusts(self, metrics: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with these mean metrics may be resumed from after a collapse that was seen later."""
        unknown = 1.0 if "skipped" in metrics else 0.0  # without a single update there is nothing to trust
        return metrics.get("null_probability", unknown) <= _DOUBTFUL * self.limit
