"""Is it time for a new training run? Only if what it would be made from is not what the last one was made from."""

import re
from dataclasses import dataclass

from orchestration import supervisor
from realm_core.artifacts import corpora
from realm_core.artifacts.manifest import Manifest, file_sha256, read_manifest
from realm_core.artifacts.store import Store, checkpoint_key
from realm_core.errors import RealmError
from realm_core.stages import CODE

RETRAIN = "realm/retrain"  # tag: the training run that a bootstrap is for
_NUMBERED = re.compile(r"r(\d+)")
_SOURCES = {"corpus": "documents", "pretrain_corpus": "documents", "questions": "questions"}  # kind -> role


@dataclass(frozen=True)
class Due:
    """The run to start, or None; and why, or why not."""

    run: str | None
    reason: str


def due(store: Store) -> Due:
    """Compare sources, corpus, warm start and code with those of the newest run r1, r2, ... that has begun."""
    numbers = [int(match[1]) for run in store.runs() if (match := _NUMBERED.fullmatch(run))]
    begun = [number for number in sorted(numbers) if store.has("checkpoints", checkpoint_key(f"r{number}", 0))]
    if not begun:
        return Due(None, "no training run has begun yet; realm train start begins the first")
    last = f"r{begun[-1]}"
    if supervisor.look(store, last).state in ("runs", "waits"):
        return Due(None, f"{last} is still being trained")
    start = store.manifest("checkpoints", checkpoint_key(last, 0))
    changes = [*_changed_sources(store), *_changed_inputs(store, start), *_changed_code(store, start)]
    if changes and (problem := _in_the_way(store)):
        return Due(None, f"since {last}: {', '.join(changes)}; but {problem}")
    if changes:
        return Due(f"r{max(numbers) + 1}", f"since {last}: {', '.join(changes)}")
    return Due(None, f"neither corpus nor code changed since {last} began")


def _in_the_way(store: Store) -> str | None:
    """Why the job `bootstrap` would fail: of a corpus that has grown no other first version is made."""
    from realm_core.stages.corpus import require_same_source  # takes a second, which only a run that is due should wait

    root = corpora.first(store)
    if root == store.newest("corpus"):
        return None
    try:
        require_same_source(root, store.source("corpus"), store.home, grown=True)
    except RealmError as problem:
        return str(problem)
    return None


def _changed_sources(store: Store) -> list[str]:
    """Raw inputs that differ from what their newest version was made from. Only those written to since are hashed."""
    changed = []
    for kind, role in _SOURCES.items():
        if not store.has_source(kind) or not store.names(kind):
            continue
        # What a corpus took in since from the inbox does not hide that its source is another one now.
        folder = corpora.first(store) if kind == "corpus" else store.newest(kind)
        path, made = store.source(kind), read_manifest(folder)
        if not path.is_file() or path.stat().st_mtime <= made.record.get("created", 0.0):
            continue
        if made.sources.get(role) != file_sha256(path):
            changed.append(f"{path.name} changed")
    return changed


def _changed_inputs(store: Store, start: Manifest) -> list[str]:
    made = {"corpus": store.pretraining_corpus(), "ict": store.newest("ict")}
    return [
        f"{folder.parent.name} {folder.name} is new"
        for role, folder in made.items()
        if start.parents.get(role) not in (None, read_manifest(folder).digest)
    ]


def _changed_code(store: Store, start: Manifest) -> list[str]:
    """Stages that lead to a training run and whose code number is another one now."""
    kinds = ("corpus", "pretrain_corpus", "questions", "ict")
    made = [start, *(read_manifest(store.newest(kind)) for kind in kinds if store.names(kind))]
    changed = {
        manifest.stage: manifest.code for manifest in made if manifest.code != CODE.get(manifest.stage, manifest.code)
    }
    return [f"code of {stage} {code} became {CODE[stage]}" for stage, code in changed.items()]
