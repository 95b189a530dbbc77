"""Jobs: what is run together, in one process."""

from typing import Any

import dagster as dg

from orchestration import trainer
from realm_core.artifacts.store import Store

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
    "refresh_index",
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


ALL: list[Any] = [bootstrap, grow_corpus, refresh_index, finetune, start_training]
