"""Jobs: what is run together, in one process."""

from typing import Any

import dagster as dg

from assets.partitions import REALM_CKPT
from assets.reporting import stage_run
from orchestration import refreshes, segments, trainer, turn
from realm_core.artifacts.publish import append_durably
from realm_core.artifacts.store import Store, parse_key

bootstrap = dg.define_asset_job(
    "bootstrap",
    selection=[
        "corpus_shards",
        "pretraining_shards",
        "question_sets",
        "ict_checkpoint",
        "sparse_reader",
        "sparse_result",
    ],
    description="From raw documents to the warm start: shards, questions, ICT checkpoint and the sparse baseline.",
)

grow_corpus = dg.define_asset_job(
    "grow_corpus",
    selection=["corpus_shards"],
    description="What lies in the inbox becomes the next versions of the corpus; its index is asked for by a sensor.",
)

refresh_index = dg.define_asset_job(
    refreshes.JOB,
    selection=dg.AssetSelection.assets("embedding_snapshot", "mips_index", "qa_eval", "promoted_index")
    | dg.AssetSelection.checks_for_assets("mips_index"),
    description="One checkpoint to one index version: embed, build, check, score, promote.",
    tags={"dagster/max_runtime": "21600"},
)

finetune = dg.define_asset_job(
    "finetune",
    selection=["qa_reader", "qa_result"],
    description="Fine-tune question tower and reader on one index version and score the test questions.",
)


train_segment = dg.define_asset_job(
    segments.JOB,
    selection=["realm_checkpoint"],
    description="Train up to one checkpoint, in this run. With supervise.mode=segments a sensor asks for one after the other.",
)


class TrainingRun(dg.Config):
    """Which training run to start or continue."""

    run: str = "r1"


@dg.op
def start_detached_trainer(context: dg.OpExecutionContext, config: TrainingRun, store: dg.ResourceParam[Store]) -> None:
    """Start the trainer as a process of its own and return; with a live trainer of that run, do nothing."""
    context.log.info(trainer.start(store.home, config.run))


@dg.job(description="Start, or continue after a stop, a REALM pre-training run outside Dagster.")
def start_training() -> None:
    start_detached_trainer()


@dg.op(pool="estimate")
def compare_with_live(context: dg.OpExecutionContext, store: dg.ResourceParam[Store]) -> None:
    """Embed a small sample with this checkpoint and with that of the live index; note how far their top k agree."""
    from realm_core.evaluate.refresh_estimate import estimate_refresh as estimate
    from realm_core.stages.questions import load

    key = context.partition_key
    run, step = parse_key(key)
    with stage_run(context):
        live = store.require_live()
        index = store.path("indexes", live.index)
        measures = estimate(
            store.config(),
            checkpoint=store.path("checkpoints", key),
            live_index=index,
            live_checkpoint=store.parent(index, "checkpoint"),
            corpus=store.parent(index, "corpus"),
            questions=[question.question for question in load(store.newest("questions"), "dev")],
        )
        about = {"checkpoint": key, "step": step, "live": live.index, "live_digest": live.index_digest}
        append_durably(store.trainer(run) / turn.ESTIMATES, {**about, **measures})
    metadata: dict[str, Any] = {**about, **{f"estimate/{name}": float(value) for name, value in measures.items()}}
    context.log_event(dg.AssetObservation("realm_checkpoint", partition=key, metadata=metadata))


@dg.job(
    name=turn.ESTIMATE_JOB,
    partitions_def=REALM_CKPT,
    description="Policy drift: would a refresh of this checkpoint change what is retrieved?",
)
def estimate_refresh() -> None:
    compare_with_live()


ALL: list[Any] = [bootstrap, grow_corpus, refresh_index, finetune, train_segment, start_training, estimate_refresh]
