"""All stages of one refresh, in their order: what the job `refresh_index` does, for who works without an orchestrator."""

from pathlib import Path

from realm_core.artifacts import corpora
from realm_core.artifacts.keys import checkpoint_of, parse_key
from realm_core.artifacts.manifest import Manifest, read_manifest
from realm_core.artifacts.store import Live, Store
from realm_core.config import Config
from realm_core.errors import ArtifactError, GateError
from realm_core.evaluate.drift import measures
from realm_core.ports import MetricSink
from realm_core.stages import drift, evaluate, index, promote, qualify, reembed

_TRIES = 3  # how often the live checkpoint may change while its corpus version is being made


def run(
    config: Config,
    *,
    store: Store,
    version: str,
    sink: MetricSink,
    reason: str,
    allow_older: bool = False,
    allow_drop: bool = False,
) -> tuple[Live, Manifest]:
    """Embed, index, qualify, score and promote one version; finished parts are kept. Returns (live, snapshot manifest).

    Raises GateError if the version may not go live; the live one then stays.
    """
    checkpoint, corpus = store.path("checkpoints", checkpoint_of(version)), corpora.under(store, version)
    if not store.has("checkpoints", checkpoint.name):
        raise ArtifactError(f"{checkpoint}: no such checkpoint; those there are: {', '.join(_newest(store))}")
    snapshot, built = store.path("snapshots", version), store.path("indexes", version)
    made = reembed.run(
        config,
        checkpoint=checkpoint,
        corpus=corpus,
        out=snapshot,
        sink=sink,
        earlier=corpora.snapshots_beside(store, version),
    )
    index.run(config, snapshot=snapshot, checkpoint=checkpoint, corpus=corpus, out=built, sink=sink)
    measured, _ = drift.observe(config, store=store, name=version)
    sink.log(parse_key(version)[1], {f"drift/{key}": value for key, value in measures(measured).items()})
    qualify.run(
        config,
        index=built,
        snapshot=snapshot,
        checkpoint=checkpoint,
        corpus=corpus,
        out=store.path("verdicts", version),
    )
    _score(config, store, version, checkpoint, corpus, sink)
    live = promote.run(config, store=store, name=version, reason=reason, allow_older=allow_older, allow_drop=allow_drop)
    return live, made


def over_newest_corpus(
    config: Config, *, store: Store, sink: MetricSink, reason: str, allow_drop: bool = False
) -> tuple[Live, Manifest] | None:
    """Bring the live checkpoint's index to the newest corpus, whichever checkpoint is live; None before the first is.

    A refresh by the loop may put a newer checkpoint live meanwhile: then that one is brought up.
    """
    for attempt in range(_TRIES):
        live = store.live()
        if live is None:
            return None
        version = corpora.version_over(store, checkpoint_of(live.index), store.newest("corpus"))
        try:
            return run(config, store=store, version=version, sink=sink, reason=reason, allow_drop=allow_drop)
        except GateError:
            now = store.require_live()
            if attempt + 1 == _TRIES or parse_key(now.index) == parse_key(live.index):
                raise
    raise AssertionError("the loop returns or raises")


def _score(config: Config, store: Store, version: str, checkpoint: Path, corpus: Path, sink: MetricSink) -> None:
    reader = store.newest("sparse_readers")
    evaluate.run(
        config,
        index=store.path("indexes", version),
        checkpoint=checkpoint,
        reader=reader,
        reader_start=store.parent(reader, "checkpoint"),
        corpus=corpus,
        questions=store.newest("questions"),
        split="dev",
        out=store.path("evaluations", version),
        sink=sink,
    )


def is_over_newest_corpus(store: Store) -> bool:
    """Whether the live index stands on the newest version of the corpus."""
    live = store.require_live()
    return store.manifest("indexes", live.index).parents["corpus"] == read_manifest(store.newest("corpus")).digest


def _newest(store: Store) -> list[str]:
    return store.keys("checkpoints")[-5:]
