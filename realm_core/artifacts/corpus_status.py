"""What became of the corpus of a home, version by version: read from manifests alone."""

from typing import Any

from realm_core.artifacts import inbox
from realm_core.artifacts.keys import checkpoint_of
from realm_core.artifacts.manifest import Manifest
from realm_core.artifacts.store import Store

_DEAD, _DELTAS = 0.2, 64  # share of dead blocks, and shards beyond the first version's, from which compaction pays


def status_of(store: Store) -> dict[str, Any]:
    """{"live", "newest", "versions", "dead_share", "delta_shards", "inbox", "refused", "advice"}; plain values."""
    live = store.live()
    names = store.names("corpus")
    manifests = {name: store.manifest("corpus", name) for name in names}
    indexes: dict[str, list[str]] = {}
    for index in store.keys("indexes"):
        indexes.setdefault(store.manifest("indexes", index).parents["corpus"], []).append(index)
    versions = [_version(name, manifest, indexes.get(manifest.digest, [])) for name, manifest in manifests.items()]
    newest = store.newest("corpus").name
    serving = next((row["name"] for row in versions if live and live.index in row["indexes"]), None)
    now, first = manifests[newest].facts, manifests[names[0]].facts
    dead = now.get("dead_blocks", 0) / max(1, now["blocks"] + now.get("dead_blocks", 0))
    deltas = max(0, len(now["shards"]) - len(first["shards"]))
    advice = None
    if live is not None and serving != newest:
        advice = f"the live index does not stand on {newest} yet: realm corpus refresh"
    elif dead > _DEAD or deltas > _DELTAS:
        advice = "realm corpus compact"
    return {
        "live": {"index": live.index, "checkpoint": checkpoint_of(live.index), "corpus": serving} if live else None,
        "newest": newest,
        "versions": versions,
        "dead_share": round(dead, 4),
        "delta_shards": deltas,
        "inbox": [path.name for path in inbox.pending(store.home, now=float("inf"))],
        "refused": inbox.refused(store.home),
        "advice": advice,
    }


def status_text(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"{'version':<9}{'documents':>10}{'blocks':>10}{'dead':>8}{'shards':>8}  change"]
    for row in found["versions"]:
        numbers = f"{row['documents']:>10,}{row['blocks']:>10,}{row['dead_blocks']:>8,}{row['shards']:>8}"
        lines.append(f"{row['name']:<9}{numbers}  {row['change']}")
        lines.append(f"{'':<9}index {', '.join(row['indexes'][-3:]) or 'none'}")
    live = found["live"]
    lines.append(f"live: {live['index']} over {live['corpus']}" if live else "live: none yet")
    lines.append(
        f"{found['dead_share']:.1%} of the stored blocks are removed; "
        f"shards added since the first version: {found['delta_shards']}"
    )
    for what in ("inbox", "refused"):
        if found[what]:
            lines.append(f"{what}: {', '.join(found[what])}")
    return "\n".join([*lines, *([f"next: {found['advice']}"] if found["advice"] else [])])


def _version(name: str, manifest: Manifest, indexes: list[str]) -> dict[str, Any]:
    facts, change = manifest.facts, manifest.facts.get("change", {})
    counts = {"+": change.get("added_documents"), "-": change.get("removed_documents")}
    shown = " ".join(f"{sign}{count}" for sign, count in counts.items() if count)
    return {
        "name": name,
        "digest": manifest.digest,
        "created": manifest.record.get("created"),
        "change": f"{change.get('kind', 'build')} {shown}".strip(),
        "documents": facts.get("articles"),
        "blocks": facts["blocks"],
        "dead_blocks": facts.get("dead_blocks", 0),
        "shards": len(facts["shards"]),
        "indexes": indexes,
    }
