"""The installed `realm`: the library's commands, and those that run the operation."""

import json
import os
import sys
import time
from contextlib import ExitStack
from importlib.resources import as_file, files
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from realm_core import cli, cli_options, cli_versions
from realm_core.cli_options import HOME, AllowDrop, AsJson, Home, Params, Profile, Set
from realm_core.params import settings_for_command

app = cli.app
cli_options.AFTER_MOVE.append(lambda store, live: _pointer().moved(store, live))
train_app = typer.Typer(help="The detached trainer of a home.", no_args_is_help=True)
app.add_typer(train_app, name="train")
RunName = Annotated[str, typer.Option(help="Name of the training run.")]


@app.command()
def demo(
    home: Home = HOME,
    params: Params = None,
    profile: Profile = "demo",
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """The main job on the bundled encyclopedia: from documents to a live index, with a real Dagster instance."""
    with (
        as_file(files("realm_core.sample") / "encyclopedia.jsonl") as corpus,
        as_file(files("realm_core.sample") / "questions.jsonl") as questions,
    ):
        _main_job(home, params, profile, set_, as_json, corpus, questions)


@app.command()
def run(
    corpus: Annotated[
        Path,
        typer.Option(
            help="Documents, one JSON object a line with title and text (.gz too), or a folder of built shards."
        ),
    ],
    questions: Annotated[Path, typer.Option(help="Questions, one JSON object a line with question and answers.")],
    pretrain_corpus: Annotated[
        Path | None, typer.Option(help="Other documents to draw masked queries from; those of --corpus by default.")
    ] = None,
    home: Home = HOME,
    params: Params = None,
    profile: Profile = "demo",
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """The main job on your own documents and questions.

    Example: realm run --corpus docs.jsonl --questions questions.jsonl --home my-realm
    """
    _main_job(home, params, profile, set_, as_json, corpus, questions, pretrain_corpus)


@app.command()
def up(
    home: Home = HOME,
    port: Annotated[int, typer.Option(help="Port of the Dagster UI.", min=1, max=65535)] = 3000,
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow.", min=1, max=65535)] = 5000,
) -> None:
    """Dagster's UI and daemon, and MLflow, on loopback, until Ctrl-C.

    Where MLFLOW_TRACKING_URI is set, the metrics are on that server and none is started here.
    """
    from orchestration import services
    from orchestration.resources.tracking import default_uri, tracker_for
    from realm_core.artifacts.store import Store
    from realm_core.errors import BusyError

    Store.open(home)
    services.prepare(home)
    tracking = tracker_for(home).uri
    wanted = {"Dagster": (port, services.webserver)}
    if tracking == default_uri(home):
        wanted["MLflow"] = (mlflow_port, services.mlflow_server)
    if len({number for number, _ in wanted.values()}) < len(wanted):
        raise BusyError(f"port {port}: wanted for both Dagster and MLflow; pass another --mlflow-port")
    for name, (number, _) in wanted.items():
        services.require_free(number, name)
    if "MLflow" in wanted:
        os.environ["REALM_MLFLOW_PAGE"] = f"http://{services.LOOPBACK}:{mlflow_port}"  # where links in Dagster lead
    with ExitStack() as stack:
        daemon = services.KeptDaemon(home)
        stack.enter_context(services.running(daemon))
        pages = {}
        for name, (number, start) in wanted.items():
            pages[name] = start(home, number)
            stack.enter_context(services.running(pages[name]))
        for name, (number, _) in wanted.items():
            services.require_answering(pages[name], number)
            print(f"{name:<8} http://{services.LOOPBACK}:{number}")
        if "MLflow" not in wanted:
            print(f"MLflow   {tracking}")
        print(f"home     {home.resolve()}, logs in {home / 'logs'}; Ctrl-C ends all", flush=True)
        while True:
            if news := daemon.keep():
                print(news, file=sys.stderr, flush=True)
            for page in pages.values():
                page.require_alive()
            time.sleep(1)


@app.command()
def rollback(
    reason: Annotated[str, typer.Option(help="Why; kept in the pointer's history.")],
    to: Annotated[str | None, typer.Option(help="Which version; by default the one that was live before.")] = None,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Go back to an earlier index version: pointer, Dagster's record and MLflow's champion move together."""
    from orchestration import pointer
    from realm_core.artifacts.store import Store

    name = cli_versions.index_named(Store.open(home), to) if to else None
    live, told = pointer.rollback(home, name, reason)
    cli_versions.show_live(live, as_json, **told)


@app.command()
def promote(
    version: cli_versions.Version,
    home: Home = HOME,
    reason: Annotated[str, typer.Option(help="Why; kept in the pointer's history.")] = "by hand",
    allow_older: Annotated[bool, typer.Option(help="Let an older step go live; realm rollback does.")] = False,
    allow_drop: AllowDrop = False,
    as_json: AsJson = False,
) -> None:
    """Make an index version live, if the gate agrees, and tell Dagster and MLflow."""
    from orchestration import pointer
    from realm_core.artifacts.store import Store

    name = cli_versions.index_named(Store.open(home), version)
    live, told = pointer.promote(home, name, reason, allow_older=allow_older, allow_drop=allow_drop)
    cli_versions.show_live(live, as_json, **told)


@train_app.command("start")
def train_start(home: Home = HOME, run: RunName = "r1") -> None:
    """Start, or continue, a training run: as a process of its own, or by segments (supervise.mode)."""
    from orchestration import trainer

    print(trainer.start(home, run))


@train_app.command("stop")
def train_stop(home: Home = HOME, run: RunName = "r1") -> None:
    """Ask the trainer to end at its next step border."""
    from orchestration import trainer
    from realm_core.artifacts.store import Store

    Store.open(home).require_run(run)
    print(trainer.stop(home, run))


@train_app.command("status")
def train_status(home: Home = HOME, run: RunName = "r1", as_json: AsJson = False) -> None:
    """Whether the trainer runs and where, its heartbeat and token, its restarts, its last step, and what went wrong."""
    from orchestration import status
    from realm_core.artifacts.store import Store

    store = Store.open(home)
    store.require_run(run)
    found = status.of(store, run)
    print(json.dumps(found) if as_json else status.text(found))


def _pointer() -> ModuleType:
    """Imported when a pointer has moved, for it imports Dagster."""
    from orchestration import pointer

    return pointer


def main() -> None:
    """Entry point of the installed command."""
    cli.run(app)


def _main_job(
    home: Path,
    params: Path | None,
    profile: str,
    overrides: list[str] | None,
    as_json: bool,
    corpus: Path,
    questions: Path,
    pretrain_corpus: Path | None = None,
) -> None:
    from rich.console import Console

    from orchestration import main_job
    from realm_core.errors import DataError
    from realm_core.evaluate.report import rich_table

    for path in (corpus, questions, pretrain_corpus):
        if path is not None and not (path.is_file() or (path == corpus and (path / "manifest.json").is_file())):
            raise DataError(f"{path}: no such file; pass a JSON-lines file")
    config = settings_for_command(params, profile, overrides)
    report = main_job.run(home, config, profile, corpus, questions, pretrain_corpus)
    if as_json:
        print(json.dumps(report))
        return
    Console().print(rich_table(report))
    print(f"report: {home / 'report.md'}, {home / 'report.json'}")
    for command, what in main_job.next_steps(home).items():
        print(f"  {command:<32} {what}")


if __name__ == "__main__":
    main()
