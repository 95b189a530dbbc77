"""What lies in a home's inbox becomes versions of its corpus, one a file, in the order of the names."""

import sys
from dataclasses import dataclass
from pathlib import Path

from realm_core.artifacts import corpora, inbox
from realm_core.artifacts.store import Store
from realm_core.config import Config
from realm_core.corpus.growth import read_removals
from realm_core.corpus.sources import AUTO, Source, kind_of
from realm_core.errors import ConfigError, DataError
from realm_core.ports import MetricSink
from realm_core.stages import grow


@dataclass(frozen=True)
class Taken:
    """One file: the version of the corpus it made, or why it made none."""

    name: str
    corpus: str | None
    reason: str | None = None


def take(config: Config, *, store: Store, sink: MetricSink, now: float) -> list[Taken]:
    """Take in every complete file. One that is at fault itself is set aside, so that it never holds up the others.

    A kill between two steps costs nothing: the file is still there, and its version is recognised.
    """
    taken = []
    with corpora.growing(store):
        for path in inbox.pending(store.home, now):
            try:
                folder, _, _ = grow.apply(config, store=store, change=change_of(path), sink=sink)
            except (DataError, ConfigError) as problem:
                print(f"warning: {path.name} is refused: {problem}", file=sys.stderr, flush=True)
                inbox.move(path, inbox.REFUSED, str(problem))
                taken.append(Taken(path.name, None, str(problem)))
                continue
            inbox.move(path, inbox.DONE)
            taken.append(Taken(path.name, folder.name))
    return taken


def change_of(path: Path) -> grow.Change:
    """The change that a file asks for by its name. Raises DataError for a name that means nothing here."""
    if path.name.endswith(".remove"):
        ids, titles = read_removals(path)
        return grow.Remove(ids=ids, titles=titles)
    if kind_of(path) is None:
        raise DataError(f"{path}: neither documents (.jsonl, .parquet, .xml, .tsv) nor .remove; rename it")
    return grow.Add(source=Source.find(path, AUTO), replace=".replace." in path.name)
