"""Stage `grow`: a corpus and a change -> the next version of it, which shares every shard that the change leaves alone.

Added documents go into shards of their own behind the old ones, removed ones become tombstones; compaction writes all
shards anew, as a build from the documents that are left would. A version stands for a corpus wherever one is asked for.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from realm_core.artifacts import corpora
from realm_core.artifacts.manifest import Manifest, Plan, file_sha256, read_manifest, verify_files
from realm_core.artifacts.publish import Build, building, finished
from realm_core.artifacts.store import Store
from realm_core.config import Config
from realm_core.corpus.documents import Document, Tally
from realm_core.corpus.growth import Held, census, find_documents, link_shards, write_compacted
from realm_core.corpus.layout import VOCABULARY_FILE
from realm_core.corpus.report import write_report
from realm_core.corpus.shards import Corpus
from realm_core.corpus.sources import Source
from realm_core.corpus.tombstones import Tombstone, read_tombstones, write_tombstones
from realm_core.corpus.writer import write_shards
from realm_core.errors import DataError, quoted
from realm_core.ports import MetricSink
from realm_core.stages import CODE
from realm_core.stages.corpus import PLAN, drop_foreign_files, peak_mib, shard_digests

_SCRATCH = ".census"
_SUMMED = ("pages", "redirects", "documents")
_MERGED = ("dropped", "notes", "span_labels")


@dataclass(frozen=True, kw_only=True)
class Add:
    """Documents to take in. Of one whose id the corpus holds already, `replace` puts the new text in the old one's place."""

    source: Source
    replace: bool = False

    def sources(self) -> dict[str, str]:
        kind = self.source.kind
        return {
            "documents": self.source.digest(file_sha256),
            f"as {kind}": kind,
            **({"replace": "yes"} if self.replace else {}),
        }


@dataclass(frozen=True, kw_only=True)
class Remove:
    """Documents to leave out, by id or by title."""

    ids: Sequence[str] = ()
    titles: Sequence[str] = ()

    def sources(self) -> dict[str, str]:
        wanted = json.dumps([sorted(set(self.ids)), sorted(set(self.titles))])
        return {"removals": sha256(wanted.encode("utf-8", "surrogatepass")).hexdigest()}


@dataclass(frozen=True, kw_only=True)
class Compact:
    """Write the shards anew, without what was removed, in the number of the first version."""

    def sources(self) -> dict[str, str]:
        return {"compaction": "all shards"}


Change = Add | Remove | Compact


def plan(config: Config, *, base: Path, change: Change) -> Plan:
    """What `run` would make."""
    return Plan(
        stage="grow",
        code=CODE["grow"],
        config_digest=config.digest("corpus"),
        parents={"base": read_manifest(base)},
        sources=change.sources(),
    )


def run(
    config: Config, *, base: Path, change: Change, out: Path, sink: MetricSink, shards: int = 1, workers: int = 1
) -> Manifest:
    """Make the version that `base` becomes by `change`; a killed attempt is taken up where it stopped.

    `shards` is what a compaction writes. With corpus.on_error="skip" added documents whose id is known, and removals of
    documents that are not there, are counted and passed over; with "fail" they raise DataError, as does a change after
    which nothing would be left.
    """
    doing = plan(config, base=base, change=change)
    if done := finished(out, doing):
        return done
    before = doing.parents["base"]
    verify_files(base, before)
    with building(out, doing, resume=True) as build:
        drop_foreign_files(build)
        try:
            made = _Growth(config, base, before, build.folder, shards, workers).apply(change)
        except DataError:
            shutil.rmtree(build.folder)  # a second attempt would meet the same data
            raise
        return _commit(build, made, before, sink)


def apply(
    config: Config, *, store: Store, change: Change, sink: MetricSink, workers: int = 1
) -> tuple[Path, Manifest, bool]:
    """Change the newest corpus of a home: (its folder, its manifest, whether it is new).

    The same change twice in a row changes nothing, so that a command that was killed is simply given again. The caller
    holds `corpora.growing`.
    """
    base = store.newest("corpus")
    newest = read_manifest(base)
    if newest.stage == "grow" and dict(newest.sources) == change.sources():
        return base, newest, False
    doing = plan(config, base=base, change=change)
    out, shards = (
        store.version_for("corpus", doing),
        len(read_manifest(corpora.first(store)).facts["shards"]),
    )
    made = run(config, base=base, change=change, out=out, sink=sink, shards=shards, workers=workers)
    return out, made, True


@dataclass(frozen=True)
class _Made:
    """What a change did: counts for the manifest, the digests of files that need no second look."""

    change: dict[str, Any]
    report: Mapping[str, Any] | None  # of the documents that were added
    known: dict[str, str]
    record: dict[str, Any]


class _Growth:
    """One change in the making."""

    def __init__(self, config: Config, base: Path, before: Manifest, folder: Path, shards: int, workers: int) -> None:
        self.config, self.before, self.folder = config, before, folder
        self.corpus, self.base = Corpus.open(base), base
        self.shards, self.workers = shards, workers

    def apply(self, change: Change) -> _Made:
        if isinstance(change, Add):
            return self._add(change)
        if isinstance(change, Remove):
            return self._remove(change)
        self._copy_vocabulary()
        write_compacted(self.corpus, self.folder, self.shards)
        dead = sum(tombstone.blocks for tombstone in read_tombstones(self.base))
        return _Made({"kind": "compact", "dropped_blocks": dead}, None, {}, {})

    def _add(self, change: Add) -> _Made:
        settings, skip = self.config.corpus, self.config.corpus.on_error == "skip"
        asked = {document.doc_id: document.place for document in change.source.read(settings.on_error, Tally())}
        held = list(find_documents(self.corpus, asked))
        if held and not (change.replace or skip):
            raise _known(asked[held[0].doc_id], held)
        left_out = {item.doc_id for item in held} if not change.replace else set()
        if len(left_out) == len(asked):
            raise DataError(
                f"{change.source.where}: the corpus holds all of its {len(asked)} documents; nothing to add"
            )
        tally, record = Tally(), dict[str, Any]()
        report = write_shards(
            _without(change.source.read(settings.on_error, tally), left_out, tally),
            self.folder,
            self.corpus.tokenizer,
            place=change.source.where,
            shards=self._delta_shards(len(asked) - len(left_out)),
            first=len(self.corpus.shards),
            limit=settings.block_wordpieces,
            splitter=settings.splitter,
            tagger=settings.tagger,
            workers=self.workers,
            on_error=settings.on_error,
            tally=tally,
            record=record,
        )
        replaced = held if change.replace else []
        known = self._keep([item.tombstone for item in replaced])
        counts = {
            "kind": "add",
            "added_documents": report["articles"],
            "added_blocks": report["blocks"],
            "removed_documents": len(replaced),
            "removed_blocks": sum(item.tombstone.blocks for item in replaced),
            "delta_shards": len(report["shards"]),
        }
        return _Made(counts, report, known, record)

    def _remove(self, change: Remove) -> _Made:
        held = list(find_documents(self.corpus, set(change.ids), set(change.titles)))
        missing = [f"id {quoted(name)}" for name in sorted(set(change.ids) - {item.doc_id for item in held})]
        missing += [f"title {quoted(name)}" for name in sorted(set(change.titles) - {item.title for item in held})]
        if missing and (not held or self.config.corpus.on_error == "fail"):
            more = f", nor {len(missing) - 1} more of those asked for" if len(missing) > 1 else ""
            raise DataError(
                f"{self.base}: no document with {missing[0]}{more}; ids and titles are compared letter by letter, "
                "and --on-error skip passes over those that are not there"
            )
        blocks = sum(item.tombstone.blocks for item in held)
        if blocks == len(self.corpus):
            raise DataError(f"{self.base}: nothing would be left of its {blocks} blocks; add other documents first")
        self._copy_vocabulary()
        known = self._keep([item.tombstone for item in held])
        counts = {"kind": "remove", "removed_documents": len(held), "removed_blocks": blocks, "unknown": len(missing)}
        return _Made(counts, None, known, {})

    def _keep(self, removed: Iterable[Tombstone]) -> dict[str, str]:
        """The old shards and all tombstones; returns the digests of what is linked."""
        write_tombstones(self.folder, [*read_tombstones(self.base), *removed])
        return {path: self.before.files[path] for path in link_shards(self.corpus, self.folder)}

    def _copy_vocabulary(self) -> None:
        shutil.copyfile(self.base / VOCABULARY_FILE, self.folder / VOCABULARY_FILE)

    def _delta_shards(self, documents: int) -> int:
        """About as many as keep a new shard the size of an old one."""
        held = max(1, int(self.before.facts.get("articles", 0)))
        return max(1, min(self.shards, round(documents * self.shards / held)))


def _commit(build: Build, made: _Made, before: Manifest, sink: MetricSink) -> Manifest:
    counted = census(Corpus.open(build.folder), build.folder / _SCRATCH)
    shutil.rmtree(build.folder / _SCRATCH)
    removed = made.change.get("removed_documents", 0)
    report = {
        "source": before.facts.get("source", "imported"),
        **_history(before.facts, made.report),
        "removed": before.facts.get("removed", 0) + removed,
        "change": made.change,
        **counted,
    }
    if report["removed"]:
        report.pop("span_labels", None)  # labels are not stored with the spans, so nobody knows what is left of them
    write_report(build.folder, report)
    (build.folder / PLAN).unlink()
    sizes = report.pop("shards")
    dead = sum(tombstone.blocks for tombstone in read_tombstones(build.folder))
    sink.log(0, {"corpus/blocks": report["blocks"], "corpus/documents": report["articles"]})
    facts = {
        "stands_for": "corpus",
        **report,
        "dead_blocks": dead,
        "shard_blocks": sizes,
        "shards": shard_digests(build.folder, sizes),
    }
    return build.commit(facts, record={**made.record, "peak_mib": peak_mib()}, known=made.known)


def _history(before: Mapping[str, Any], added: Mapping[str, Any] | None) -> dict[str, Any]:
    """What was read to make this version, all changes together."""
    added = added or {}
    summed: dict[str, Any] = {name: before.get(name, 0) + added.get(name, 0) for name in _SUMMED}
    for name in _MERGED:
        merged = Counter(before.get(name, {})) + Counter(added.get(name, {}))
        summed[name] = dict(sorted(merged.items()))
    summed["input"] = {**before.get("input", {}), **added.get("input", {})}
    summed["tagger"] = added.get("tagger") or before.get("tagger", {"name": "unknown", "version": "unknown"})
    return summed


def _without(documents: Iterable[Document], left_out: set[str], tally: Tally) -> Iterator[Document]:
    for document in documents:
        if document.doc_id in left_out:
            tally.documents -= 1
            tally.dropped["known_id"] += 1
            continue
        yield document


def _known(place: str, held: Sequence[Held]) -> DataError:
    place = f"{place}: " if place else ""
    more = f", and {len(held) - 1} more documents are held" if len(held) > 1 else ""
    return DataError(
        f"{place}the corpus holds a document with id {quoted(held[0].doc_id)} already, titled "
        f"{quoted(held[0].title)}{more}; "
        "--replace puts new texts in the place of old ones, --on-error skip leaves out what is held"
    )
