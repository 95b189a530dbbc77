"""How good an index version is: recall and exact match of dev questions, read by a reader that is held fixed."""

import dagster as dg

from assets.partitions import REALM_CKPT
from assets.reporting import materialized, stage_run
from realm_core.artifacts import corpora
from realm_core.artifacts.keys import checkpoint_of, parse_key
from realm_core.artifacts.store import Store
from realm_core.ports import NullSink, Tracker
from realm_core.stages import CODE


@dg.asset(
    deps=["ict_checkpoint", "corpus_shards", "question_sets"],
    group_name="evaluate",
    kinds={"pytorch"},
    code_version=CODE["finetune"],
)
def sparse_reader(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store], tracker: dg.ResourceParam[Tracker]
) -> dg.MaterializeResult:
    """A reader trained on BM25's passages: the sparse baseline, and the fixed probe behind every index's exact match."""
    from realm_core.stages import finetune

    with stage_run(context):
        config = store.config()
        inputs = {
            "checkpoint": store.newest("ict"),
            "corpus": corpora.first(store),
            "questions": store.newest("questions"),
        }
        folder = store.version_for("sparse_readers", finetune.plan(config, index=None, **inputs))
        manifest = finetune.run(config, index=None, **inputs, out=folder, sink=tracker.sink("sparse_reader"))
    return materialized(folder, manifest)


@dg.asset(
    deps=["mips_index", "realm_checkpoint", "sparse_reader", "question_sets"],
    partitions_def=REALM_CKPT,
    group_name="evaluate",
    kinds={"mlflow"},
    code_version=CODE["evaluate"],
    pool="refresh",
)
def qa_eval(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store], tracker: dg.ResourceParam[Tracker]
) -> dg.MaterializeResult:
    """Recall@k and exact match on dev questions; only retrieval differs from one index version to the next."""
    from realm_core.stages import evaluate

    key = context.partition_key
    out = store.path("evaluations", key)
    with stage_run(context):
        manifest = evaluate.run(
            store.config(),
            index=store.path("indexes", key),
            checkpoint=store.path("checkpoints", checkpoint_of(key)),
            reader=store.newest("sparse_readers"),
            reader_start=store.parent(store.newest("sparse_readers"), "checkpoint"),
            corpus=corpora.under(store, key),
            questions=store.newest("questions"),
            split="dev",
            out=out,
            sink=NullSink(),
        )
    run, step = parse_key(key)
    tracker.sink(run).log(step, {f"dev/{name}": value for name, value in manifest.facts["metrics"].items()})
    return materialized(out, manifest)
