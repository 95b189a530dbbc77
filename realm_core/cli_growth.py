"""Commands that change the corpus of a home under its live index: `realm corpus add`, `remove`, `compact` and others."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from realm_core.cli_corpus import OnError, workers_for
from realm_core.cli_options import HOME, AllowDrop, AsJson, Home, tell_of_move
from realm_core.errors import DataError
from realm_core.ports import NullSink


def mount(corpus_app: typer.Typer) -> None:
    """Add the commands to `realm corpus`."""
    corpus_app.command("add")(add)
    corpus_app.command("remove")(remove)
    corpus_app.command("compact")(compact)
    corpus_app.command("refresh")(refresh)
    corpus_app.command("status")(status)


def add(
    input_: Annotated[
        str, typer.Argument(metavar="FILE", help="File, folder of files, or with --source hf a dataset name.")
    ],
    home: Home = HOME,
    source: Annotated[
        str, typer.Option(help="mediawiki, jsonl, parquet, dpr, hf or wikiextractor; auto goes by the file name.")
    ] = "auto",
    replace: Annotated[bool, typer.Option(help="Put new texts in the place of old ones with the same id.")] = False,
    on_error: OnError = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes; one a processor for large files by default.", min=1)
    ] = None,
    allow_drop: AllowDrop = False,
    as_json: AsJson = False,
) -> None:
    """Add documents: only their blocks are embedded, by the live checkpoint, and the new index goes through the gate.

    A command that was killed is given again and goes on where it stopped; until it is done the old index answers.

    Example: realm corpus add new.jsonl --home my-realm
    """
    from realm_core.corpus.sources import Source
    from realm_core.stages import grow

    change = grow.Add(source=Source.find(input_, source), replace=replace)
    _change(
        home,
        change,
        f"corpus add {Path(input_).name}",
        on_error,
        allow_drop,
        as_json,
        workers or workers_for(Path(input_)),
    )


def remove(
    home: Home = HOME,
    id_: Annotated[list[str] | None, typer.Option("--id", help="Id of a document. May be repeated.")] = None,
    title: Annotated[list[str] | None, typer.Option(help="Title of documents; all that bear it go.")] = None,
    ids_from: Annotated[
        Path | None, typer.Option(help='A file with an id a line, or {"id": …} or {"title": …} a line.')
    ] = None,
    on_error: OnError = None,
    allow_drop: AllowDrop = False,
    as_json: AsJson = False,
) -> None:
    """Remove documents: once the new index is live none of them can be returned, nor brought back by a rollback.

    Example: realm corpus remove --title "Ada Lovelace" --home my-realm
    """
    from realm_core.corpus.growth import read_removals
    from realm_core.stages import grow

    ids, titles = read_removals(ids_from) if ids_from else ([], [])
    change = grow.Remove(ids=[*(id_ or ()), *ids], titles=[*(title or ()), *titles])
    if not (change.ids or change.titles):
        raise DataError("nothing to remove; pass --id, --title or --ids-from FILE")
    _change(home, change, "corpus remove", on_error, allow_drop, as_json)


def compact(home: Home = HOME, as_json: AsJson = False) -> None:
    """Write the shards anew without what was removed; answers stay the same, and nothing is embedded."""
    from realm_core.stages import grow

    _change(home, grow.Compact(), "corpus compact", None, False, as_json)


def refresh(
    home: Home = HOME,
    checkpoint: Annotated[
        str | None, typer.Option(help="Key of a checkpoint; that of the live index by default.")
    ] = None,
    allow_older: Annotated[bool, typer.Option(help="Go back to an older step, over the newest corpus.")] = False,
    reason: Annotated[str, typer.Option(help="Why; kept in the pointer's history.")] = "corpus refresh",
    allow_drop: AllowDrop = False,
    as_json: AsJson = False,
) -> None:
    """Make the index of a checkpoint over the newest corpus, and promote it if the gate agrees."""
    from realm_core.artifacts import corpora
    from realm_core.artifacts.keys import checkpoint_of
    from realm_core.artifacts.store import Store
    from realm_core.stages import refresh as stage

    store, began = Store.open(home), time.monotonic()
    chosen = checkpoint_of(checkpoint or store.require_live().index)
    with corpora.growing(store):
        live, snapshot = stage.run(
            store.config(),
            store=store,
            version=corpora.version_over(store, chosen, store.newest("corpus")),
            sink=NullSink(),
            reason=reason,
            allow_older=allow_older,
            allow_drop=allow_drop,
        )
    told = tell_of_move(store, live)
    _show({**_live_facts(live, snapshot), **told, "seconds": round(time.monotonic() - began, 2)}, as_json)


def status(home: Home = HOME, as_json: AsJson = False) -> None:
    """Versions of the corpus, what each changed, which one answers, and whether compaction is worth while."""
    from realm_core.artifacts.corpus_status import status_of, status_text
    from realm_core.artifacts.store import Store

    found = status_of(Store.open(home))
    print(json.dumps(found, ensure_ascii=False) if as_json else status_text(found))


def _change(
    home: Path, change: Any, reason: str, on_error: str | None, allow_drop: bool, as_json: bool, workers: int = 1
) -> None:
    from realm_core.artifacts import corpora
    from realm_core.artifacts.store import Store
    from realm_core.params import with_on_error
    from realm_core.stages import grow, refresh

    store, began = Store.open(home), time.monotonic()
    config = store.config()
    with corpora.growing(store):
        folder, made, new = grow.apply(
            with_on_error(config, on_error), store=store, change=change, sink=NullSink(), workers=workers
        )
        outcome = refresh.over_newest_corpus(config, store=store, sink=NullSink(), reason=reason, allow_drop=allow_drop)
    facts = {
        "corpus": folder.name,
        "corpus_digest": made.digest,
        "new": new,
        "change": made.facts["change"],
        "documents": made.facts["articles"],
        "blocks": made.facts["blocks"],
        "dropped": made.facts["dropped"],
        **({**_live_facts(*outcome), **tell_of_move(store, outcome[0])} if outcome else {"index": None}),
        "seconds": round(time.monotonic() - began, 2),
    }
    _show(facts, as_json)


def _live_facts(live: Any, snapshot: Any) -> dict[str, Any]:
    return {
        "index": live.index,
        "index_digest": live.index_digest,
        "generation": live.generation,
        "embedded_blocks": snapshot.record.get("embedded_blocks"),
        "reused_blocks": snapshot.record.get("reused_blocks"),
    }


def _counted(count: int, name: str) -> str:
    words = name.replace("_", " ")
    return f"{count} {words.removesuffix('s') if count == 1 else words}"


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    if change := facts.get("change"):
        counts = ", ".join(_counted(value, name) for name, value in change.items() if name != "kind" and value)
        print(f"{change['kind']}: {counts or 'nothing to do'}{'' if facts['new'] else ' (done before)'}")
        print(
            f"corpus {facts['corpus']} {facts['corpus_digest'][:12]}: {facts['documents']} documents, {facts['blocks']} blocks"
        )
    if facts["index"] is None:
        print("no index is live yet: the first refresh embeds this version")
        return
    print(
        f"embedded {facts['embedded_blocks']} blocks, {facts['reused_blocks']} had their vectors; {facts['seconds']} s"
    )
    print(f"live: {facts['index']} {facts['index_digest'][:12]}, generation {facts['generation']}")
    for service in ("dagster", "mlflow", "mirror"):
        if service in facts:
            print(f"{service}: {facts[service]}")
