"""Inputs of the loop: the corpus as tokenised shards, and the question sets."""

from collections.abc import Iterator

import dagster as dg

from assets.reporting import materialized, stage_run
from realm_core.artifacts import corpora
from realm_core.artifacts.store import Store
from realm_core.ports import NullSink
from realm_core.stages import CODE


@dg.asset(group_name="corpus", kinds={"parquet"}, code_version=CODE["corpus"])
def corpus_shards(context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]) -> dg.MaterializeResult:
    """The documents as shards of tokenised blocks; the digest of every shard is in the metadata."""
    from realm_core.stages import corpus

    with stage_run(context):
        config, source = store.config(), store.source("corpus")
        folder = store.version_for("corpus", corpus.plan(config, source=source))
        manifest = corpus.run(config, source=source, out=folder, sink=NullSink())
        config.require_fits(manifest.facts["blocks"])  # now, not after hours of training
    return materialized(folder, manifest)


@dg.asset(
    deps=["corpus_shards"], group_name="corpus", kinds={"parquet"}, code_version=CODE["corpus"], output_required=False
)
def pretraining_shards(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> Iterator[dg.MaterializeResult]:
    """Documents that only masked queries are drawn from (in the paper news, while Wikipedia is retrieved); optional."""
    from realm_core.stages import corpus

    if not store.has_source("pretrain_corpus"):
        context.log.info("this home draws its queries from corpus_shards; realm run --pretrain-corpus gives it another")
        return
    with stage_run(context):
        config, source, same = store.config(), store.source("pretrain_corpus"), corpora.first(store)
        folder = store.version_for("pretrain_corpus", corpus.plan(config, source=source, vocabulary=same))
        manifest = corpus.run(config, source=source, vocabulary=same, out=folder, sink=NullSink())
    yield materialized(folder, manifest)


@dg.asset(group_name="corpus", kinds={"json"}, code_version=CODE["questions"])
def question_sets(context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]) -> dg.MaterializeResult:
    """Questions with accepted answers, split into train, dev and test."""
    from realm_core.stages import questions

    with stage_run(context):
        config, source = store.config(), store.source("questions")
        folder = store.version_for("questions", questions.plan(config, source=source))
        manifest = questions.run(config, source=source, out=folder, sink=NullSink())
    return materialized(folder, manifest)
