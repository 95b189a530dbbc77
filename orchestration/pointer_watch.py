"""Is the live pointer what promotion left, and does it name an index that is there?"""

from dataclasses import asdict, dataclass

import dagster as dg

from assets.checkpoint import LIVE_POINTER
from realm_core.artifacts.store import Live, Store
from realm_core.errors import RealmError


@dataclass(frozen=True)
class Pointer:
    """The live index version, and what is wrong with it."""

    live: Live | None
    problem: str | None = None


def look(store: Store) -> Pointer:
    """Compare `live.json` with the history that every promotion extends first, and with the store."""
    try:
        live, history = store.live(), store.live_history()
    except RealmError as problem:
        return Pointer(None, str(problem))
    path = store.home / "live.json"
    if live is None:
        return Pointer(None, f"{path}: gone, {history[-1].index} was live; promote it again" if history else None)
    try:
        digest = store.manifest("indexes", live.index).digest
    except RealmError as problem:
        return Pointer(live, f"{path}: names an index that cannot be read: {problem}; promote another one")
    if digest != live.index_digest:
        return Pointer(
            live,
            f"{path}: says {live.index} has digest {live.index_digest[:12]}, it has {digest[:12]}; promote one anew",
        )
    # A crash between the line in the history and the move leaves the pointer one line behind: nobody touched it.
    if any(asdict(live) == asdict(moved) for moved in history[-2:]):
        return Pointer(live)
    return Pointer(
        live, f"{path}: {live.index} was not made live by a promotion: somebody edited it; use realm promote instead"
    )


def observed(instance: dg.DagsterInstance, live: Live) -> bool:
    """Whether Dagster's newest observation of the pointer shows this very move."""
    records = instance.fetch_observations(LIVE_POINTER, limit=1).records
    if not records or records[0].asset_observation is None:
        return False
    metadata = records[0].asset_observation.metadata
    shown = {name: metadata[name].value for name in ("generation", "index_digest") if name in metadata}
    return shown == {"generation": live.generation, "index_digest": live.index_digest}
