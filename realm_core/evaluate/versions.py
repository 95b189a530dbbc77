"""Index versions side by side: a list of all of them, and what changed from one to another. Read from manifests."""

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

import numpy as np

from realm_core.artifacts import corpora
from realm_core.artifacts.keys import checkpoint_of
from realm_core.artifacts.manifest import PRUNED, Manifest
from realm_core.artifacts.settings import differences, settings_of
from realm_core.artifacts.store import Live, Store, parse_key
from realm_core.corpus.shards import Corpus
from realm_core.errors import ArtifactError
from realm_core.evaluate.drift import measures

METRICS = ("recall_vs_exact", "recall_at_5", "exact_match", "null_probability", "utility", "loss")


def listing(store: Store) -> list[dict[str, Any]]:
    """Every index version of a home, by training run and step."""
    return [describe(store, name) for name in store.keys("indexes")]


def describe(store: Store, name: str) -> dict[str, Any]:
    """One index version as plain values; what is not known is None. Shares lie in [0, 1], times in seconds."""
    index = store.manifest("indexes", name)
    run, step = parse_key(name)
    verdict, scored, drift = (_manifest(store, kind, name) for kind in ("verdicts", "evaluations", "drifts"))
    checkpoint = _part(store, "checkpoints", name)
    trained = checkpoint.facts.get("metrics", {}) if checkpoint else {}
    live = store.live()
    return {
        "index": name,
        "state": _state(store, name, index, verdict, live),
        "index_digest": index.digest,
        "checkpoint_digest": index.parents.get("checkpoint"),
        "corpus_digest": index.parents.get("corpus"),
        "run": run,
        "step": step,
        "backend": index.facts.get("backend"),
        "vectors": index.facts.get("vectors"),
        "recall_vs_exact": verdict.facts["recall_vs_exact"] if verdict else None,
        **{name: (scored.facts["metrics"] if scored else {}).get(name) for name in ("recall_at_5", "exact_match")},
        **{name: trained.get(name) for name in ("null_probability", "utility", "loss")},
        "drift": {"against": drift.facts["against"], **measures(drift)} if drift else None,
        "verdict": verdict_text(verdict),
        "made_at": index.record.get("created"),
        "bytes_kept": not (store.path("indexes", name) / PRUNED).exists(),
        "generations": [move.generation for move in store.live_history() if move.index_digest == index.digest],
        "dagster_run_id": index.record.get("dagster_run_id"),
        "mlflow_run_id": checkpoint.record.get("mlflow_run_id") if checkpoint else None,
        "git": index.record.get("git"),
    }


def training_time(store: Store, run: str) -> tuple[float, float]:
    """(seconds that a training run computed, seconds of them that it waited for an index), from its checkpoints. One that is
    damaged is left out: nobody stops for a figure."""
    seconds = stalled = 0.0
    for key in store.keys("checkpoints"):
        if parse_key(key)[0] == run:
            with suppress(ArtifactError):
                record = store.manifest("checkpoints", key).record
                seconds += float(record.get("train_seconds", 0.0))
                stalled += float(record.get("stall_seconds", 0.0))
    return seconds, stalled


def verdict_text(verdict: Manifest | None) -> str:
    """A verdict in words."""
    if verdict is None:
        return "not qualified"
    failed = [name for name, finding in verdict.facts["findings"].items() if not finding["passed"]]
    return f"refused: {', '.join(failed)}" if failed else "passed"


def compare(store: Store, old: str, new: str) -> dict[str, Any]:
    """What changed from one index version to another: steps, corpus, settings, code, metrics, and the recorded drift."""
    a, b = describe(store, old), describe(store, new)
    drift = b["drift"] if b["drift"] and b["drift"]["against"] == old else None
    return {
        "from": {key: a[key] for key in ("index", "index_digest", "state", "made_at")},
        "to": {key: b[key] for key in ("index", "index_digest", "state", "made_at")},
        "steps": b["step"] - a["step"] if a["run"] == b["run"] else None,
        "runs": [a["run"], b["run"]],
        "corpus": _corpus_change(store, a["corpus_digest"], b["corpus_digest"]),
        "settings": _settings_change(store, old, new),
        "code": _code_change(store, old, new),
        "metrics": {name: _change(a[name], b[name]) for name in METRICS},
        "drift": drift,
    }


def _state(store: Store, name: str, index: Manifest, verdict: Manifest | None, live: Live | None) -> str:
    """live, former (was live), candidate (passed, not older than the live one), overtaken, refused, or unqualified."""
    if live is not None and live.index_digest == index.digest:
        return "live"
    if any(move.index_digest == index.digest for move in store.live_history()):
        return "former"
    if verdict is None:
        return "unqualified"
    if not verdict.facts["passed"]:
        return "refused"
    (run, step), (live_run, live_step) = parse_key(name), parse_key(live.index) if live else ("", -1)
    if live is not None and _over_older_corpus(store, name, live):
        return "overtaken"
    return "overtaken" if run == live_run and step < live_step else "candidate"


def _over_older_corpus(store: Store, name: str, live: Live) -> bool:
    folders = [store.find(store.manifest("indexes", index).parents["corpus"]) for index in (name, live.index)]
    if folders[0] is None or folders[1] is None:
        return False
    return corpora.number(folders[0]) < corpora.number(folders[1])


def _manifest(store: Store, kind: str, name: str) -> Manifest | None:
    return store.manifest(kind, name) if store.has(kind, name) else None


def _part(store: Store, kind: str, version: str) -> Manifest | None:
    """What a version is made of; several versions may stand on one checkpoint."""
    return _manifest(store, kind, checkpoint_of(version) if kind == "checkpoints" else version)


def _change(old: float | None, new: float | None) -> dict[str, float | None]:
    return {"from": old, "to": new, "change": new - old if old is not None and new is not None else None}


def _corpus_change(store: Store, old: str, new: str) -> dict[str, Any]:
    change: dict[str, Any] = {"from": old, "to": new, "same": old == new}
    folders = [store.find(digest) for digest in (old, new)]
    if old != new and folders[0] is not None and folders[1] is not None:
        before, after = (np.unique(Corpus.open(folder).block_ids) for folder in folders if folder is not None)
        shared = len(np.intersect1d(before, after, assume_unique=True))
        change |= {"blocks_kept": shared, "blocks_added": len(after) - shared, "blocks_removed": len(before) - shared}
    return change


# Which manifest of a version depends on which sections of the settings; the stages declare the same.
_SECTIONS = {
    "checkpoints": ("runtime", "model", "lengths", "optimizer", "pretrain"),
    "snapshots": ("runtime", "lengths", "reembed"),
    "indexes": ("index",),
    "verdicts": ("reembed", "index", "gate"),
    "evaluations": ("runtime", "lengths", "reader", "evaluate"),
}


def _settings_change(store: Store, old: str, new: str) -> dict[str, Any]:
    """`section.key` -> [before, after], by the settings each part was made with; parts whose settings are lost are named."""
    changed: dict[str, Any] = {}
    for kind, sections in _SECTIONS.items():
        pair = [_part(store, kind, name) for name in (old, new)]
        if pair[0] is None or pair[1] is None or pair[0].config_digest == pair[1].config_digest:
            continue
        found = [settings_of(store, manifest, sections) for manifest in pair if manifest is not None]
        if found[0] is None or found[1] is None:
            changed[f"{kind} (settings no longer known)"] = [manifest.config_digest for manifest in pair if manifest]
            continue
        relevant = differences(found[0], found[1])
        changed |= {
            key: list(values) for key, values in relevant.items() if key.partition(".")[0] in (*sections, "seed")
        }
    return changed


def _code_change(store: Store, old: str, new: str) -> dict[str, list[Any]]:
    changed: dict[str, list[Any]] = {}
    for kind in _SECTIONS:
        pair = [_part(store, kind, name) for name in (old, new)]
        if pair[0] is None or pair[1] is None:
            continue
        for what, values in (
            (f"{kind} code", [manifest.code for manifest in pair if manifest]),
            (f"{kind} git", [manifest.record.get("git") for manifest in pair if manifest]),
        ):
            if values[0] != values[1]:
                changed[what] = values
    return changed


def when(seconds: float | None) -> str:
    """A time in this machine's zone, to the minute."""
    return "–" if seconds is None else datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


def text_of_change(change: Mapping[str, Any]) -> str:
    """`compare` for people."""
    lines = [f"{change['from']['index']} -> {change['to']['index']}"]
    for side in ("from", "to"):
        part = change[side]
        lines.append(f"  {part['index']}  {part['index_digest'][:12]}  {part['state']}, made {when(part['made_at'])}")
    steps = f"{change['steps']:+d}" if change["steps"] is not None else f"other run ({' -> '.join(change['runs'])})"
    lines.append(f"steps      {steps}")
    corpus = change["corpus"]
    if corpus["same"]:
        lines.append(f"corpus     the same ({corpus['to'][:12]})")
    else:
        counts = ", ".join(f"{corpus[key]} {word}" for key, word in _BLOCKS if key in corpus) or "not in this store"
        lines.append(f"corpus     {corpus['from'][:12]} -> {corpus['to'][:12]}: {counts}")
    for title in ("settings", "code"):
        for number, (key, (old, new)) in enumerate(change[title].items()):
            lines.append(f"{title if number == 0 else '':<10} {key}: {_brief(old)} -> {_brief(new)}")
        if not change[title]:
            lines.append(f"{title:<10} the same")
    for number, (name, row) in enumerate(change["metrics"].items()):
        moved = "" if row["change"] is None else f"  ({row['change']:+.4f})"
        lines.append(
            f"{'metrics' if number == 0 else '':<10} {name:<18} {_brief(row['from'])} -> {_brief(row['to'])}{moved}"
        )
    drift = change["drift"]
    if drift is None:
        lines.append("drift      not recorded between these two; --measure computes it")
    else:
        shown = {key: value for key, value in drift.items() if key != "against"}
        lines += [
            f"{'drift' if number == 0 else '':<10} {key:<18} {_brief(value)}"
            for number, (key, value) in enumerate(shown.items())
        ]
    return "\n".join(lines)


_BLOCKS = (("blocks_kept", "blocks kept"), ("blocks_added", "added"), ("blocks_removed", "removed"))


def _brief(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:40]
