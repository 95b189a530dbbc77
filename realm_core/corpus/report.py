"""The report that lies in every corpus folder: report.json, report.md and lengths.svg.

Everything in it follows from the input and the settings, so that it is part of the corpus' digest. Times and rates are in
the manifest's record. The plot is written by hand, because a plotting library's bytes change with its version.
"""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realm_core.corpus.packing import HISTOGRAM_STEP

FILES = ("report.json", "report.md", "lengths.svg")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 260, 64, 34, 46  # pixels
_INK, _MUTED, _BAR = "#1f2933", "#7b8794", "#0b6e99"


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write the three files; equal reports give equal bytes."""
    content = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / "report.json").write_text(content, encoding="utf-8")
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    (folder / "lengths.svg").write_text(length_plot(report["block_lengths"]), encoding="utf-8")


def markdown(report: Mapping[str, Any]) -> str:
    """The report for people. Text that comes from the input is escaped."""
    shards = report["shards"]
    rows: list[tuple[str, Any]] = [
        ("pages read", report["pages"]),
        ("redirects", report["redirects"]),
        ("dropped", sum(report["dropped"].values())),
        *([("removed since", report["removed"])] if report.get("removed") else []),
        ("articles", report["articles"]),
        ("blocks", report["blocks"]),
        ("blocks whose title and text occur before", report["duplicate_blocks"]),
        ("sentences", report["sentences"]),
        ("salient spans", report["spans"]),
        ("blocks without a span", report["blocks_without_span"]),
        ("shards", f"{len(shards)}, of {min(shards.values())} to {max(shards.values())} blocks"),
        ("tagger", f"{report['tagger']['name']}, version {report['tagger']['version']}"),
    ]
    parts = ["# Corpus", "", *_table(("", "count"), rows)]
    for title, key in (
        ("This change", "change"),
        ("Dropped", "dropped"),
        ("Spans by label", "span_labels"),
        ("Notes", "notes"),
        ("Input", "input"),
    ):
        if report.get(key):
            parts += ["", f"## {title}", "", *_table(("", ""), list(report[key].items()))]
    parts += ["", "## Block lengths", "", "Wordpieces with title and special tokens.", "", "![](lengths.svg)", ""]
    bins = [(f"{low} to {int(low) + HISTOGRAM_STEP - 1}", count) for low, count in report["block_lengths"].items()]
    return "\n".join([*parts, *_table(("wordpieces", "blocks"), bins), ""])


def metrics_of(report: Mapping[str, Any]) -> dict[str, int | float]:
    """The report as one flat object of numbers, for whoever compares versions."""
    names = (
        "pages",
        "redirects",
        "articles",
        "blocks",
        "sentences",
        "spans",
        "blocks_without_span",
        "duplicate_blocks",
    )
    return {
        **{name: report[name] for name in names},
        "dropped": sum(report["dropped"].values()),
        "shards": len(report["shards"]),
        "spans_per_block": round(report["spans"] / report["blocks"], 3),
        "sentences_per_block": round(report["sentences"] / report["blocks"], 3),
    }


def lengths_table(report: Mapping[str, Any]) -> str:
    """Block lengths as CSV: lower end of a bin in wordpieces, blocks; empty bins between others included."""
    bins = {int(low): count for low, count in report["block_lengths"].items()}
    steps = range(min(bins), max(bins) + 1, HISTOGRAM_STEP)
    return "".join(["wordpieces,blocks\n", *(f"{low},{bins.get(low, 0)}\n" for low in steps)])


def length_plot(lengths: Mapping[str, int]) -> str:
    """A bar a bin, as SVG."""
    bins = {int(low): count for low, count in lengths.items()}
    first, last = min(bins), max(bins)
    count = (last - first) // HISTOGRAM_STEP + 1
    top, step = max(bins.values()), (_WIDTH - _LEFT - 16) / count
    floor = _HEIGHT - _BOTTOM
    every = -(-count // 12)
    shapes = []
    for number in range(count):
        low = first + number * HISTOGRAM_STEP
        height = bins.get(low, 0) / top * (floor - _TOP)
        x = _LEFT + number * step
        shapes.append(
            f'<rect x="{x + 1:.1f}" y="{floor - height:.1f}" width="{max(step - 2, 0.5):.1f}" height="{height:.1f}" '
            f'fill="{_BAR}"><title>{low} to {low + HISTOGRAM_STEP - 1}: {bins.get(low, 0)} blocks</title></rect>'
        )
        if number % every == 0:
            shapes.append(f'<text x="{x:.1f}" y="{floor + 16}" fill="{_MUTED}">{low}</text>')
    label = "wordpieces a block, title and special tokens included"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
            'font-size="11">',
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
            f'<text x="{_LEFT}" y="20" fill="{_INK}" font-size="13" font-weight="bold">Block lengths</text>',
            f'<text x="{_LEFT - 6}" y="{_TOP + 4}" fill="{_MUTED}" text-anchor="end">{top}</text>',
            f'<text x="{_LEFT - 6}" y="{floor}" fill="{_MUTED}" text-anchor="end">0</text>',
            *shapes,
            f'<line x1="{_LEFT}" y1="{floor}" x2="{_WIDTH - 16}" y2="{floor}" stroke="{_MUTED}"/>',
            f'<text x="{_LEFT}" y="{_HEIGHT - 12}" fill="{_INK}">{label}</text>',
            "</svg>",
            "",
        ]
    )


def _table(head: tuple[str, str], rows: list[tuple[str, Any]]) -> list[str]:
    return [
        f"| {head[0]} | {head[1]} |",
        "|---|---:|",
        *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows),
    ]


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return html.escape(text, quote=False).replace("|", "&#124;").replace("\n", " ")
