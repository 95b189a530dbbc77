"""Stage `index`: the vectors of a snapshot -> a searchable index version."""

from pathlib import Path

from realm_core.artifacts.manifest import Manifest, Plan, open_artifact, read_manifest
from realm_core.artifacts.publish import building, finished
from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.index.backends import build_index
from realm_core.index.version import require_parent, snapshot_of
from realm_core.ports import MetricSink
from realm_core.stages import CODE

SECTIONS = ("index",)


def plan(config: Config, *, snapshot: Path, checkpoint: Path, corpus: Path) -> Plan:
    """What `run` would make. Checkpoint and corpus are parents too: a reader must be able to demand them."""
    parents = {
        "snapshot": read_manifest(snapshot),
        "checkpoint": read_manifest(checkpoint),
        "corpus": read_manifest(corpus),
    }
    return Plan(stage="index", code=CODE["index"], config_digest=config.digest(*SECTIONS), parents=parents)


def run(config: Config, *, snapshot: Path, checkpoint: Path, corpus: Path, out: Path, sink: MetricSink) -> Manifest:
    """Build the index. Raises ArtifactError if the snapshot is altered, incomplete, or of another checkpoint or corpus."""
    doing = plan(config, snapshot=snapshot, checkpoint=checkpoint, corpus=corpus)
    if done := finished(out, doing):
        return done
    found = open_artifact(snapshot, "reembed")
    require_parent(snapshot, found, "checkpoint", checkpoint)
    require_parent(snapshot, found, "corpus", corpus)
    vectors = snapshot_of(snapshot, Corpus.open(corpus)).vectors()
    with building(out, doing) as build:
        index = build_index(vectors, config.index.backend, **config.index.params)
        index.save(build.folder)
        sink.log(0, {"index/vectors": index.size})
        return build.commit(
            {
                "step": found.facts["step"],
                "encoder": found.facts["encoder"],
                "backend": config.index.backend,
                "vectors": index.size,
                "dimension": index.dimension,
                "shards": found.facts["shards"],
            }
        )
