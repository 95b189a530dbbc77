"""A mirror of finished artifacts on an object store, from which another machine can answer or go on.

    objects/ab/abcd…             every file once, under the sha256 of its bytes
    homes/ID/KIND/NAME.json      a manifest: written after its files
    homes/ID/versions/NAME.json  what an index version needs: written after the manifests
    homes/ID/home.json, live.json, live.history.jsonl

A reader trusts nothing but a versions file, and no byte before its digest is checked; so a push that dies halfway is invisible.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from realm_core.artifacts.lineage import walk
from realm_core.artifacts.manifest import MANIFEST, PRUNED, file_sha256, open_artifact, read_manifest
from realm_core.artifacts.objects import Objects, open_objects
from realm_core.artifacts.publish import operator_error, write_durably
from realm_core.artifacts.store import BY_CHECKPOINT, VERSIONED, Store
from realm_core.errors import ArtifactError, ConfigError

ADDRESS, PROFILE = "REALM_S3", "REALM_PROFILE"


@dataclass
class Transfer:
    """What a push or pull did."""

    version: str
    address: str
    artifacts: int = 0
    files: int = 0  # moved now; those that were there already are not counted
    bytes: int = 0
    kept: list[str] = field(default_factory=list)  # artifacts of which only the manifest goes along

    def __str__(self) -> str:
        return f"{self.artifacts} artifacts, {self.files} files moved, {self.bytes / 1e6:.1f} MB ({self.address})"


def address_from_environment() -> str | None:
    """Where the production profile mirrors to; None in the local profile."""
    return os.environ.get(ADDRESS) if os.environ.get(PROFILE) == "production" else None


def push(store: Store, version: str, address: str, *, pointer: bool = True) -> Transfer:
    """Mirror an index version with all that answers from it, and where the live pointer stands.

    Every file is hashed before it leaves. Files that are there already are not sent again, so a repeated push costs little.
    Raises ArtifactError if an artifact is altered, or if the object store holds another one of that name.
    """
    remote = open_objects(address)
    done = Transfer(version, remote.address)
    place = f"homes/{store.identity}"
    whole = list(_needed(store, version))
    listed = {(kind, name) for kind, name in whole}
    lineage = [(node.kind, node.name) for node in walk(store, "indexes", version).values()]
    only_manifests = [each for each in lineage if each not in listed]
    for kind, name in whole:
        _push_artifact(remote, store.path(kind, name), place, kind, done)
    for kind, name in only_manifests:
        remote.write(f"{place}/lineage/{kind}/{name}.json", (store.path(kind, name) / MANIFEST).read_bytes())
    done.kept = [f"{kind}/{name}" for kind, name in only_manifests]
    remote.write(f"{place}/home.json", (store.home / "home.json").read_bytes())
    content = {"version": version, "artifacts": whole, "lineage": only_manifests}
    remote.write(f"{place}/versions/{version}.json", json.dumps(content, indent=1).encode())
    if pointer:
        push_pointer(store, remote, place)
    return done


def push_pointer(store: Store, remote: Objects, place: str) -> None:
    """Mirror live.json if what it names is mirrored and no later move is."""
    with store.pointer_lock():
        live = store.live()
        if live is None or live.index not in {name.removesuffix(".json") for name in remote.names(f"{place}/versions")}:
            return
        there = json.loads(remote.read(f"{place}/live.json") or b"{}")
        if there.get("generation", 0) > live.generation:
            raise ArtifactError(
                f"{remote.address}: its live.json is of generation {there['generation']}, ours is older"
            )
        history = store.home / "live.history.jsonl"
        if history.exists():
            remote.write(f"{place}/live.history.jsonl", history.read_bytes())
        remote.write(f"{place}/live.json", json.dumps(asdict(live), indent=1).encode())


def pull(home: Path, address: str, version: str | None = None, identity: str | None = None) -> Transfer:
    """Fetch an index version, by default the live one, into a home that is new or is the one it was pushed from.

    Nothing is visible in the home before its bytes are verified. The pointer follows if it is the live version that came,
    and only forwards. Raises ArtifactError naming the object that is missing or altered.
    """
    remote = open_objects(address)
    place = _place(remote, identity)
    if version is None:
        version = json.loads(_require(remote, f"{place}/live.json"))["index"]
    content = json.loads(_require(remote, f"{place}/versions/{version}.json"))
    store = _home_for(remote, place, home)
    done = Transfer(str(version), remote.address)
    for kind, name in content["artifacts"]:
        _pull_artifact(remote, store, place, kind, name, done)
    for kind, name in content["lineage"]:
        if not store.has(kind, name):
            folder = _scratch(store, kind, name)
            (folder / PRUNED).write_text("{}\n", encoding="utf-8")
            (folder / MANIFEST).write_bytes(_require(remote, f"{place}/lineage/{kind}/{name}.json"))
            _publish(folder, store.path(kind, name))
            done.kept.append(f"{kind}/{name}")
    _follow_pointer(remote, store, place, str(version))
    return done


def _needed(store: Store, version: str) -> Iterator[tuple[str, str]]:
    """What answers from a version and what judged it: its parents, a reader for it, and what that was tuned from."""
    index = store.path("indexes", version)
    digest = store.manifest("indexes", version).digest
    seen: set[tuple[str, str]] = set()
    wanted = [store.parent(index, role) for role in ("corpus", "checkpoint", "snapshot")]
    readers = [store.path("readers", name) for name in store.names("readers")]
    tuned = [folder for folder in readers if read_manifest(folder).parents.get("index") == digest]
    others = [*readers[-1:]] if not tuned and readers else []
    sparse = [store.newest("sparse_readers")] if store.names("sparse_readers") else []
    for folder in [*tuned[-1:], *others, *sparse]:
        wanted += [store.parent(folder, "checkpoint"), folder]
    wanted.append(index)
    for kind in ("drifts", "verdicts", "evaluations"):
        if store.has(kind, version):
            wanted.append(store.path(kind, version))
    for folder in wanted:
        key = (folder.parent.name, folder.name)
        if key not in seen:
            seen.add(key)
            yield key


def _push_artifact(remote: Objects, folder: Path, place: str, kind: str, done: Transfer) -> None:
    manifest = open_artifact(folder)
    key = f"{place}/{kind}/{folder.name}.json"
    there = remote.read(key)
    if there is not None:
        found = json.loads(there).get("digest")
        if found != manifest.digest:
            raise ArtifactError(f"{remote.address}/{key}: holds {str(found)[:12]}, here it is {manifest.digest[:12]}")
    for name, digest in manifest.files.items():
        path = folder / name
        size = path.stat().st_size
        if remote.size(_object(digest)) != size:
            remote.upload(path, _object(digest))
            done.files += 1
            done.bytes += size
    if there is None:
        remote.write(key, (folder / MANIFEST).read_bytes())
    done.artifacts += 1


def _pull_artifact(remote: Objects, store: Store, place: str, kind: str, name: str, done: Transfer) -> None:
    key = f"{place}/{kind}/{name}.json"
    final = store.path(kind, name)
    raw = _require(remote, key)
    if (final / MANIFEST).is_file() and not (final / PRUNED).exists():
        if read_manifest(final).digest != json.loads(raw).get("digest"):
            raise ArtifactError(f"{final}: another artifact than {remote.address}/{key}; pull into another --home")
        return
    folder = _scratch(store, kind, name)
    (folder / MANIFEST).write_bytes(raw)
    manifest = read_manifest(folder)  # verifies that its content is what its digest says
    for file, digest in manifest.files.items():
        path = folder / file
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ArtifactError(f"{remote.address}/{key}: names a file outside its folder; it is refused")
        path.parent.mkdir(parents=True, exist_ok=True)
        remote.download(_object(digest), path)
        if (found := file_sha256(path)) != digest:
            shutil.rmtree(folder, ignore_errors=True)
            raise ArtifactError(
                f"{remote.address}/{_object(digest)}: its bytes give {found[:12]}; push {kind}/{name} again"
            )
        done.files += 1
        done.bytes += path.stat().st_size
    if final.exists():  # a manifest whose bytes retention had dropped
        shutil.rmtree(final)
    _publish(folder, final)
    done.artifacts += 1


def _follow_pointer(remote: Objects, store: Store, place: str, version: str) -> None:
    raw = remote.read(f"{place}/live.json")
    if raw is None or json.loads(raw)["index"] != version:
        return
    with store.pointer_lock():
        live = store.live()
        if live is None or live.generation < json.loads(raw)["generation"]:
            history = remote.read(f"{place}/live.history.jsonl")
            if history is not None:
                write_durably(store.home / "live.history.jsonl", history.decode())
            write_durably(store.home / "live.json", raw.decode())


def _home_for(remote: Objects, place: str, home: Path) -> Store:
    identity = place.removeprefix("homes/")
    store = Store(home)
    if (home / "home.json").exists():
        if store.identity != identity:
            raise ConfigError(
                f"{home}: another home than the one mirrored at {remote.address}/{place}; pass another --home"
            )
        return store
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise operator_error(error, home) from None
    write_durably(home / "home.id", identity + "\n")
    write_durably(home / "home.json", _require(remote, f"{place}/home.json").decode())
    return Store.open(home)


def _place(remote: Objects, identity: str | None) -> str:
    homes = remote.names("homes")
    found = [name for name in homes if name.startswith(identity or "")]
    if len(found) != 1:
        known = ", ".join(homes) or "none"
        raise ConfigError(f"{remote.address}: homes there: {known}; name one with --identity")
    return f"homes/{found[0]}"


def _require(remote: Objects, key: str) -> bytes:
    content = remote.read(key)
    if content is None:
        raise ArtifactError(f"{remote.address}/{key}: missing; push that version first")
    return content


def _scratch(store: Store, kind: str, name: str) -> Path:
    if kind not in VERSIONED + BY_CHECKPOINT:
        raise ArtifactError(f"{kind}/{name}: not a kind of artifact; the mirror was written by another version")
    final = store.path(kind, name)
    folder = final.parent / f".{name}.pulled"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _publish(scratch: Path, final: Path) -> None:
    for path in scratch.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    os.rename(scratch, final)


def _object(digest: str) -> str:
    return f"objects/{digest[:2]}/{digest}"
