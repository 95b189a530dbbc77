"""Stage `corpus`: raw documents -> shards of tokenised blocks with salient spans."""

from collections import Counter
from pathlib import Path

from realm_core.artifacts.manifest import Manifest, Plan, file_sha256
from realm_core.artifacts.publish import building, finished
from realm_core.config import Config
from realm_core.corpus.readers import READERS
from realm_core.corpus.shards import write_shards
from realm_core.errors import DataError
from realm_core.model.weights import vocabulary_path
from realm_core.ports import MetricSink
from realm_core.stages import CODE
from realm_core.text.tokenizer import Tokenizer, build_vocabulary


def plan(config: Config, *, source: Path) -> Plan:
    """What `run` would make from `source`."""
    if not source.is_file():
        raise DataError(f"{source}: no such corpus file; pass a JSON-lines file with title and text")
    sources = {"documents": file_sha256(source)}
    vocabulary = vocabulary_path(config.model)
    if vocabulary is not None:
        sources["vocabulary"] = file_sha256(vocabulary)
    digest = config.digest("corpus", *(() if vocabulary else ("model",)))
    return Plan(stage="corpus", code=CODE["corpus"], config_digest=digest, sources=sources)


def run(config: Config, *, source: Path, out: Path, sink: MetricSink, source_format: str = "jsonl") -> Manifest:
    """Read, pack, tokenise and tag. Same input and settings give the same digest on any machine.

    Raises DataError naming file and line for a malformed document, or if no block remains.
    """
    doing = plan(config, source=source)
    if done := finished(out, doing):
        return done
    settings = config.corpus
    read = READERS[source_format]
    skipped: Counter[str] = Counter()
    with building(out, doing) as build:
        tokenizer = _tokenizer(config, source, source_format)
        report = write_shards(
            read(source, on_error=settings.on_error, counts=skipped),
            build.folder,
            tokenizer,
            shards=settings.shards,
            limit=settings.block_wordpieces,
            splitter=settings.splitter,
            tagger=settings.tagger,
        )
        sizes = report.pop("shards")
        report["dropped"] = {**report["dropped"], **skipped}
        sink.log(0, {"corpus/blocks": report["blocks"], "corpus/documents": report["documents"]})
        return build.commit({**report, "shard_blocks": sizes, "shards": shard_digests(build.folder, sizes)})


def shard_digests(folder: Path, names: dict[str, int]) -> dict[str, str]:
    """Shard name -> sha256 of its token file, which fixes what is embedded."""
    return {name: file_sha256(folder / name / "tokens.safetensors") for name in names}


def _tokenizer(config: Config, source: Path, source_format: str) -> Tokenizer:
    vocabulary = vocabulary_path(config.model)
    if vocabulary is not None:
        return Tokenizer.from_file(vocabulary)
    documents = READERS[source_format](source, on_error=config.corpus.on_error)
    texts = (text for document in documents for text in (document.title, document.text))
    return Tokenizer(build_vocabulary(texts, config.model.vocabulary_size))
