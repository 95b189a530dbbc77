"""Commands for the inputs of an operation: `realm corpus …` and `realm qa …`."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from realm_core.artifacts.manifest import Manifest, open_artifact, read_manifest, verify_files
from realm_core.artifacts.publish import write_durably
from realm_core.errors import DataError, quoted
from realm_core.params import settings_for_command
from realm_core.ports import NullSink, Progress

Params = Annotated[Path | None, typer.Option(help="Settings file; ./params.yaml or the packaged one by default.")]
Profile = Annotated[str, typer.Option(help="Which profile of the settings file.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override: section.key=value. May be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Out = Annotated[Path, typer.Option(help="Folder to create; it must not exist with another content.")]
OnError = Annotated[
    Literal["fail", "skip"] | None, typer.Option(help="What a bad record does: stop, or be counted and left out.")
]

_LARGE = 16 << 20  # bytes of input from which all processors are worth their start-up
corpus_app = typer.Typer(help="Documents to shards of tokenised blocks.", no_args_is_help=True)
qa_app = typer.Typer(help="Question sets: public originals, and files of your own.", no_args_is_help=True)


def mount(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.add_typer(corpus_app, name="corpus")
    app.add_typer(qa_app, name="qa")


@corpus_app.command("build")
def corpus_build(
    input_: Annotated[str, typer.Option("--input", help="File, folder of files, or with --source hf a dataset name.")],
    out: Out,
    source: Annotated[
        str, typer.Option(help="mediawiki, jsonl, parquet, dpr, hf or wikiextractor; auto goes by the file name.")
    ] = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Processes; one a processor for large files by default.", min=1)
    ] = None,
    on_error: OnError = None,
    vocabulary: Annotated[
        Path | None, typer.Option(help="A corpus folder or vocab.txt: for a second corpus that queries are drawn from.")
    ] = None,
    params: Params = None,
    profile: Profile = "demo",
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Pack documents into blocks, tokenise them, and find their salient spans. A killed build is taken up again.

    Examples: realm corpus build --input docs.jsonl --out build/corpus

    realm corpus build --source mediawiki --input enwiki-pages-articles.xml.bz2 --out build/wiki --set corpus.tagger=rules+links
    """
    from realm_core.stages import corpus

    config = settings_for_command(
        params, profile, [*(set_ or ()), *([f"corpus.on_error={on_error}"] if on_error else [])]
    )
    used = workers or workers_for(Path(input_))
    manifest = corpus.run(
        config, source=input_, out=out, sink=NullSink(), source_format=source, workers=used, vocabulary=vocabulary
    )
    _show(manifest, as_json)


@corpus_app.command("show")
def corpus_show(
    folder: Annotated[Path, typer.Argument(help="A corpus folder.")],
    title: Annotated[str, typer.Option(help="Title of the document.")],
    as_json: AsJson = False,
) -> None:
    """Print the blocks of one document."""
    from realm_core.corpus.shards import Corpus

    open_artifact(folder, "corpus")
    corpus = Corpus.open(folder)
    found = [corpus.block(row) for row in corpus.rows_titled(title)]
    if not found:
        raise DataError(f"{folder}: no document titled {quoted(title)}; titles are compared letter by letter")
    if as_json:
        rows = [{"block_id": block.block_id, "doc_id": block.doc_id, "text": block.text} for block in found]
        print(json.dumps(rows, ensure_ascii=False))
        return
    for block in found:
        _, starts, stops = corpus.tokenizer.ids_with_offsets(block.text)
        spans = [block.text[starts[low] : stops[high - 1]] for low, high in block.spans]
        print(
            f"{block.block_id}  {len(block.token_ids)} wordpieces\n{block.text}\nspans: {'; '.join(spans) or 'none'}\n"
        )


@corpus_app.command("report")
def corpus_report(
    folder: Annotated[Path, typer.Argument(help="A corpus folder.")],
    metrics: Annotated[Path | None, typer.Option(help="Write the numbers as one flat JSON object here.")] = None,
    lengths: Annotated[Path | None, typer.Option(help="Write the lengths of the blocks as CSV here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print what a corpus holds, what was left out and why; with --metrics and --lengths for DVC and other programs."""
    from realm_core.corpus.report import FILES, lengths_table, metrics_of

    manifest = read_manifest(folder)
    if manifest.stands_for != "corpus" or FILES[0] not in manifest.files:
        raise DataError(f"{folder}: holds no report of a corpus; pass a folder that realm corpus build made")
    verify_files(folder, manifest, only="report")
    report = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
    contents = {metrics: json.dumps(metrics_of(report), indent=1) + "\n", lengths: lengths_table(report)}
    for path, content in contents.items():
        if path is not None:
            write_durably(path, content)
    if as_json:
        print(json.dumps({"digest": manifest.digest, **report}, ensure_ascii=False))
    elif metrics is None and lengths is None:
        print((folder / FILES[1]).read_text(encoding="utf-8"), end="")


@qa_app.command("fetch")
def qa_fetch(
    name: Annotated[str, typer.Argument(help="nq-open, webquestions, triviaqa or squad.")],
    out: Annotated[Path, typer.Option(help="Folder for the originals.")] = Path("data/originals"),
    as_json: AsJson = False,
) -> None:
    """Download the originals of a public question set, from a fixed list of addresses with pinned digests.

    Example: realm qa fetch nq-open
    """
    from realm_core.data.fetch import fetch, original

    bar: dict[int, Progress] = {}

    def progress(done: int, size: int) -> None:
        bar.setdefault(size, Progress(f"fetch {name}", size, unit="bytes")).update(done)

    paths = fetch(name, out / name, progress=progress)
    form = original(name).form
    if as_json:
        print(json.dumps({"name": name, "format": form, **{split: str(path) for split, path in paths.items()}}))
        return
    print(f"realm qa build --format {form} --input {paths['train']} --test {paths['test']} --out data/questions-{name}")


@qa_app.command("build")
def qa_build(
    input_: Annotated[Path, typer.Option("--input", help="Questions: the training file where there are two.")],
    out: Out,
    test: Annotated[Path | None, typer.Option(help="The original's dev or test file; it becomes test.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="jsonl, nq, webquestions, trec, triviaqa, squad or dpr; auto looks.")
    ] = "auto",
    on_error: OnError = None,
    params: Params = None,
    profile: Profile = "demo",
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Split question files into train, dev and test, as ORQA does: dev by the hash of the question, test from --test.

    Example: realm qa build --format nq --input NQ-open.train.jsonl --test NQ-open.dev.jsonl --out build/nq
    """
    from realm_core.stages import questions

    config = settings_for_command(
        params, profile, [*(set_ or ()), *([f"corpus.on_error={on_error}"] if on_error else [])]
    )
    made = questions.run(config, source=input_, test=test, form=form, out=out, sink=NullSink())
    summary = {"digest": made.digest, "seconds": made.record.get("seconds"), **made.facts}
    print(json.dumps(summary) if as_json else "\n".join(f"{key}: {value}" for key, value in summary.items()))


def workers_for(path: Path) -> int:
    """Processes worth starting for an input."""
    if not path.exists():
        return os.cpu_count() or 1  # a dataset: nobody knows its size before it is read
    files = path.iterdir() if path.is_dir() else [path]
    return (os.cpu_count() or 1) if sum(file.stat().st_size for file in files) > _LARGE else 1


def _show(manifest: Manifest, as_json: bool) -> None:
    facts = {**manifest.facts, "shards": len(manifest.facts["shards"])}
    facts.pop("shard_blocks", None)
    summary: dict[str, Any] = {
        "stage": manifest.stage,
        "digest": manifest.digest,
        "seconds": manifest.record.get("seconds"),
        **facts,
        "record": {name: manifest.record.get(name) for name in _RATES if name in manifest.record},
    }
    if as_json:
        print(json.dumps(summary, ensure_ascii=False))
        return
    for key, value in summary.items():
        print(f"{key}: {value}")


_RATES = (
    "workers",
    "reading_seconds",
    "packing_seconds",
    "tagging_seconds",
    "sentences_per_second",
    "tagged_sentences_per_second",
    "tagged_sentences_per_cpu_second",
    "resumed_blocks",
    "peak_mib",
)
