"""The warm start: inverse cloze task for the retriever, masked-LM warm-up for the encoder."""

import dagster as dg

from assets.reporting import materialized, stage_run
from realm_core.artifacts import corpora
from realm_core.artifacts.store import Store
from realm_core.ports import Tracker
from realm_core.stages import CODE


@dg.asset(deps=["corpus_shards"], group_name="train", kinds={"pytorch"}, code_version=CODE["ict"])
def ict_checkpoint(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store], tracker: dg.ResourceParam[Tracker]
) -> dg.MaterializeResult:
    """Embedder after the inverse cloze task and encoder after its warm-up: where every training run starts."""
    from realm_core.stages import ict

    with stage_run(context):
        config, corpus = store.config(), corpora.first(store)
        folder = store.version_for("ict", ict.plan(config, corpus=corpus))
        manifest = ict.run(config, corpus=corpus, out=folder, sink=tracker.sink("ict"))
    tracker.tag("ict", {"ict_digest": manifest.digest, "dagster_run_id": context.run.run_id})
    return materialized(folder, manifest)
