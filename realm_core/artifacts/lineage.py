"""Lineage: walk from an artifact to everything it was made from, using manifests alone."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from realm_core.artifacts.manifest import Manifest
from realm_core.artifacts.store import BY_CHECKPOINT, VERSIONED, Store
from realm_core.errors import ArtifactError


@dataclass(frozen=True)
class Node:
    """One artifact of a walk."""

    kind: str
    name: str
    manifest: Manifest

    def to_dict(self) -> dict[str, Any]:
        """Plain values; parents by role and digest."""
        manifest = self.manifest
        return {
            "kind": self.kind,
            "name": self.name,
            "digest": manifest.digest,
            "stage": manifest.stage,
            "code": manifest.code,
            "config_digest": manifest.config_digest,
            "parents": dict(manifest.parents),
            "sources": dict(manifest.sources),
            "facts": dict(manifest.facts),
            "record": dict(manifest.record),
        }


def locate(store: Store, wanted: str | None) -> tuple[str, str]:
    """(kind, name) of a version: an index or checkpoint name, KIND/NAME as lineage itself shows it, a digest or its
    beginning, or None for the live index."""
    if wanted is None:
        return "indexes", store.require_live().index
    kind, slash, name = wanted.partition("/")
    if slash and kind in BY_CHECKPOINT + VERSIONED and name in store.names(kind):
        return kind, name
    for kind in ("indexes", *BY_CHECKPOINT, *VERSIONED):
        if wanted in store.names(kind):
            return kind, wanted
    folder = store.find(wanted) if len(wanted) >= 6 else None
    if folder is None:
        known = ", ".join(store.keys("indexes")[-5:]) or "none yet"
        raise ArtifactError(f"{store.home}: no artifact named or digested {wanted!r}; newest indexes: {known}")
    return folder.parent.name, folder.name


def walk(store: Store, kind: str, name: str) -> dict[str, Node]:
    """Digest -> node, the artifact itself first, then its ancestors breadth first; shared ancestors appear once.

    Raises ArtifactError naming a parent that is gone from the store.
    """
    places = _by_digest(store)
    nodes: dict[str, Node] = {}
    queue = deque([(kind, name)])
    while queue:
        kind, name = queue.popleft()
        manifest = store.manifest(kind, name)
        if manifest.digest in nodes:
            continue
        nodes[manifest.digest] = Node(kind, name, manifest)
        for role, digest in manifest.parents.items():
            if digest not in places:
                place = store.path(kind, name)
                raise ArtifactError(f"{place}: its {role} {digest[:12]} is not in this store; restore that folder")
            queue.append(places[digest])
    return nodes


def to_json(nodes: dict[str, Node]) -> dict[str, Any]:
    """The walk as plain values: the artifact asked for and the list of all nodes."""
    first = next(iter(nodes.values()))
    return {
        "kind": first.kind,
        "version": first.name,
        "digest": first.manifest.digest,
        "nodes": [node.to_dict() for node in nodes.values()],
    }


def render(nodes: dict[str, Node]) -> str:
    """The walk as text: each artifact with its facts and parents; earlier checkpoints and indexes in one line each."""
    full: set[str] = set()
    lines: list[str] = []
    for node in nodes.values():
        brief = node.kind in full and node.kind in BY_CHECKPOINT
        full.add(node.kind)
        lines.append(f"{node.kind}/{node.name}  {node.manifest.digest[:12]}")
        origins = [_label(nodes, role, digest) for role, digest in node.manifest.parents.items()]
        origins += [f"{role} {_short_digest(digest)}" for role, digest in node.manifest.sources.items()]
        lines.append(f"    from {', '.join(origins)}")
        if not brief:
            lines.extend(f"    {line}" for line in _details(node))
    return "\n".join(lines)


def _label(nodes: dict[str, Node], role: str, digest: str) -> str:
    return f"{role} {nodes[digest].kind}/{nodes[digest].name}"


def _details(node: Node) -> Iterator[str]:
    record, facts = node.manifest.record, node.manifest.facts
    shown = {key: value for key, value in facts.items() if isinstance(value, int | float | str)}
    if shown:
        yield ", ".join(f"{key} {_short(value)}" for key, value in shown.items())
    shards = facts.get("shards")
    if isinstance(shards, dict):
        yield "shards " + ", ".join(f"{name} {_short_digest(value)}" for name, value in shards.items())
    yield f"stage {node.manifest.stage} code {node.manifest.code}, settings {node.manifest.config_digest[:12]}"
    runs = [f", {name} {record[key]}" for key, name in _RUNS.items() if record.get(key)]
    yield f"git {record.get('git', 'unknown')}" + "".join(runs)


_RUNS = {"dagster_run_id": "dagster run", "mlflow_run_id": "mlflow run"}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:64]


def _short_digest(value: Any) -> str:
    return str(value)[:12]


def _by_digest(store: Store) -> dict[str, tuple[str, str]]:
    places: dict[str, tuple[str, str]] = {}
    for kind, name in store.everything():
        places.setdefault(store.manifest(kind, name).digest, (kind, name))
    return places
