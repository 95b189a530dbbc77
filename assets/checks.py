"""The gate made visible: one qualification of the index version, shown as blocking checks.

Dagster's blocking holds only inside one run, so promotion reads the same verdict and refuses by itself.
"""

from collections.abc import Iterator

import dagster as dg

from assets.partitions import REALM_CKPT
from assets.reporting import stage_run, version_card
from realm_core.artifacts import corpora
from realm_core.artifacts.keys import checkpoint_of, parse_key
from realm_core.artifacts.store import Store
from realm_core.ports import Tracker

CHECKS = {
    "no_missing_shard": "every shard of the corpus is embedded, row for row, by this one checkpoint",
    "checksum": "bytes of index and snapshot equal their manifests",
    "vectors_sane": "all vectors are finite and none is zero",
    "recall_vs_bruteforce": "the index finds what exact search finds, on a fixed set of probe queries",
    "retriever_not_collapsed": "the retriever still prefers documents to the null document",
}


@dg.multi_asset_check(
    specs=[
        dg.AssetCheckSpec(name, asset="mips_index", description=text, blocking=True, partitions_def=REALM_CKPT)
        for name, text in CHECKS.items()
    ],
    pool="refresh",
)
def index_checks(
    context: dg.AssetCheckExecutionContext, store: dg.ResourceParam[Store], tracker: dg.ResourceParam[Tracker]
) -> Iterator[dg.AssetCheckResult]:
    """Qualify the index version of this partition and show each finding."""
    from realm_core.stages import qualify

    key = context.op_execution_context.partition_key
    with stage_run(context):
        manifest = qualify.run(
            store.config(),
            index=store.path("indexes", key),
            snapshot=store.path("snapshots", key),
            checkpoint=store.path("checkpoints", checkpoint_of(key)),
            corpus=corpora.under(store, key),
            out=store.path("verdicts", key),
        )
    run, step = parse_key(key)
    tracker.sink(run).log(step, {"index/recall_vs_exact": manifest.facts["recall_vs_exact"]})
    if manifest.facts["passed"]:
        tracker.register(run, version_card(store, key))
    for name, finding in manifest.facts["findings"].items():
        yield dg.AssetCheckResult(
            check_name=name,
            asset_key="mips_index",
            passed=finding["passed"],
            severity=dg.AssetCheckSeverity.ERROR,
            metadata={"found": str(finding["found"]), "index_digest": manifest.parents["index"], "partition": key},
        )
