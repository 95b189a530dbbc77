"""From a checkpoint to a searchable index: every block embedded, then the MIPS structure over the vectors."""

import dagster as dg

from assets.partitions import REALM_CKPT
from assets.reporting import drift_facts, materialized, stage_run
from realm_core.artifacts import corpora
from realm_core.artifacts.keys import checkpoint_of, parse_key
from realm_core.artifacts.store import Store
from realm_core.ports import NullSink, Tracker
from realm_core.stages import CODE


@dg.asset(
    deps=["realm_checkpoint", "corpus_shards"],
    partitions_def=REALM_CKPT,
    group_name="index",
    kinds={"pytorch", "numpy"},
    code_version=CODE["reembed"],
    pool="refresh",
    retry_policy=dg.RetryPolicy(max_retries=1),
)
def embedding_snapshot(context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]) -> dg.MaterializeResult:
    """One vector a block from one checkpoint. A killed pass resumes at the shard it was in; over a corpus that has grown
    only new blocks are embedded."""
    from realm_core.stages import reembed

    key = context.partition_key
    out = store.path("snapshots", key)
    with stage_run(context):
        manifest = reembed.run(
            store.config(),
            checkpoint=store.path("checkpoints", checkpoint_of(key)),
            corpus=corpora.under(store, key),
            out=out,
            sink=NullSink(),
            earlier=corpora.snapshots_beside(store, key),
        )
    return materialized(out, manifest)


@dg.asset(
    deps=["embedding_snapshot", "realm_checkpoint", "corpus_shards"],
    partitions_def=REALM_CKPT,
    group_name="index",
    kinds={"faiss"},
    code_version=CODE["index"],
    pool="refresh",
    retry_policy=dg.RetryPolicy(max_retries=1),
)
def mips_index(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store], tracker: dg.ResourceParam[Tracker]
) -> dg.MaterializeResult:
    """The index version: the only thing that can go live, once its checks and the gate agree."""
    from realm_core.stages import index

    key = context.partition_key
    out = store.path("indexes", key)
    with stage_run(context):
        manifest = index.run(
            store.config(),
            snapshot=store.path("snapshots", key),
            checkpoint=store.path("checkpoints", checkpoint_of(key)),
            corpus=corpora.under(store, key),
            out=out,
            sink=NullSink(),
        )
        moved = {f"drift/{name}": value for name, value in drift_facts(context, store, key).items()}
    run, step = parse_key(key)
    tracker.sink(run).log(step, moved)
    url = tracker.url(run)
    return materialized(out, manifest, **moved, **({"mlflow": dg.MetadataValue.url(url)} if url else {}))
