"""Stage `corpus`: raw documents -> shards of tokenised blocks with salient spans, and a report."""

import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from realm_core.artifacts.manifest import Manifest, Plan, file_sha256
from realm_core.artifacts.publish import Build, building, finished, write_durably
from realm_core.config import Config
from realm_core.corpus.documents import Tally
from realm_core.corpus.layout import VOCABULARY_FILE
from realm_core.corpus.packing import as_plain
from realm_core.corpus.report import write_report
from realm_core.corpus.sources import AUTO, Source
from realm_core.corpus.writer import write_shards
from realm_core.errors import DataError
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
