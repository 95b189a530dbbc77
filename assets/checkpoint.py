"""Rolling REALM checkpoints. A long trainer outside any Dagster run writes most of them and a sensor reports them;
materialising a partition here trains just the segment up to that step, and with `supervise.mode: segments` a sensor asks for
one after the other. Both ways leave the same manifest."""

import dagster as dg

from assets.partitions import REALM_CKPT
from assets.reporting import CODE_VERSION_TAG, DATA_VERSION_TAG, describe, materialized, stage_run
from realm_core.artifacts import corpora
from realm_core.artifacts.keys import checkpoint_of, parse_key
from realm_core.artifacts.store import Store
from realm_core.errors import ArtifactError
from realm_core.ports import Tracker
from realm_core.stages import CODE

LIVE_POINTER = dg.AssetKey("live_index_pointer")

# The loop checkpoint -> index -> checkpoint is legal data but no legal graph: the live pointer stands upstream as an
# external asset, observed at every promotion, and each checkpoint records which index served it.
live_index_pointer = dg.AssetSpec(
    LIVE_POINTER, group_name="serving", description="Which index version answers: live.json. Observed at promotion."
)


@dg.asset(
    deps=["ict_checkpoint", "corpus_shards", "pretraining_shards", live_index_pointer],
    partitions_def=REALM_CKPT,
    group_name="train",
    kinds={"pytorch"},
    code_version=CODE["pretrain"],
    pool="trainer",
)
def realm_checkpoint(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store], tracker: dg.ResourceParam[Tracker]
) -> dg.MaterializeResult:
    """Retriever and encoder after so many joint steps; parent, live index and mean metrics are in the manifest.

    Trains under the lease of the run: while a detached trainer holds it, this fails and says so.
    """
    from realm_core.stages import pretrain

    key = checkpoint_of(context.partition_key)
    with stage_run(context):
        if store.is_quarantined(key):
            raise ArtifactError(f"{key}: set aside after a collapse; train with other settings")
        if not store.has("checkpoints", key):
            run, step = parse_key(key)
            pretrain.run(
                store.config(),
                store=store,
                training_run=run,
                corpus=corpora.of_run(store, run),
                start=store.newest("ict"),
                until=step,
                sink=tracker.sink(run),
            )
            if not store.has("checkpoints", key):
                newest = store.checkpoints(run)[-1]
                raise ArtifactError(f"{key}: the run is at {newest} already and left none there; ask for a later step")
            if step >= store.config().pretrain.steps:
                tracker.finish(run)
        folder, manifest = store.path("checkpoints", key), store.manifest("checkpoints", key)
    return materialized(folder, manifest)


def checkpoint_event(store: Store, key: str) -> dg.AssetMaterialization:
    """What the sensor reports for a checkpoint that a trainer outside Dagster wrote."""
    manifest = store.manifest("checkpoints", key)
    tags = {DATA_VERSION_TAG: manifest.digest, CODE_VERSION_TAG: manifest.code}
    if live := manifest.parents.get("live_index"):
        tags["dagster/input_data_version/live_index_pointer"] = live
    return dg.AssetMaterialization(
        asset_key="realm_checkpoint",
        partition=key,
        tags=tags,
        metadata=describe(store.path("checkpoints", key), manifest),
    )
