"""Stage `promote`: the gate. The pointer moves only to an index version that has earned it, whoever asks."""

import sys
from pathlib import Path

from realm_core.artifacts import corpora
from realm_core.artifacts.keys import checkpoint_of
from realm_core.artifacts.manifest import Manifest, open_artifact, read_manifest, verify_files
from realm_core.artifacts.publish import provenance
from realm_core.artifacts.store import Live, Store, parse_key
from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.errors import ArtifactError, ConfigError, GateError
from realm_core.model.bundle import EMBEDDER
from realm_core.stages.metric_policy import require_no_worse
from realm_core.stages.qualify import SECTIONS as VERDICT_SECTIONS
from realm_core.stages.qualify import require_complete


def run(
    config: Config,
    *,
    store: Store,
    name: str,
    reason: str = "by hand",
    allow_older: bool = False,
    allow_drop: bool = False,
) -> Live:
    """Verify again and move `live.json`. Promoting what is live already changes nothing, as long as the history says so too:
    a pointer that somebody edited is moved, and one that is damaged is first mended from the history, in a warning.

    `allow_older` is a rollback to an earlier step or corpus, though never to one that holds documents removed since;
    `allow_drop` does not ask the metrics: a document may have to go whatever that costs.

    Raises GateError naming the first condition that fails, ArtifactError if a byte changed since qualification or if the
    query tower of the version is gone. `allow_older` is the rollback: an older step may go live, and a version that was
    live before is not compared with the live one, whose metrics may be just what is wrong.
    """
    _require_known(store, name)
    require_reason(reason)
    with store.pointer_lock():  # retention marks what it drops under the same lock: what is verified here stays
        index = open_artifact(store.path("indexes", name), "index")
        if mended := store.mend_live():
            print(f"warning: {mended}", file=sys.stderr, flush=True)
        live, last = store.live(), store.live_history()[-1:]
        if live is not None and [live] == last and (live.index, live.index_digest) == (name, index.digest):
            return live
        live = _to_compare_with(store, live, last)
        _require_verdict(config, store, name, index)
        checkpoint = _require_query_tower(store, name)
        _require_complete(store, name)
        if live is not None:
            _require_newer(name, live, allow_older)
            for before in {move.index: move for move in (*last, live)}.values():
                _require_nothing_brought_back(store, name, before)
            _require_corpus(store, name, live, allow_older)
            stood_the_test = allow_older and index.digest in {move.index_digest for move in store.live_history()}
            if not (allow_drop or stood_the_test):
                require_no_worse(config, store, name, live.index)
        return store.move_live(name, index.digest, checkpoint.digest, reason, provenance().get("dagster_run_id"))


def require_reason(reason: str) -> None:
    """Raise ConfigError for an empty one: the history is read by people who were not there."""
    if not reason.strip():
        raise ConfigError("--reason is empty; say why, in a few words that stay in live.history.jsonl")


def _to_compare_with(store: Store, live: Live | None, last: list[Live]) -> Live | None:
    """What is live, or what the last promotion left where somebody has the pointer name an index that is not there."""
    known = store.names("indexes")
    if live is not None and live.index in known and store.manifest("indexes", live.index).digest == live.index_digest:
        return live
    return last[0] if last and last[0].index in known else None


def _require_known(store: Store, name: str) -> None:
    if not store.has("indexes", name):
        known = ", ".join(store.keys("indexes")[-5:]) or "none yet"
        raise ArtifactError(
            f"{store.path('indexes', name)}: no manifest.json, so no such index version; newest versions: {known}"
        )


def _require_complete(store: Store, name: str) -> None:
    """Rows are counted against the corpus here too: a verdict is only what somebody once wrote."""
    index = store.path("indexes", name)
    snapshot, checkpoint, corpus = (store.parent(index, role) for role in ("snapshot", "checkpoint", "corpus"))
    require_complete(index, snapshot, checkpoint, corpus, Corpus.open(corpus))


def _require_verdict(config: Config, store: Store, name: str, index: Manifest) -> None:
    if not store.has("verdicts", name):
        raise GateError(f"{name}: not qualified; run the refresh_index job for it, or realm qualify {name}")
    verdict = open_artifact(store.path("verdicts", name), "qualify")
    if verdict.config_digest != config.digest(*VERDICT_SECTIONS):
        raise GateError(
            f"{name}: its verdict was given under other settings; qualify it with those of this home: "
            f"realm qualify {name} --again"
        )
    if verdict.parents["index"] != index.digest:
        raise GateError(f"{name}: its verdict is about index {verdict.parents['index'][:12]}; qualify it again")
    if not verdict.facts["passed"]:
        failed = [f"{key}: {value['found']}" for key, value in verdict.facts["findings"].items() if not value["passed"]]
        raise GateError(f"{name}: refused by its verdict ({'; '.join(failed)}); the live index stays")


def _require_query_tower(store: Store, name: str) -> Manifest:
    """The checkpoint whose query tower the version is asked with: there, unaltered, and not set aside."""
    folder = store.parent(store.path("indexes", name), "checkpoint")
    if store.is_quarantined(folder.name):
        raise GateError(f"{name}: its checkpoint {folder.name} is quarantined; promote an earlier version")
    checkpoint = read_manifest(folder)
    verify_files(folder, checkpoint, only=EMBEDDER)
    return checkpoint


def _require_newer(name: str, live: Live, allow_older: bool) -> None:
    run, step = parse_key(name)
    live_run, live_step = parse_key(live.index)
    if run == live_run and step < live_step and not allow_older:
        raise GateError(
            f"{name}: older than the live {live.index}; to roll back, realm rollback --to {name} --reason …"
        )


def _require_nothing_brought_back(store: Store, name: str, live: Live) -> None:
    """A refresh that began before documents were removed must not bring them back, and neither may a rollback nor a pointer
    that was edited: what the last promotion left counts beside what is live."""
    if live.index not in store.names("indexes"):
        return
    mine, theirs = _corpora(store, name, live)
    if removed := corpora.removed_between(store, mine, theirs):
        raise GateError(
            f"{name}: its corpus {mine.name} still holds {removed} of the documents removed since; "
            f"realm corpus refresh --checkpoint {checkpoint_of(name)} makes its index over {theirs.name}"
        )


def _corpora(store: Store, name: str, live: Live) -> tuple[Path, Path]:
    mine, theirs = (store.parent(store.path("indexes", version), "corpus") for version in (name, live.index))
    return mine, theirs


def _require_corpus(store: Store, name: str, live: Live, allow_older: bool) -> None:
    mine, theirs = _corpora(store, name, live)
    descends = corpora.removed_between(store, mine, theirs) is not None
    if mine != theirs and not allow_older and (descends or corpora.number(mine) < corpora.number(theirs)):
        raise GateError(
            f"{name}: over corpus {mine.name}, older than {theirs.name} of the live {live.index}; "
            f"to roll back, realm rollback --to {name} --reason …"
        )
