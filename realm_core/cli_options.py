"""What several commands share: options, and how a result is printed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from realm_core.artifacts.manifest import Manifest
from realm_core.artifacts.store import Live, Store

Params = Annotated[Path | None, typer.Option(help="Settings file; ./params.yaml or the packaged one by default.")]
Profile = Annotated[str, typer.Option(help="Which profile of the settings file.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override: section.key=value. May be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Out = Annotated[Path, typer.Option(help="Folder to create; it must not exist with another content.")]
Home = Annotated[Path, typer.Option(help="Home folder of the operation.", envvar="REALM_HOME")]
Metrics = Annotated[Path | None, typer.Option(help="Append metrics to this JSON-lines file while the stage runs.")]
AllowDrop = Annotated[
    bool, typer.Option(help="Go live even if recall or exact match drop by more than the gate allows.")
]
HOME = Path(".realm")


def show(manifest: Manifest, as_json: bool) -> None:
    """Print what a stage made; of several processes that made it together, the first one does."""
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print(json.dumps(summary(manifest), ensure_ascii=False))
        return
    for key, value in summary(manifest).items():
        print(f"{key}: {value}")


def summary(manifest: Manifest) -> dict[str, Any]:
    """Digest, time and facts of a manifest as one flat object."""
    return {
        "stage": manifest.stage,
        "digest": manifest.digest,
        "seconds": manifest.record.get("seconds"),
        **manifest.facts,
    }


# What is told when a command has moved the live pointer: (store, live) -> service and what came of it. The library knows
# nobody; the installed `realm` adds Dagster, MLflow and the mirror.
AFTER_MOVE: list[Callable[[Store, Live], dict[str, str]]] = []


def tell_of_move(store: Store, live: Live) -> dict[str, str]:
    """Tell everybody who wants to know where the pointer stands."""
    return {service: outcome for listener in AFTER_MOVE for service, outcome in listener(store, live).items()}
