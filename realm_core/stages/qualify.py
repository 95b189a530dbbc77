"""Stage `qualify`: is this index version complete, unaltered, sane, and as good as exact search? The verdict is an artifact."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from realm_core.artifacts.manifest import Manifest, Plan, open_artifact, read_manifest
from realm_core.artifacts.publish import building, finished, set_aside
from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.errors import ArtifactError
from realm_core.index.backends import load_index
from realm_core.index.recall import recall_against_exact
from realm_core.index.snapshot import Snapshot
from realm_core.index.version import require_parent, snapshot_of
from realm_core.stages import CODE
from realm_core.train.update import seed_of

SECTIONS = ("reembed", "index", "gate")


def plan(config: Config, *, index: Path, snapshot: Path, checkpoint: Path, corpus: Path) -> Plan:
    """What `run` would make."""
    parents = {
        "index": read_manifest(index),
        "snapshot": read_manifest(snapshot),
        "checkpoint": read_manifest(checkpoint),
        "corpus": read_manifest(corpus),
    }
    return Plan(stage="qualify", code=CODE["qualify"], config_digest=config.digest(*SECTIONS), parents=parents)


def run(
    config: Config, *, index: Path, snapshot: Path, checkpoint: Path, corpus: Path, out: Path, again: bool = False
) -> Manifest:
    """Examine one index version. A failing version gives a verdict with `passed` False, not an error.

    `again` sets an earlier verdict aside first, of whatever settings: it stays readable below `.superseded`.
    """
    doing = plan(config, index=index, snapshot=snapshot, checkpoint=checkpoint, corpus=corpus)
    if again:
        set_aside(out)
    if done := finished(out, doing):
        return done
    config.require_fits(len(Corpus.open(corpus)), "index.probe_k")
    with building(out, doing) as build:
        findings = examine(config, index=index, snapshot=snapshot, checkpoint=checkpoint, corpus=corpus)
        return build.commit(
            {
                "step": doing.parents["index"].facts["step"],
                "index_digest": doing.parents["index"].digest,
                "passed": all(finding["passed"] for finding in findings.values()),
                "recall_vs_exact": findings["recall_vs_bruteforce"]["found"],
                "findings": findings,
            }
        )


def examine(
    config: Config, *, index: Path, snapshot: Path, checkpoint: Path, corpus: Path
) -> dict[str, dict[str, Any]]:
    """Findings by name: {"passed": bool, "found": what was seen}."""
    blocks = Corpus.open(corpus)
    complete = _attempt(lambda: require_complete(index, snapshot, checkpoint, corpus, blocks))
    checksum = _attempt(lambda: (open_artifact(index, "index"), open_artifact(snapshot, "reembed")))
    facts = read_manifest(snapshot).facts
    sane = not facts["zero_vectors"] and not facts["bad_vectors"]
    # An altered file is never opened: recall is then reported as 0.
    readable = complete is None and checksum is None
    recall = _recall(config, index, snapshot_of(snapshot, blocks)) if readable else 0.0
    trained = read_manifest(checkpoint).facts["metrics"]
    # Where every step since the last checkpoint was skipped, nothing is known of the retriever: that does not pass.
    # Where every step since the last checkpoint was skipped, nothing is known of the retriever: that does not pass.
    null = trained.get("null_probability", 1.0 if "skipped" in trained else None)
    unknown = "every step since the last checkpoint was skipped" if "skipped" in trained else "not trained yet"
    return {
        "no_missing_shard": {"passed": complete is None, "found": complete or f"{len(blocks.shards)} shards"},
        "checksum": {"passed": checksum is None, "found": checksum or "all bytes as recorded"},
        "vectors_sane": {
            "passed": sane,
            "found": f"{facts['bad_vectors']:.0f} not finite, {facts['zero_vectors']:.0f} zero, "
            f"norms {facts['norm_min']:.3g} to {facts['norm_max']:.3g}",
        },
        "recall_vs_bruteforce": {"passed": recall >= config.gate.min_recall_vs_exact, "found": recall},
        "retriever_not_collapsed": {
            "passed": null is None or null <= config.gate.max_null_probability,
            "found": trained.get("null_probability", unknown),
        },
    }


def require_complete(index: Path, snapshot: Path, checkpoint: Path, corpus: Path, blocks: Corpus) -> None:
    """Raise ArtifactError unless index and snapshot hold one vector for every block of the corpus, shard for shard, and
    all of it was made from this one checkpoint."""
    made = read_manifest(snapshot)
    require_parent(snapshot, made, "checkpoint", checkpoint)
    require_parent(snapshot, made, "corpus", corpus)
    require_parent(index, read_manifest(index), "snapshot", snapshot)
    vectors = snapshot_of(snapshot, blocks)
    if set(blocks.shards) != set(read_manifest(index).facts["shards"]):
        raise ArtifactError(f"{index}: made of other shards than {corpus} has; build the index again")
    if (size := read_manifest(index).facts["vectors"]) != vectors.size:
        raise ArtifactError(f"{index}: {size} vectors for {vectors.size} blocks; build the index again")


def _recall(config: Config, index: Path, snapshot: Snapshot) -> float:
    """Recall of a fixed probe: block vectors with a little noise stand for queries, so that no encoder is needed."""
    facts = read_manifest(index).facts
    vectors = snapshot.vectors()
    rng = np.random.default_rng(seed_of(config.seed, "probe"))
    chosen = rng.choice(len(vectors), size=min(config.index.probe_queries, len(vectors)), replace=False)
    probes = np.array(vectors[np.sort(chosen)])
    probes += 0.1 * probes.std() * rng.standard_normal(probes.shape, dtype=np.float32)
    return recall_against_exact(
        load_index(index, size=facts["vectors"], dimension=facts["dimension"]),
        torch.from_numpy(np.array(vectors)),
        torch.from_numpy(probes),
        config.index.probe_k,
    )


def _attempt(check: Any) -> str | None:
    """None if the check passes, else the operator's message."""
    try:
        check()
    except ArtifactError as error:
        return str(error)
    return None
