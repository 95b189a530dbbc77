"""Versions of the corpus in a store: how they descend from each other, and which one an index version stands on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from realm_core.artifacts.keys import checkpoint_of, corpus_of, grown_key
from realm_core.artifacts.manifest import PRUNED, read_manifest
from realm_core.artifacts.publish import operator_error
from realm_core.artifacts.store import Store
from realm_core.errors import BusyError


def chain(store: Store, corpus: Path) -> list[Path]:
    """The version itself, the one it grew from, and so on back to the first."""
    known = {store.manifest("corpus", name).digest: store.path("corpus", name) for name in store.names("corpus")}
    found, base = [corpus], read_manifest(corpus).parents.get("base")
    while base in known:
        found.append(known[base])
        base = read_manifest(known[base]).parents.get("base")
    return found


def first(store: Store) -> Path:
    """What the newest corpus was before it grew: the warm start and the sparse baseline stand on it."""
    return chain(store, store.newest("corpus"))[-1]


def of_run(store: Store, run: str) -> Path:
    """Where a training run draws its masked queries from: the corpus it began with, however much that has grown since."""
    begun = [key for key in store.keys("checkpoints") if checkpoint_of(key).rpartition("-s")[0] == run]
    found = store.find(store.manifest("checkpoints", begun[-1]).parents["corpus"]) if begun else None
    return found or store.pretraining_corpus()


def under(store: Store, version: str) -> Path:
    """The corpus that an index version stands on: that of its snapshot or its name, else the newest."""
    if store.has("snapshots", version):
        return store.parent(store.path("snapshots", version), "corpus")
    named = corpus_of(version)
    return store.path("corpus", named) if named else store.newest("corpus")


def version_over(store: Store, checkpoint: str, corpus: Path) -> str:
    """Name of the index version of a checkpoint over a corpus: the plain key for the first such version."""
    if not store.has("snapshots", checkpoint):
        return checkpoint
    made_over = store.manifest("snapshots", checkpoint).parents["corpus"]
    return checkpoint if made_over == read_manifest(corpus).digest else grown_key(checkpoint, corpus.name)


def snapshots_beside(store: Store, version: str, only: str | None = None) -> list[tuple[Path, Path]]:
    """(snapshot, corpus) of the other versions of the same checkpoint, newest corpus first: their vectors may serve again."""
    found = []
    for name in [only] if only else store.keys("snapshots"):
        folder = store.path("snapshots", name)
        if name == version or checkpoint_of(name) != checkpoint_of(version) or (folder / PRUNED).exists():
            continue
        if (corpus := store.find(store.manifest("snapshots", name).parents["corpus"])) is not None:
            found.append((folder, corpus))
    return sorted(found, key=lambda pair: number(pair[1]), reverse=True)


def number(corpus: Path) -> int:
    """Versions in the order they were made: 2 for v0002; 0 for a folder that is no version."""
    digits = corpus.name.removeprefix("v")
    return int(digits) if digits.isdigit() else 0


def removed_between(store: Store, older: Path, newer: Path) -> int | None:
    """Documents removed on the way from one version of the corpus to another; None if it does not descend from it."""
    way = chain(store, newer)
    if older not in way:
        return None
    later = way[: way.index(older)]
    return sum(int(read_manifest(folder).facts["change"].get("removed_documents", 0)) for folder in later)


@contextmanager
def growing(store: Store, patience: float = 0.5) -> Iterator[None]:
    """Held from the change of the corpus to the promotion of its index. Raises BusyError if somebody else does that.

    Waits `patience` seconds, because an onlooker may be looking just now.
    """
    lock = FileLock(store.home / ".corpus.lock")
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise BusyError(
            f"{store.home}: its corpus is being changed by another process; wait for it or stop it"
        ) from None
    except OSError as error:
        raise operator_error(error, store.home) from None
    try:
        yield
    finally:
        lock.release()


def is_growing(store: Store) -> bool:
    """Whether some process changes the corpus now."""
    try:
        with growing(store, patience=0.0):
            return False
    except BusyError:
        return True
