"""The gate's metric policy: a version that answers the dev questions worse than the live one does not take its place."""

from collections.abc import Iterator

from realm_core.artifacts.manifest import Manifest
from realm_core.artifacts.store import Store
from realm_core.config import Config
from realm_core.errors import GateError


def require_no_worse(config: Config, store: Store, name: str, live: str) -> None:
    """Raise GateError if a metric that `config.gate` asks for fell by more than it allows, and if that cannot be told: scores
    are missing, about another index, or of other questions. Nothing is asked where both tolerances are None."""
    asked = {"recall_at_5": config.gate.max_recall_drop, "exact_match": config.gate.max_em_drop}
    tolerances = {metric: tolerance for metric, tolerance in asked.items() if tolerance is not None}
    if tolerances and (problem := _incomparable(store, name, live, list(tolerances))):
        raise GateError(
            f"{name}: cannot be compared with the live {live}: {problem}; realm promote {name} --allow-drop has it live "
            "without that, gate.max_recall_drop=null and gate.max_em_drop=null end comparing"
        )
    for metric, tolerance in tolerances.items():
        new, old = (store.manifest("evaluations", key).facts["metrics"][metric] for key in (name, live))
        if new < old - tolerance:
            raise GateError(f"{name}: {metric} {new:.3f} against {old:.3f} of the live {live}; it stays live")


def _incomparable(store: Store, name: str, live: str, metrics: list[str]) -> str | None:
    """Why the scores of two versions say nothing about each other; None if they do. The corpus may differ: it grows."""
    for key in (name, live):
        if not store.has("evaluations", key):
            return f"{key} has no scores, which refresh_index and realm corpus refresh give it"
    new, old = (store.manifest("evaluations", key) for key in (name, live))
    return next(_problems(store, {name: new, live: old}, metrics), None)


def _problems(store: Store, scored: dict[str, Manifest], metrics: list[str]) -> Iterator[str]:
    for key, scores in scored.items():
        index = store.manifest("indexes", key).digest
        if scores.parents.get("index") != index:
            yield f"the scores of {key} are about index {str(scores.parents.get('index'))[:12]}, it is {index[:12]}"
        for metric in metrics:
            if metric not in scores.facts["metrics"]:
                yield f"the scores of {key} lack {metric}"
    (mine, theirs) = (_terms(scores) for scores in scored.values())
    for what, found in mine.items():
        if found != theirs[what]:
            yield f"scored on other {what}: {found} and {theirs[what]}"


def _terms(scores: Manifest) -> dict[str, str]:
    """Under which terms a split was scored: what must be equal for two numbers to be compared."""
    split = str(scores.facts.get("split"))
    ks = sorted(int(key.removeprefix("recall_at_")) for key in scores.facts["metrics"] if key.startswith("recall_at_"))
    return {
        "questions": f"{scores.facts.get('questions')} of {split} {scores.sources.get(split, 'unknown')[:12]}",
        "k": ", ".join(map(str, ks)) or "none",
    }
