"""Stage `drift`: how far a new index version lies from the one it is to take the place of. An observation, never a gate."""

from realm_core.artifacts.manifest import Manifest, Plan, read_manifest
from realm_core.artifacts.publish import building
from realm_core.artifacts.store import Store, parse_key
from realm_core.config import Config
from realm_core.errors import RealmError
from realm_core.evaluate.drift import Drift, Version, drift_between, index_drift
from realm_core.model.device import resolve
from realm_core.stages import CODE

SECTIONS = ("runtime", "lengths", "index")


def version(store: Store, name: str) -> Version:
    """The folders of an index version of a home. Raises ArtifactError if a parent is gone."""
    index = store.path("indexes", name)
    return Version(index=index, **{role: store.parent(index, role) for role in ("snapshot", "checkpoint", "corpus")})


def run(config: Config, *, store: Store, name: str) -> Manifest | None:
    """Measure `name` against the version that is live now, or was before it. Measured once: later calls return that.

    None for the first version of a home. The ages are those of the encoder behind the older version when the newer one's
    was published: in optimizer steps (only within one training run) a fact, in seconds part of the record.
    """
    if store.has("drifts", name):
        return store.manifest("drifts", name)
    before = store.live_before(name)
    if before is None:
        return None
    old, new = version(store, before.index), version(store, name)
    with building(store.path("drifts", name), _plan(config, old, new)) as build:
        found = between(config, store=store, old=before.index, new=name)
        (run_, step), (old_run, old_step) = parse_key(name), parse_key(before.index)
        same_run = run_ == old_run and step >= old_step
        made = [read_manifest(folder).record.get("created") for folder in (old.checkpoint, new.checkpoint)]
        ages = index_drift(
            index_step=old_step if same_run else None,
            trainer_step=step if same_run else None,
            built_at=made[0],
            now=made[1],
        )
        seconds = {key: ages.pop(key) for key in ("age_seconds",) if key in ages}
        return build.commit({"step": step, "against": before.index, **found, **ages}, record=seconds)


def observe(config: Config, *, store: Store, name: str) -> tuple[Manifest | None, str | None]:
    """`run` for those who go on in any case: (the measurement, None), or (None, why there is none)."""
    try:
        return run(config, store=store, name=name), None
    except RealmError as problem:
        return None, str(problem)


def between(config: Config, *, store: Store, old: str, new: str) -> Drift:
    """Overlap and displacement from one version of a home to another. Raises ArtifactError if bytes are altered or gone."""
    return drift_between(
        version(store, old),
        version(store, new),
        queries=config.index.probe_queries,
        k=config.index.probe_k,
        length=config.lengths.query,
        seed=config.seed,
        device=resolve(config.runtime, shared=True),
    )


def _plan(config: Config, old: Version, new: Version) -> Plan:
    roles = ("index", "snapshot", "checkpoint", "corpus")
    parents = {role: read_manifest(getattr(new, role)) for role in roles}
    parents |= {f"previous_{role}": read_manifest(getattr(old, role)) for role in roles}
    return Plan(stage="drift", code=CODE["drift"], config_digest=config.digest(*SECTIONS), parents=parents)
