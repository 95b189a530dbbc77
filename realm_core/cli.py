"""One subcommand a stage. Results go to standard output (JSON with --json), progress and errors to standard error.

Exit codes: 0 done, 1 a verification failed, 2 something an operator can mend, 130 interrupted.
"""

import io
import json
import signal
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from realm_core import cli_compat, cli_corpus, cli_growth, cli_versions
from realm_core.artifacts.publish import storage_trouble
from realm_core.cli_options import HOME, AsJson, Home, Metrics, Out, Params, Profile, Set, show
from realm_core.errors import DataError, RealmError
from realm_core.params import settings_for_command
from realm_core.ports import JsonLinesSink, MetricSink, NullSink

app = typer.Typer(
    name="realm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
cli_growth.mount(cli_corpus.corpus_app)
cli_corpus.mount(app)
cli_compat.mount(app)
cli_versions.mount(app)


def _tell_version(wanted: bool) -> bool:
    if wanted:
        print(f"realm-ops {metadata.version('realm-ops')}")
        raise typer.Exit
    return wanted


@app.callback()
def realm(
    version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", callback=_tell_version, is_eager=True)
    ] = False,
) -> None:
    """REALM as a running operation: retriever and reader that learn together, an index that follows."""


@app.command()
def questions(
    input_: Annotated[
        Path, typer.Option("--input", help="Questions, one JSON object a line with question and answers.")
    ],
    out: Out,
    params: Params = None,
    profile: Profile = "demo",
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Split a question file into train, dev and test."""
    from realm_core.stages import questions as stage

    show(stage.run(settings_for_command(params, profile, set_), source=input_, out=out, sink=NullSink()), as_json)


@app.command()
def ict(
    corpus: Annotated[Path, typer.Option(help="A corpus folder.")],
    out: Out,
    metrics: Metrics = None,
    params: Params = None,
    profile: Profile = "demo",
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Warm start: inverse cloze task for the retriever, masked-LM warm-up for the encoder."""
    from realm_core.stages import ict as stage

    show(stage.run(settings_for_command(params, profile, set_), corpus=corpus, out=out, sink=_sink(metrics)), as_json)


@app.command()
def pretrain(
    home: Home = HOME,
    run: Annotated[str, typer.Option(help="Name of the training run; it is resumed if it has checkpoints.")] = "r1",
    until: Annotated[int | None, typer.Option(help="Stop after this step.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="A corpus folder; the home's newest by default.")] = None,
    start: Annotated[
        Path | None, typer.Option(help="An ICT or REALM checkpoint; the home's newest ICT one by default.")
    ] = None,
    params: Params = None,
    profile: Annotated[str | None, typer.Option(help="Which profile; the home's settings by default.")] = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """REALM pre-training in this process; follows the live index and leaves rolling checkpoints.

    Runs with the home's settings. With --params, --profile or --set, a folder that is no home yet becomes one with those.
    """
    from realm_core.artifacts import corpora
    from realm_core.artifacts.store import Store
    from realm_core.stages import pretrain as stage

    if params or profile or set_:
        config = settings_for_command(params, profile or "demo", set_)
        sources = Store(home).settings()["sources"] if (home / "home.json").exists() else {}
        store = Store.create(home, config, sources, profile or "demo")
    else:
        store = Store.open(home)
    manifest = stage.run(
        store.config(),
        store=store,
        training_run=run,
        corpus=corpus or corpora.of_run(store, run),
        start=start or store.newest("ict"),
        until=until,
        sink=NullSink(),
    )
    show(manifest, as_json)


@app.command()
def reembed(
    checkpoint: Annotated[Path, typer.Option(help="An ICT or REALM checkpoint folder.")],
    corpus: Annotated[Path, typer.Option(help="A corpus folder.")],
    out: Out,
    params: Params = None,
    profile: Profile = "demo",
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Embed every block with one checkpoint; a killed pass resumes."""
    from realm_core.stages import reembed as stage

    config = settings_for_command(params, profile, set_)
    show(stage.run(config, checkpoint=checkpoint, corpus=corpus, out=out, sink=NullSink()), as_json)


@app.command()
def finetune(
    checkpoint: Annotated[Path, typer.Option(help="An ICT or REALM checkpoint folder.")],
    corpus: Annotated[Path, typer.Option(help="A corpus folder.")],
    questions: Annotated[Path, typer.Option(help="A question set folder.")],
    out: Out,
    index: Annotated[Path | None, typer.Option(help="Frozen index; without it BM25 retrieves.")] = None,
    snapshot: Annotated[Path | None, typer.Option(help="The snapshot behind the index.")] = None,
    metrics: Metrics = None,
    params: Params = None,
    profile: Profile = "demo",
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune question tower and reader for open-domain QA."""
    from realm_core.stages import finetune as stage

    if index is not None and snapshot is None:
        raise DataError(
            "--index needs --snapshot: fine-tuning reads the block vectors; pass the snapshot behind the index"
        )
    manifest = stage.run(
        settings_for_command(params, profile, set_),
        index=index,
        snapshot=snapshot,
        checkpoint=checkpoint,
        corpus=corpus,
        questions=questions,
        out=out,
        sink=_sink(metrics),
    )
    show(manifest, as_json)


@app.command()
def evaluate(
    reader: Annotated[Path, typer.Option(help="A fine-tuned reader folder.")],
    reader_start: Annotated[Path, typer.Option(help="The checkpoint it was fine-tuned from.")],
    corpus: Annotated[Path, typer.Option(help="A corpus folder.")],
    questions: Annotated[Path, typer.Option(help="A question set folder.")],
    out: Out,
    index: Annotated[Path | None, typer.Option(help="Index version; without it BM25 retrieves.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="The checkpoint behind the index.")] = None,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "dev",
    params: Params = None,
    profile: Profile = "demo",
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Recall@k and exact match of one split."""
    from realm_core.stages import evaluate as stage
    from realm_core.stages.questions import SPLITS

    if split not in SPLITS:
        raise DataError(f"--split {split}: unknown; choose one of {', '.join(SPLITS)}")
    if (index is None) != (checkpoint is None):
        raise DataError("--index and --checkpoint come together: questions are embedded by the index's own checkpoint")
    manifest = stage.run(
        settings_for_command(params, profile, set_),
        index=index,
        checkpoint=checkpoint,
        reader=reader,
        reader_start=reader_start,
        corpus=corpus,
        questions=questions,
        split=split,
        out=out,
        sink=NullSink(),
    )
    show(manifest, as_json)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="A question in plain words.")],
    home: Home = HOME,
    k: Annotated[int, typer.Option(help="How many passages to show.", min=1)] = 3,
    as_of: Annotated[
        str | None, typer.Option(help="Name or digest of another index version to answer from, as it once did.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question from the live index, with the passage it was read from and the index version."""
    from realm_core.answer import Answerer
    from realm_core.artifacts.store import Store

    if any("\ud800" <= letter <= "\udfff" for letter in question):
        raise DataError(f"question {question!a}: holds bytes that are no text here; pass it in the terminal's encoding")
    answer = Answerer.open(Store.open(home), as_of).ask(question, k)
    if as_json:
        print(json.dumps(answer.to_dict(), ensure_ascii=False))
        return
    print(answer.answer or "(no answer found)")
    if answer.evidence:
        print(f"\n  {answer.evidence.title}\n  {answer.evidence.text}")
    print(f"\n  index {answer.index} {answer.index_digest[:12]}, reader {answer.reader}")
    for passage in answer.passages:
        print(f"  {passage.score:8.3f}  {passage.title}: {passage.text[:90]}…")


def run(application: typer.Typer) -> None:
    """Run a command line; an operator's error is one line on standard error and exit code 2."""
    # A service manager ends commands with SIGTERM, a closed terminal with SIGHUP; they clean up as after Ctrl-C.
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started us with SIGINT ignored
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows fewer letters shows them as escapes
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = application(standalone_mode=False)
    except RealmError as error:
        _fail(str(error), 2)
    except typer.Abort:
        _fail("interrupted", 130)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # a usage error of the command line parser
            if type(error).__name__ == "NoArgsIsHelpError":  # a command without arguments: its help, as it is laid out
                print(error.format_message(), file=sys.stderr)
                sys.exit(2)
            _fail(error.format_message(), 2)
        if trouble := storage_trouble(error):
            _fail(trouble, 2)
        raise
    if code == 130:  # the command line parser swallows Ctrl-C and says it with this number
        _fail("interrupted", 130)
    sys.exit(code if isinstance(code, int) else 0)


def main() -> None:
    """Entry point of the library alone; the installed `realm` adds the operation's commands."""
    run(app)


def _sink(path: Path | None) -> MetricSink:
    return JsonLinesSink(path) if path else NullSink()


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)  # one line, whatever a file or an argument held
    sys.exit(code)


if __name__ == "__main__":
    main()
