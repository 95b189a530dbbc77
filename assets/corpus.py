"""Inputs of the loop: the corpus as tokenised shards, and the question sets."""

import time
from collections.abc import Iterator

import dagster as dg

from assets.reporting import materialized, stage_run
from realm_core.artifacts import corpora
from realm_core.artifacts.store import Store
from realm_core.ports import NullSink
from realm_core.stages import CODE


@dg.asset(group_name="corpus", kinds={"parquet"}, code_version=CODE["corpus"])
def corpus_shards(context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]) -> dg.MaterializeResult:
    """The documents as shards of tokenised blocks, grown by what lies in the inbox; every shard's digest is in the metadata."""
    from realm_core.stages import corpus, inbox

    with stage_run(context):
        config = store.config()
        folder, manifest = corpus.of_home(config, store=store, sink=NullSink())
        config.require_fits(manifest.facts["blocks"])  # now, not after hours of training
        taken = inbox.take(config, store=store, sink=NullSink(), now=time.time())
        for file in taken:
            context.log.info(f"{file.name}: {file.corpus or 'refused, ' + str(file.reason)}")
        if taken:
            folder = store.newest("corpus")
            manifest = store.manifest("corpus", folder.name)
    refused = [file.name for file in taken if file.corpus is None]
    return materialized(folder, manifest, **({"refused": ", ".join(refused)} if refused else {}))


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
