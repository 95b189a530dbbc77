"""What tests of stages and of index versions share: the two versions of the tiny home, and ways to alter it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from realm_core.artifacts.manifest import MANIFEST, file_sha256, read_manifest
from realm_core.artifacts.store import Store
from realm_core.config import Config
from realm_core.index.version import open_version
from realm_core.model.device import resolve
from realm_core.params import load_config
from realm_core.ports import NullSink

FIRST, LATER = "r1-s0000000", "r1-s0000004"
SINK = NullSink()


def reseal(folder: Path, **facts: Any) -> None:
    """Take the files as they are now into the manifest: another artifact, and an honest one."""
    made = read_manifest(folder)
    files = {name: file_sha256(folder / name) for name in made.files if (folder / name).exists()}
    (folder / MANIFEST).write_text(replace(made, files=files, facts={**made.facts, **facts}).to_json(), "utf-8")


def set_config(*overrides: str) -> Config:
    return load_config(None, "tiny", overrides)


def open_later(store: Store, **places: Path) -> Any:
    made = {"checkpoint": store.path("checkpoints", LATER), "corpus": store.path("corpus", "v0001"), **places}
    return open_version(store.path("indexes", LATER), **made, device=resolve(store.config().runtime))
