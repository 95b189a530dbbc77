"""Stage `corpus`: raw documents -> shards of tokenised blocks with salient spans, and a report."""

import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from realm_core.artifacts import corpora
from realm_core.artifacts.manifest import MANIFEST, Manifest, Plan, file_sha256, read_manifest
from realm_core.artifacts.publish import Build, adopt, building, finished, write_durably
from realm_core.artifacts.store import Store
from realm_core.config import Config
from realm_core.corpus.documents import Tally
from realm_core.corpus.layout import VOCABULARY_FILE
from realm_core.corpus.packing import as_plain
from realm_core.corpus.report import write_report
from realm_core.corpus.sources import AUTO, Source
from realm_core.corpus.writer import write_shards
from realm_core.errors import ConfigError, DataError
from realm_core.model.weight_files import vocabulary_path
from realm_core.ports import MetricSink
from realm_core.stages import CODE
from realm_core.text.tokenizer import Tokenizer, build_vocabulary

PLAN = ".plan.json"  # in the scratch folder: what a killed attempt was making


def plan(config: Config, *, source: str | Path, source_format: str = AUTO, vocabulary: Path | None = None) -> Plan:
    """What `run` would make from `source`."""
    return _plan(config, Source.find(source, source_format), _vocabulary(config, vocabulary))


def run(
    config: Config,
    *,
    source: str | Path,
    out: Path,
    sink: MetricSink,
    source_format: str = AUTO,
    workers: int = 1,
    vocabulary: Path | None = None,
) -> Manifest:
    """Read, pack, tokenise and tag. Same input and settings give the same digest on any machine, with any `workers`.

    `source` is a file, a folder of files, or for the format "hf" the name of a dataset. The wordpieces are those of the
    start weights; with `vocabulary`, a corpus folder or a vocab.txt, they are those: a second corpus that queries are
    drawn from (Guu et al. 2020: news, while Wikipedia is retrieved) needs the vocabulary of the first. A killed run is
    taken up where it stopped. Raises DataError naming file and line for a malformed document, or if no block remains.
    """
    found = Source.find(source, source_format)
    pieces = _vocabulary(config, vocabulary)
    doing = _plan(config, found, pieces)
    if done := finished(out, doing):
        return done
    settings = config.corpus
    record: dict[str, Any] = {}
    tally = Tally()
    with building(out, doing, resume=True) as build:
        drop_foreign_files(build)
        try:
            report = write_shards(
                found.read(settings.on_error, tally),
                build.folder,
                Tokenizer.from_file(pieces) if pieces else _own_tokenizer(config, found),
                place=str(source),
                shards=settings.shards,
                limit=settings.block_wordpieces,
                splitter=settings.splitter,
                tagger=settings.tagger,
                workers=workers,
                on_error=settings.on_error,
                tally=tally,
                record=record,
            )
        except DataError:
            shutil.rmtree(build.folder)  # a second attempt would meet the same data
            raise
        write_report(build.folder, {"source": found.kind, **report})
        (build.folder / PLAN).unlink()
        sizes = report.pop("shards")
        sink.log(0, {"corpus/blocks": report["blocks"], "corpus/documents": report["documents"]})
        facts = {"source": found.kind, **report, "shard_blocks": sizes, "shards": shard_digests(build.folder, sizes)}
        return build.commit(facts, record={**record, "peak_mib": peak_mib()})


def of_home(config: Config, *, store: Store, sink: MetricSink) -> tuple[Path, Manifest]:
    """The newest corpus of a home, built from its source where there is none yet: (folder, manifest).

    A corpus that has grown stays what it is, whatever the code of today would make of the documents it began with. A
    source that is a folder of finished shards is taken as it is, so that its digest is that of the corpus.
    """
    source = store.source("corpus")
    if store.names("corpus"):
        newest, root = store.newest("corpus"), corpora.first(store)
        if newest != root:
            require_same_source(root, source, store.home, grown=True)
            return newest, read_manifest(newest)
    if is_finished(source):
        return _adopted(config, store, source)
    folder = store.version_for("corpus", plan(config, source=source))
    return folder, run(config, source=source, out=folder, sink=sink)


def is_finished(source: Path) -> bool:
    """Whether a source is a folder that this stage has made."""
    return (source / MANIFEST).is_file()


def require_same_source(corpus: Path, source: Path, home: Path, *, grown: bool = False) -> None:
    """Raise DataError unless `corpus`, the first version in a home, was made from what `source` is today.

    Of a corpus that has grown no other first version is made: it would not know what was removed since.
    """
    made = read_manifest(corpus)
    if is_finished(source):
        same = made.digest == read_manifest(source).digest
    else:
        same = made.sources.get("documents") == Source.find(source).digest(file_sha256)
    if not same:
        remedy = (
            "restore it and bring the change with realm corpus add" if grown else "restore it or pass another --home"
        )
        raise DataError(f"{source}: changed since {home} was made from it; {remedy}")


def _adopted(config: Config, store: Store, source: Path) -> tuple[Path, Manifest]:
    manifest = read_manifest(source)
    if manifest.stands_for != "corpus":
        raise DataError(
            f"{source}: written by stage {manifest.stage}; pass documents, or a folder that realm corpus build made"
        )
    same = [name for name in store.names("corpus") if store.manifest("corpus", name).digest == manifest.digest]
    if not same:
        _require_usable(config, source, manifest)
    folder = store.path("corpus", same[-1]) if same else store.next_version("corpus")
    return folder, adopt(source, folder)


def _require_usable(config: Config, source: Path, manifest: Manifest) -> None:
    pieces = vocabulary_path(config.model)
    if pieces is not None and manifest.files.get(VOCABULARY_FILE) != file_sha256(pieces):
        raise ConfigError(
            f"{source}: other wordpieces than those of {config.model.weights}; build it with the profile of this home"
        )
    longest = max(map(int, manifest.facts["block_lengths"]), default=0)
    if longest > config.lengths.document:
        raise ConfigError(
            f"{source}: blocks of {longest} wordpieces and more, lengths.document={config.lengths.document} would cut "
            "them; build it with the profile of this home"
        )


def shard_digests(folder: Path, names: dict[str, int]) -> dict[str, str]:
    """Shard name -> sha256 of its token file, which fixes what is embedded."""
    return {name: file_sha256(folder / name / "tokens.safetensors") for name in names}


def _vocabulary(config: Config, given: Path | None) -> Path | None:
    """The vocabulary file to use; None where the corpus makes its own."""
    if given is None:
        return vocabulary_path(config.model)
    path = given / VOCABULARY_FILE if given.is_dir() else given
    if not path.is_file():
        raise DataError(f"{path}: no such vocabulary; name a corpus folder or a vocab.txt")
    return path


def _plan(config: Config, source: Source, vocabulary: Path | None) -> Plan:
    # The kind is part of the role: the same lines mean other documents to another reader.
    sources = {"documents": source.digest(file_sha256), f"as {source.kind}": source.kind}
    if vocabulary is not None:
        sources["vocabulary"] = file_sha256(vocabulary)
    digest = config.digest("corpus", *(() if vocabulary else ("model",)))
    return Plan(stage="corpus", code=CODE["corpus"], config_digest=digest, sources=sources)


def drop_foreign_files(build: Build) -> None:
    """Empty the scratch folder unless a killed attempt at this very plan left it."""
    doing = build.plan
    made_from = [doing.stage, doing.code, doing.config_digest, doing.parent_digests, dict(doing.sources)]
    mark = json.dumps(made_from, sort_keys=True) + "\n"
    path = build.folder / PLAN
    if path.is_file() and path.read_text(encoding="utf-8") == mark:
        return
    for entry in build.folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    write_durably(path, mark)


def _own_tokenizer(config: Config, source: Source) -> Tokenizer:
    return Tokenizer(build_vocabulary(_texts(config, source), config.model.vocabulary_size))


def _texts(config: Config, source: Source) -> Iterator[str]:
    for document in source.read(config.corpus.on_error, Tally()):
        yield document.title
        yield as_plain(document).text


def peak_mib() -> dict[str, float]:
    """Peak memory of this process and of its largest worker."""
    kinds = {"main": resource.RUSAGE_SELF, "worker": resource.RUSAGE_CHILDREN}
    return {name: round(resource.getrusage(kind).ru_maxrss / 1024, 1) for name, kind in kinds.items()}
