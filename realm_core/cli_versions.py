"""Commands about index versions: build, qualify, promote, list, compare, explain, replay, and what of them is kept."""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from realm_core.artifacts.store import Live, Store
from realm_core.cli_options import HOME, AllowDrop, AsJson, Home, Params, Profile, Set, show
from realm_core.errors import ArtifactError, ConfigError, DataError
from realm_core.params import settings_for_command
from realm_core.ports import NullSink

Version = Annotated[str, typer.Argument(help="Name of an index version of the home, or its digest.")]


def mount(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (index, qualify, promote, lineage, diff, replay, gc, settings, push, pull):
        app.command()(command)


def index(
    action: Annotated[
        Literal["list"] | None, typer.Argument(help="list: show the index versions of a home; nothing: build one.")
    ] = None,
    snapshot: Annotated[Path | None, typer.Option(help="A snapshot folder.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="The checkpoint the snapshot was made with.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="The corpus the snapshot was made from.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to create.")] = None,
    home: Home = HOME,
    params: Params = None,
    profile: Profile = "demo",
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Build the search structure over a snapshot's vectors, or list the index versions of a home.

    Example: realm index list --home .realm
    """
    if action == "list":
        _list(Store.open(home), as_json)
        return
    from realm_core.stages import index as stage

    if snapshot is None or checkpoint is None or corpus is None or out is None:
        raise DataError(
            "realm index needs --snapshot, --checkpoint, --corpus and --out; realm index list shows versions"
        )
    config = settings_for_command(params, profile, set_)
    show(stage.run(config, snapshot=snapshot, checkpoint=checkpoint, corpus=corpus, out=out, sink=NullSink()), as_json)


def _list(store: Store, as_json: bool) -> None:
    """Every index version: what it is worth, how far it lies from the one before, and its state."""
    from realm_core.evaluate.versions import listing
    from realm_core.evaluate.versions_table import table

    versions = listing(store)
    if as_json:
        print(json.dumps(versions, ensure_ascii=False))
    else:
        print(table(versions) if versions else f"{store.home}: no index version yet")


def qualify(
    version: Annotated[str | None, typer.Argument(help="An index version of the home; else pass the folders.")] = None,
    home: Home = HOME,
    again: Annotated[
        bool, typer.Option("--again", "--force", help="Set an earlier verdict aside, for example after a gate changed.")
    ] = False,
    index: Annotated[Path | None, typer.Option(help="An index folder.")] = None,
    snapshot: Annotated[Path | None, typer.Option(help="Its snapshot.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Its checkpoint.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="Its corpus.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to create.")] = None,
    params: Params = None,
    profile: Profile = "demo",
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Verify an index version and write the verdict; exit code 1 if it may not go live.

    Example: realm qualify r1-s0000500 --again
    """
    from realm_core.stages import qualify as stage

    folders = {"index": index, "snapshot": snapshot, "checkpoint": checkpoint, "corpus": corpus}
    if version is not None:
        store = Store.open(home)
        if params or set_ or any(folders.values()) or out:
            raise ConfigError(
                f"{version}: a version of a home is qualified with the home's settings and folders; drop the rest"
            )
        name = index_named(store, version)
        place = store.path("indexes", name)
        given = {"index": place, **{role: store.parent(place, role) for role in ("snapshot", "checkpoint", "corpus")}}
        verdict = stage.run(store.config(), **given, out=store.path("verdicts", name), again=again)
    else:
        given = {role: folder for role, folder in folders.items() if folder is not None}
        if len(given) < len(folders) or out is None:
            raise DataError(
                "realm qualify needs a version of the home, or --index, --snapshot, --checkpoint, --corpus and --out"
            )
        verdict = stage.run(settings_for_command(params, profile, set_), **given, out=out, again=again)
    show(verdict, as_json)
    if not verdict.facts["passed"]:
        raise typer.Exit(1)


def promote(
    version: Version,
    home: Home = HOME,
    reason: Annotated[str, typer.Option(help="Why; kept in the pointer's history.")] = "by hand",
    allow_older: Annotated[bool, typer.Option(help="Roll back to an older step.")] = False,
    allow_drop: AllowDrop = False,
    as_json: AsJson = False,
) -> None:
    """Make an index version live, if the gate agrees."""
    from realm_core.stages import promote as stage

    store = Store.open(home)
    name = index_named(store, version)
    allowed = {"allow_older": allow_older, "allow_drop": allow_drop}
    show_live(stage.run(store.config(), store=store, name=name, reason=reason, **allowed), as_json)


def lineage(
    version: Annotated[
        str | None, typer.Argument(help="Index, checkpoint, KIND/NAME or digest; the live index by default.")
    ] = None,
    home: Home = HOME,
    as_json: AsJson = False,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="Print a Mermaid graph.")] = False,
    html: Annotated[bool, typer.Option("--html", help="Print one self-contained page.")] = False,
) -> None:
    """From which checkpoint, corpus, code and runs a version came, down to the corpus shards; read from manifests alone."""
    from realm_core.artifacts import lineage as walk
    from realm_core.artifacts import lineage_views
    from realm_core.evaluate.versions import describe, when

    if as_json + mermaid + html > 1:
        raise ConfigError("--json, --mermaid and --html: choose one")
    store = Store.open(home)
    kind, name = walk.locate(store, version)
    nodes = walk.walk(store, kind, name)
    if as_json:
        print(json.dumps(walk.to_json(nodes), ensure_ascii=False))
    elif mermaid:
        print(lineage_views.mermaid(nodes))
    elif html:
        facts = describe(store, name) if kind == "indexes" else {}
        facts |= {"made_at": when(facts["made_at"])} if facts else {}
        print(lineage_views.html(nodes, facts), end="")
    else:
        print(walk.render(nodes))


def diff(
    old: Annotated[str, typer.Argument(help="An index version, or its digest.")],
    new: Annotated[str, typer.Argument(help="Another one.")],
    home: Home = HOME,
    measure: Annotated[bool, typer.Option(help="Measure the drift between the two now; opens both.")] = False,
    as_json: AsJson = False,
) -> None:
    """What changed from one index version to another: corpus, steps, settings, code, metrics, drift."""
    from realm_core.evaluate.versions import compare, text_of_change

    store = Store.open(home)
    a, b = index_named(store, old), index_named(store, new)
    change = compare(store, a, b)
    if measure:
        from realm_core.stages import drift

        change["drift"] = {"against": a, **drift.between(store.config(), store=store, old=a, new=b)}
    print(json.dumps(change, ensure_ascii=False) if as_json else text_of_change(change))


def replay(
    version: Version,
    home: Home = HOME,
    keep: Annotated[Path | None, typer.Option(help="Keep what was rebuilt in this new folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Rebuild an index version from its manifest and prove the digest equal; exit code 1 if it is not."""
    from realm_core.stages.replay import replay as rebuild

    store = Store.open(home)
    name = index_named(store, version)
    if keep is not None and keep.exists():
        raise ArtifactError(f"{keep}: exists; choose a new folder")
    with tempfile.TemporaryDirectory(prefix="realm-replay-") as scratch:
        found = rebuild(store, name, keep or Path(scratch))
    if as_json:
        print(json.dumps(found))
    else:
        print(f"{name}: recorded {found['recorded'][:12]}, rebuilt {found['rebuilt'][:12]} in {found['seconds']:.1f} s")
        print("equal" if found["equal"] else "differs:\n" + "\n".join(f"  {line}" for line in found["differences"]))
    if not found["equal"]:
        raise typer.Exit(1)


def gc(
    home: Home = HOME,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Drop the bytes of old snapshots and indexes by retention.keep_indexes; manifests and what is in use stay."""
    from realm_core.artifacts.retention import collect

    store = Store.open(home)
    settings_ = store.config().retention
    found = collect(store, keep=settings_.keep_indexes, grace_seconds=settings_.grace_seconds, dry_run=dry_run)
    if as_json:
        print(json.dumps(found))
        return
    for row in found["dropped"]:
        print(f"{'would drop' if dry_run else 'dropped'}  {row['index']}  {row['bytes'] / 1e6:.1f} MB")
    for name, reason in found["pinned"].items():
        print(f"kept  {name}  {reason}")
    total = sum(row["bytes"] for row in found["dropped"])
    print(f"{len(found['dropped'])} versions, {total / 1e6:.1f} MB {'to free' if dry_run else 'freed'}")


def settings(home: Home = HOME, set_: Set = None, as_json: AsJson = False) -> None:
    """The settings of a home. With --set, change those that only steer the operation: the gate, refresh, retention."""
    from realm_core.artifacts.settings import change, differences

    store = Store.open(home)
    before = store.config()
    config = change(store, set_) if set_ else before
    values: dict[str, Any] = config.model_dump(mode="json")
    if as_json:
        print(json.dumps(values))
        return
    if set_:
        for key, (old, new) in differences(before, config).items():
            print(f"{key}: {json.dumps(old)} -> {json.dumps(new)}")
        return
    for section, inner in values.items():
        rows = inner.items() if isinstance(inner, dict) else [("", inner)]
        for key, value in rows:
            print(f"{section}{'.' if key else ''}{key}={json.dumps(value)}")


def push(
    version: Annotated[str | None, typer.Argument(help="An index version; the live one by default.")] = None,
    home: Home = HOME,
    to: Annotated[str | None, typer.Option(envvar="REALM_S3", help="s3://BUCKET/PREFIX or a folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Mirror an index version, with all that answers from it, to S3-protocol storage or a folder."""
    from realm_core.artifacts import mirror

    store = Store.open(home)
    name = index_named(store, version) if version else store.require_live().index
    done = mirror.push(store, name, _address(to, "--to"))
    print(json.dumps(vars(done)) if as_json else f"pushed {name}: {done}")


def pull(
    version: Annotated[str | None, typer.Argument(help="An index version; the live one by default.")] = None,
    home: Home = HOME,
    from_: Annotated[
        str | None, typer.Option("--from", envvar="REALM_S3", help="s3://BUCKET/PREFIX or a folder.")
    ] = None,
    identity: Annotated[str | None, typer.Option(help="Of which home, where several are mirrored.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a mirrored index version into a home, every byte verified; a new home can then answer."""
    from realm_core.artifacts import mirror

    done = mirror.pull(home, _address(from_, "--from"), version, identity)
    print(json.dumps(vars(done)) if as_json else f"pulled {done.version}: {done}")


def _address(given: str | None, option: str) -> str:
    if not given:
        raise ConfigError(f"no place to mirror to; pass {option} or set REALM_S3")
    return given


def index_named(store: Store, wanted: str) -> str:
    """The index version that is meant by its name, or by the digest of it or of its checkpoint."""
    from realm_core.artifacts.lineage import locate

    kind, name = locate(store, wanted)
    if not store.has("indexes", name):
        raise ArtifactError(f"{kind}/{name}: no index version was made from it")
    return name


def show_live(live: Live, as_json: bool, **more: Any) -> None:
    """Print where the pointer stands."""
    from dataclasses import asdict

    if as_json:
        print(json.dumps({**asdict(live), **more}))
        return
    print(f"live: {live.index} {live.index_digest[:12]}, generation {live.generation}")
    for key, value in more.items():
        print(f"{key}: {value}")
