"""Lineage as a picture: a Mermaid graph for documents, and one self-contained page for a browser."""

import json
from html import escape
from typing import Any

from realm_core.artifacts.lineage import Node
from realm_core.artifacts.store import BY_CHECKPOINT, VERSIONED

_COLOURS = {
    "indexes": "#0b6e99",
    "snapshots": "#3b8ea5",
    "checkpoints": "#c2570c",
    "ict": "#a15c00",
    "corpus": "#4d7c0f",
    "pretrain_corpus": "#4d7c0f",
    "questions": "#4d7c0f",
}
_OTHER = "#6b4fa0"
_WIDTH, _HEIGHT, _GAP_X, _GAP_Y = 210, 46, 28, 44


def mermaid(nodes: dict[str, Node]) -> str:
    """A `graph BT`: parents below, the artifact asked for on top; edges carry their role."""
    number = {digest: f"n{place}" for place, digest in enumerate(nodes)}
    lines = ["graph BT"]
    for digest, node in nodes.items():
        lines.append(f'  {number[digest]}["{node.kind}/{node.name}<br/>{digest[:12]}"]')
    for digest, node in nodes.items():
        for role, parent in node.manifest.parents.items():
            lines.append(f"  {number[parent]} -->|{role}| {number[digest]}")
        for place, (role, source) in enumerate(node.manifest.sources.items()):
            lines.append(f'  {number[digest]}s{place}(["{role} {source[:12]}"]) --> {number[digest]}')
    return "\n".join(lines)


def html(nodes: dict[str, Node], facts: dict[str, Any] | None = None, links: dict[str, str] | None = None) -> str:
    """One page without outside resources: the facts of the version, the graph as SVG, and every manifest to unfold.

    `facts` is shown on top; `links` are addresses by their label, of a tracker for example.
    """
    first = next(iter(nodes.values()))
    title = f"Lineage of {first.kind}/{first.name}"
    shown = "".join(
        f"<tr><th>{escape(key.replace('_', ' '))}</th><td>{escape(_text(value))}</td></tr>"
        for key, value in (facts or {}).items()
    )
    anchors = " · ".join(
        f'<a href="{escape(url)}">{escape(label)}</a>'
        for label, url in (links or {}).items()
        if url.startswith(("http://", "https://"))
    )
    details = "".join(_details(digest, node) for digest, node in nodes.items())
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>{_STYLE}"
        f"<h1>{escape(title)}</h1><p class=digest>{escape(first.manifest.digest)}</p><p>{anchors}</p>"
        f"<table class=facts>{shown}</table><div class=graph>{_svg(nodes)}</div>"
        f"<h2>Manifests</h2>{details}</html>\n"
    )


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_text(inner)}" for key, inner in value.items())
    return "–" if value is None else str(value)


def _details(digest: str, node: Node) -> str:
    content = json.dumps(node.to_dict(), indent=1, ensure_ascii=False, sort_keys=True)
    return (
        f'<details id="{digest}"><summary>{escape(node.kind)}/{escape(node.name)} '
        f"<code>{digest[:12]}</code></summary><pre>{escape(content)}</pre></details>"
    )


def _svg(nodes: dict[str, Node]) -> str:
    """A column a kind, a row a name: what was made from one checkpoint stands side by side, older ones below."""
    place = _places(nodes)
    wide = max(x for x, _ in place.values()) + _WIDTH + 2
    high = max(y for _, y in place.values()) + _HEIGHT + 2
    parts = [f'<svg width="{wide}" height="{high}" viewBox="0 0 {wide} {high}" role=img aria-label="lineage graph">']
    for digest, node in nodes.items():
        for role, parent in node.manifest.parents.items():
            path = _curve(place[digest], place[parent])
            parts.append(f'<path class=edge d="{path}"><title>{escape(role)}</title></path>')
    for digest, node in nodes.items():
        x, y = place[digest]
        colour = _COLOURS.get(node.kind, _OTHER)
        parts.append(
            f'<a href="#{digest}" onclick="document.getElementById(\'{digest}\').open=true">'
            f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="{colour}"/>'
            f'<text x="{x + 10}" y="{y + 19}">{escape(f"{node.kind}/{node.name}")}</text>'
            f'<text class=small x="{x + 10}" y="{y + 36}">{digest[:16]}</text></a>'
        )
    return "".join(parts) + "</svg>"


def _places(nodes: dict[str, Node]) -> dict[str, tuple[int, int]]:
    kinds = [
        kind for kind in (*reversed(BY_CHECKPOINT), *reversed(VERSIONED)) if kind in {n.kind for n in nodes.values()}
    ]
    by_checkpoint = sorted({node.name for node in nodes.values() if node.kind in BY_CHECKPOINT}, reverse=True)
    versions = sorted({node.name for node in nodes.values() if node.kind in VERSIONED}, reverse=True)
    rows = {name: row for row, name in enumerate([*by_checkpoint, *versions])}
    return {
        digest: (1 + kinds.index(node.kind) * (_WIDTH + _GAP_X), 1 + rows[node.name] * (_HEIGHT + _GAP_Y))
        for digest, node in nodes.items()
    }


def _curve(child: tuple[int, int], parent: tuple[int, int]) -> str:
    """From a child to its parent: straight to a neighbour, below the row to one further right, else down."""
    (x, y), (a, b) = child, parent
    if y != b:
        bend = (y + _HEIGHT + b) / 2
        return (
            f"M {x + _WIDTH / 2} {y + _HEIGHT} C {x + _WIDTH / 2} {bend} {a + _WIDTH / 2} {bend} {a + _WIDTH / 2} {b}"
        )
    if abs(a - x) == _WIDTH + _GAP_X:
        return f"M {min(a, x) + _WIDTH} {y + _HEIGHT / 2} H {max(a, x)}"
    low = y + _HEIGHT
    return f"M {x + 30} {low} C {x + 60} {low + 26} {a} {low + 26} {a + 30} {low}"


_STYLE = """<style>
body{font:15px/1.5 system-ui,sans-serif;color:#1f2933;margin:2rem auto;max-width:75rem;padding:0 1rem}
h1{font-size:1.4rem;margin:0}.digest,code,pre{font:12px/1.45 ui-monospace,monospace}.digest{color:#52606d}
.facts{border-collapse:collapse;margin:1rem 0}.facts th{text-align:left;font-weight:600;padding:.15rem 1.5rem .15rem 0}
.facts th,.facts td{vertical-align:top;border-bottom:1px solid #e4e7eb}
.graph{overflow:auto;border:1px solid #e4e7eb;border-radius:6px;padding:1rem}
.edge{fill:none;stroke:#9aa5b1;stroke-width:1.4}svg text{fill:#fff;font-size:13px}svg text.small{font-size:11px;opacity:.85}
details{border-bottom:1px solid #e4e7eb;padding:.3rem 0}summary{cursor:pointer}pre{overflow:auto;background:#f5f7fa;padding:.8rem}
</style>"""
