"""What answers: the promotion of an index version, and the fine-tuned reader on top of one."""

from datetime import timedelta

import dagster as dg

from assets.checkpoint import LIVE_POINTER
from assets.partitions import REALM_CKPT
from assets.reporting import (
    DATA_VERSION_TAG,
    drop_old_versions,
    materialized,
    mirror_version,
    stage_run,
    version_card,
    version_facts,
)
from assets.settings import home_settings
from realm_core.artifacts import corpora
from realm_core.artifacts.keys import checkpoint_of, parse_key
from realm_core.artifacts.store import Live, Store
from realm_core.ports import NullSink, Tracker
from realm_core.stages import CODE

_MAX_AGE_HOURS = home_settings().refresh.max_age_hours


class Promotion(dg.Config):
    """Run configuration of a promotion."""

    allow_older: bool = False  # a rollback: the same gates, but an older step than the live one may go live
    allow_drop: bool = False  # documents must go whatever that costs in recall
    reason: str = "refresh"


def pointer_event(live: Live) -> dg.AssetObservation:
    """What is told of a move of the pointer."""
    return dg.AssetObservation(
        asset_key=LIVE_POINTER,
        tags={DATA_VERSION_TAG: live.index_digest},
        metadata={
            "index": live.index,
            "index_digest": live.index_digest,
            "generation": live.generation,
            "reason": live.reason,
        },
    )


@dg.asset(
    deps=["mips_index", "qa_eval"],
    partitions_def=REALM_CKPT,
    group_name="serving",
    code_version=CODE["qualify"],
    pool="promote",
    freshness_policy=(
        dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=_MAX_AGE_HOURS)) if _MAX_AGE_HOURS else None
    ),
)
def promoted_index(
    context: dg.AssetExecutionContext,
    config: Promotion,
    store: dg.ResourceParam[Store],
    tracker: dg.ResourceParam[Tracker],
) -> dg.MaterializeResult:
    """The pointer moves, if the library's own gate agrees; asked alone for an unqualified index, it refuses."""
    from realm_core.stages import promote

    key = context.partition_key
    with stage_run(context):
        live = promote.run(
            store.config(),
            store=store,
            name=key,
            reason=config.reason,
            allow_older=config.allow_older,
            allow_drop=config.allow_drop,
        )
    context.log_event(pointer_event(live))
    run, step = parse_key(key)
    tracker.champion(run, version_card(store, live.index))
    tracker.tag(
        run, {"live_index": live.index, "live_index_digest": live.index_digest, "dagster_run_id": context.run.run_id}
    )
    tracker.sink(run).log(step, {"index/generation": float(live.generation)})
    mirrored = mirror_version(store, live.index)
    return dg.MaterializeResult(
        data_version=dg.DataVersion(live.index_digest),
        metadata={
            **version_facts(store, live.index, tracker),
            **({"mirror": mirrored} if mirrored else {}),
            "generation": live.generation,
            "reason": live.reason,
            "dropped by retention": drop_old_versions(store),
        },
    )


@dg.asset(
    deps=["mips_index", "realm_checkpoint", "question_sets"],
    partitions_def=REALM_CKPT,
    group_name="serving",
    kinds={"pytorch"},
    code_version=CODE["finetune"],
)
def qa_reader(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store], tracker: dg.ResourceParam[Tracker]
) -> dg.MaterializeResult:
    """Question tower and reader fine-tuned on one frozen index; at step 0 of a run this is the ICT-only (ORQA) baseline."""
    from realm_core.stages import finetune

    key = context.partition_key
    out = store.path("readers", key)
    with stage_run(context):
        manifest = finetune.run(
            store.config(),
            index=store.path("indexes", key),
            snapshot=store.path("snapshots", key),
            checkpoint=store.path("checkpoints", checkpoint_of(key)),
            corpus=corpora.under(store, key),
            questions=store.newest("questions"),
            out=out,
            sink=tracker.sink(f"reader_{key}"),
        )
    return materialized(out, manifest)


@dg.asset(
    deps=["qa_reader", "mips_index", "question_sets"],
    partitions_def=REALM_CKPT,
    group_name="evaluate",
    kinds={"mlflow"},
    code_version=CODE["evaluate"],
)
def qa_result(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store], tracker: dg.ResourceParam[Tracker]
) -> dg.MaterializeResult:
    """Exact match and recall of the test questions with the fine-tuned reader."""
    from realm_core.stages import evaluate

    key = context.partition_key
    out = store.path("results", key)
    with stage_run(context):
        manifest = evaluate.run(
            store.config(),
            index=store.path("indexes", key),
            checkpoint=store.path("checkpoints", checkpoint_of(key)),
            reader=store.path("readers", key),
            reader_start=store.path("checkpoints", checkpoint_of(key)),
            corpus=corpora.under(store, key),
            questions=store.newest("questions"),
            split="test",
            out=out,
            sink=NullSink(),
        )
    run, step = parse_key(key)
    tracker.sink(run).log(step, {f"test/{name}": value for name, value in manifest.facts["metrics"].items()})
    return materialized(out, manifest)


@dg.asset(
    deps=["sparse_reader", "corpus_shards", "question_sets"],
    group_name="evaluate",
    kinds={"mlflow"},
    code_version=CODE["evaluate"],
)
def sparse_result(context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]) -> dg.MaterializeResult:
    """Exact match and recall of the test questions with BM25 and the reader trained on it."""
    from realm_core.stages import evaluate

    out = store.path("results", "bm25")
    with stage_run(context):
        manifest = evaluate.run(
            store.config(),
            index=None,
            checkpoint=None,
            reader=store.newest("sparse_readers"),
            reader_start=store.parent(store.newest("sparse_readers"), "checkpoint"),
            corpus=corpora.first(store),
            questions=store.newest("questions"),
            split="test",
            out=out,
            sink=NullSink(),
        )
    return materialized(out, manifest)
