"""Sensors of a corpus that grows: what lies in the inbox is taken in, and the live index follows the newest version."""

import time

import dagster as dg

from assets.partitions import REALM_CKPT
from assets.reporting import CODE_VERSION_TAG, DATA_VERSION_TAG, describe
from orchestration.defs.jobs import grow_corpus, refresh_index
from orchestration.defs.sensors import seconds_between_ticks
from orchestration.refreshes import UNDER_WAY, runs_being_refreshed
from realm_core.artifacts import corpora, inbox
from realm_core.artifacts.keys import checkpoint_of, parse_key
from realm_core.artifacts.manifest import read_manifest
from realm_core.artifacts.store import Store
from realm_core.errors import RealmError

CORPUS = dg.AssetKey("corpus_shards")


@dg.sensor(
    job=grow_corpus, minimum_interval_seconds=seconds_between_ticks(), default_status=dg.DefaultSensorStatus.RUNNING
)
def inbox_sensor(
    context: dg.SensorEvaluationContext, store: dg.ResourceParam[Store]
) -> dg.SensorResult | dg.SkipReason:
    """Ask for the inbox to be taken in when complete files lie there; once for every set of files."""
    waiting = inbox.pending(store.home, time.time())
    if not waiting:
        return dg.SkipReason(f"nothing waits in {store.home / 'inbox'}")
    if not store.names("corpus"):
        return dg.SkipReason("the corpus itself is still to be built")
    if context.instance.get_runs(dg.RunsFilter(job_name=grow_corpus.name, statuses=UNDER_WAY)):
        return dg.SkipReason("the inbox is being taken in")
    names = ", ".join(path.name for path in waiting[:5])
    return dg.SensorResult([dg.RunRequest(run_key=f"grow:{inbox.signature(waiting)}", tags={"realm/inbox": names})])


@dg.sensor(
    job=refresh_index, minimum_interval_seconds=seconds_between_ticks(), default_status=dg.DefaultSensorStatus.RUNNING
)
def growth_sensor(
    context: dg.SensorEvaluationContext, store: dg.ResourceParam[Store]
) -> dg.SensorResult | dg.SkipReason:
    """Ask for an index over the newest corpus where the live one stands on an older one, and report that corpus.

    A command that changes the corpus brings its index up by itself; while it does so nothing is asked for.
    """
    try:
        if store.live() is None or not store.names("corpus"):
            return dg.SkipReason("no index is live yet")
        if corpora.is_growing(store):
            return dg.SkipReason("the corpus is being changed")
        missing = behind(store)
    except RealmError as problem:  # a pointer that cannot be read, above all: pointer_sensor has told somebody
        return dg.SkipReason(f"nothing is refreshed: {problem}")
    events = _unreported(context, store)
    busy = runs_being_refreshed(context.instance)
    wanted = [version for version in missing if parse_key(version)[0] not in busy]
    if not (events or wanted):
        return dg.SkipReason("the live index stands on the newest corpus, or is being brought to it")
    digest = read_manifest(store.newest("corpus")).digest
    requests = [
        dg.RunRequest(
            run_key=f"refresh:{version}:{digest}",
            partition_key=version,
            tags={"realm/checkpoint": checkpoint_of(version)},
        )
        for version in wanted
    ]
    return dg.SensorResult(
        run_requests=requests,
        dynamic_partitions_requests=[REALM_CKPT.build_add_request(wanted)] if wanted else [],
        asset_events=events,
    )


def behind(store: Store) -> list[str]:
    """Index versions over the newest corpus that are missing: that of the live checkpoint, and of a later one whose own
    index was made over an older corpus and may not go live any more. One that was live is not missing: a person went back."""
    live, corpus = store.require_live(), store.newest("corpus")
    if store.manifest("indexes", live.index).parents["corpus"] != read_manifest(corpus).digest:
        version = corpora.version_over(store, checkpoint_of(live.index), corpus)
        return [] if version in {move.index for move in store.live_history()} else [version]
    run, step = parse_key(live.index)
    later = [key for key in store.checkpoints(run) if parse_key(key)[1] > step and _passed(store, key)]
    versions = [corpora.version_over(store, key, corpus) for key in later[-1:]]
    return [version for version in versions if not store.has("verdicts", version)]


def _passed(store: Store, key: str) -> bool:
    return store.has("verdicts", key) and bool(store.manifest("verdicts", key).facts["passed"])


def _unreported(context: dg.SensorEvaluationContext, store: Store) -> list[dg.AssetMaterialization]:
    """The newest corpus, if a command outside Dagster made it by growth."""
    folder = store.newest("corpus")
    manifest = read_manifest(folder)
    record = context.instance.get_latest_materialization_event(CORPUS)
    known = record.asset_materialization.tags if record and record.asset_materialization else {}
    if manifest.stage != "grow" or (known or {}).get(DATA_VERSION_TAG) == manifest.digest:
        return []
    tags = {DATA_VERSION_TAG: manifest.digest, CODE_VERSION_TAG: manifest.code}
    return [dg.AssetMaterialization(asset_key=CORPUS, tags=tags, metadata=describe(folder, manifest))]


ALL = [inbox_sensor, growth_sensor]
