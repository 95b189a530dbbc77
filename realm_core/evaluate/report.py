"""The report of a run: which index versions there were, which of them went live, and what each was worth.

A report is a plain dict, see `Report`; any value may be missing or None. It is written as `report.json` for programs
and `report.md` for people, with plots where matplotlib is installed, and is shown as a table on a terminal.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from realm_core.evaluate.plots import draw_drift, draw_quality, draw_training, plots_available

JSON, MARKDOWN, QUALITY, TRAINING, DRIFT = "report.json", "report.md", "quality.png", "training.png", "drift.png"
_DRIFT_ALT = "Top-k overlap and displacement of every index version against the one before"
_DRIFT_TEXT = (
    "Each version against the one that was live when it was made, on a fixed set of probe sentences and the same blocks; "
    "steps and seconds are the age of the older encoder."
)
_NO_PLOTS = "matplotlib is not installed, so there are no plots."


class IndexVersion(TypedDict, total=False):
    """One index version; shares lie in [0, 1]."""

    checkpoint: str | None
    step: int | None  # optimizer step of the encoder
    index_digest: str | None
    dagster_run_id: str | None
    triggered_by: str | None
    recall_vs_exact: float | None
    recall_at_5: float | None
    exact_match: float | None
    age_steps: float | None  # of the encoder behind the trainer when the version was swapped in
    null_probability: float | None
    top_k_overlap: float | None  # of the probe set, with the version that was live before: 1 means nothing moved
    drift: Mapping[str, Any] | None  # against, top_k_overlap, cosine_mean, cosine_min, distance_mean, ages
    live: bool
    verdict: str | None


class Report(TypedDict, total=False):
    """What `write_report` takes."""

    seconds: float | None
    index_versions: list[IndexVersion]
    live: Mapping[str, Any] | None  # checkpoint, index_digest
    swaps: list[Mapping[str, Any]]  # step, index_digest
    qa: Mapping[str, Mapping[str, Any]]  # system -> recall_at_5, recall_at_20, exact_match
    dagster_home: str | None
    mlflow: Mapping[str, Any] | None  # tracking_uri, run_id
    training: Mapping[str, Any] | None  # seconds, stalled_seconds, stalled_share
    refreshes: Mapping[str, Any] | None  # medians: overhead_seconds, live_after_seconds, live_beyond_embedding_seconds


# heading, key, kind; what both tables of the report show
_VERSION_COLUMNS = (
    ("checkpoint", "checkpoint", "name"),
    ("index", "index_digest", "digest"),
    ("vs exact", "recall_vs_exact", "share"),
    ("R@5", "recall_at_5", "share"),
    ("EM", "exact_match", "share"),
    ("null p", "null_probability", "share"),
    ("same", "top_k_overlap", "share"),
    ("age", "age_steps", "count"),
    ("verdict", "verdict", "text"),
)
_DRIFT_COLUMNS = (
    ("version", "checkpoint", "name"),
    ("against", "against", "name"),
    ("top-k overlap", "top_k_overlap", "share"),
    ("cosine, mean", "cosine_mean", "fine"),
    ("cosine, least", "cosine_min", "fine"),
    ("distance / norm", "relative_distance", "fine"),
    ("steps", "age_steps", "count"),
    ("seconds", "age_seconds", "count"),
)
_QA_COLUMNS = (
    ("system", "system", "text"),
    ("R@5", "recall_at_5", "share"),
    ("R@20", "recall_at_20", "share"),
    ("EM", "exact_match", "share"),
)


def write_report(folder: Path, report: Mapping[str, Any], steps: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """Write the report, and plots of it and of the training `steps`, into an existing folder; returns the file names.

    `steps` are rows of `steps.jsonl`: step, loss, utility, null_probability, index_age; all but step may be missing.
    """
    images = []
    if plots_available():
        if draw_quality(folder / QUALITY, report):
            images.append(QUALITY)
        if draw_drift(folder / DRIFT, report):
            images.append(DRIFT)
        if draw_training(folder / TRAINING, steps, _swaps(report)):
            images.append(TRAINING)
    plain = json.dumps(_finite(report), indent=2, ensure_ascii=False, allow_nan=False, sort_keys=True)
    (folder / JSON).write_text(plain + "\n", encoding="utf-8")
    (folder / MARKDOWN).write_text(markdown(report, images), encoding="utf-8")
    return [JSON, MARKDOWN, *images]


def table(report: Mapping[str, Any], width: int = 120) -> str:
    """The report as plain text of at most `width` columns."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(rich_table(report))
    return console.file.getvalue()  # type: ignore[attr-defined]


def rich_table(report: Mapping[str, Any]) -> Group:
    """The report for a rich console: index versions, systems compared, and one closing line."""
    versions = _table("index versions")
    versions.add_column("")
    _add_columns(versions, _VERSION_COLUMNS)
    for version in _versions(report):
        live = bool(version.get("live"))
        cells = _cells(version, _VERSION_COLUMNS)
        versions.add_row(Text("●" if live else ""), *map(Text, cells), style="bold green" if live else "")
    parts: list[Any] = [versions]
    if report.get("qa"):
        systems = _table("question answering")
        _add_columns(systems, _QA_COLUMNS)
        for row in _systems(report):
            systems.add_row(*map(Text, _cells(row, _QA_COLUMNS)))
        parts.append(systems)
    return Group(*parts, Text(summary(report)))


def _table(title: str) -> Table:
    """An empty table narrow enough for a terminal of 80 columns."""
    return Table(
        title=title,
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )


def summary(report: Mapping[str, Any]) -> str:
    """One line: how many versions and swaps, what is live, how long it took."""
    live = report.get("live") or {}
    parts = [_plural(len(_versions(report)), "index version"), _plural(len(_swaps(report)), "swap")]
    if live:
        digest = _cell(live.get("index_digest"), "digest")
        parts.append(f"live: {_cell(live.get('checkpoint'), 'text')} (index {digest})")
    else:
        parts.append("nothing live")
    if _number(report.get("seconds")) is not None:
        parts.append(f"{float(report['seconds']):.0f} s")
    return " · ".join(parts)


def markdown(report: Mapping[str, Any], images: Sequence[str] = ()) -> str:
    """The text of `report.md`."""
    lines = ["# Run report", "", _escape(summary(report)), ""]
    if not plots_available():
        lines += [_NO_PLOTS, ""]
    if QUALITY in images:
        lines += [f"![Recall@5 and exact match of every index version, with swaps]({QUALITY})", ""]
    lines += ["## Index versions", "", *_markdown_table(_marked(report), (("live", "mark", "text"), *_VERSION_COLUMNS))]
    if report.get("qa"):
        lines += ["## Question answering", "", *_markdown_table(_systems(report), _QA_COLUMNS)]
    if drifts := _drifts(report):
        lines += ["## Drift", "", *([f"![{_DRIFT_ALT}]({DRIFT})", ""] if DRIFT in images else []), _DRIFT_TEXT, ""]
        lines += _markdown_table(drifts, _DRIFT_COLUMNS)
    if TRAINING in images:
        lines += ["## Training", "", f"![Loss, retrieval utility and index age over steps]({TRAINING})", ""]
    if timing := _timing(report):
        lines += ["## Timing", "", *(f"- {line}" for line in timing), ""]
    lines += ["## Where it came from", ""]
    origin = [("step", "step", "count"), ("index", "index_digest", "digest"), ("triggered by", "triggered_by", "text")]
    lines += _markdown_table(_versions(report), [*origin, ("Dagster run", "dagster_run_id", "text")])
    tracking = report.get("mlflow") or {}
    for name, value in (
        ("Dagster home", report.get("dagster_home")),
        ("MLflow", tracking.get("tracking_uri")),
        ("MLflow run", tracking.get("run_id")),
    ):
        lines += [f"- {name}: {_escape(_cell(value, 'text'))}"]
    return "\n".join(lines) + "\n"


def _timing(report: Mapping[str, Any]) -> list[str]:
    """What the loop cost beyond its work; a line for each number that is known."""
    training, refreshes = report.get("training") or {}, report.get("refreshes") or {}
    known = (
        ("trainer stood still for refreshes and swaps: {:.2%} of its time", training.get("stalled_share")),
        ("a refresh beyond embedding, building, checks and evaluation: {:.1f} s", refreshes.get("overhead_seconds")),
        ("from a checkpoint on disk to its index live: {:.1f} s", refreshes.get("live_after_seconds")),
        ("of that beyond embedding, the queue included: {:.1f} s", refreshes.get("live_beyond_embedding_seconds")),
    )
    return [text.format(value) for text, found in known if (value := _number(found)) is not None]


def _versions(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(report.get("index_versions") or [], key=lambda row: _number(row.get("step")) or 0)


def _drifts(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A row for every version whose drift was measured; `age_steps` is here that of the version it was measured against."""
    return [{**row["drift"], "checkpoint": row.get("checkpoint")} for row in _versions(report) if row.get("drift")]


def _marked(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [{**row, "mark": "●" if row.get("live") else " "} for row in _versions(report)]


def _systems(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [{**(values or {}), "system": name} for name, values in (report.get("qa") or {}).items()]


def _swaps(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(report.get("swaps") or [])


def _add_columns(target: Table, columns: Sequence[tuple[str, str, str]]) -> None:
    for heading, _, kind in columns:
        target.add_column(
            heading, justify="left" if kind in ("text", "name", "digest") else "right", no_wrap=kind != "text"
        )


def _cells(row: Mapping[str, Any], columns: Sequence[tuple[str, str, str]]) -> list[str]:
    return [_cell(row.get(key), kind) for _, key, kind in columns]


def _cell(value: Any, kind: str) -> str:
    if kind in ("share", "count", "fine"):
        number = _number(value)
        if number is None:
            return "–"
        if kind == "fine":
            return f"{number:.5f}"
        return f"{number:.3f}" if kind == "share" else f"{number:,.0f}"
    if value is None:
        return "–"
    return str(value).removeprefix("sha256:")[:8] if kind == "digest" else " ".join(str(value).split())


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str, str]]) -> list[str]:
    if not rows:
        return ["None.", ""]
    head = "| " + " | ".join(heading for heading, _, _ in columns) + " |"
    rule = "|" + "|".join(":--" if kind in ("text", "name", "digest") else "--:" for _, _, kind in columns) + "|"
    return [head, rule, *("| " + " | ".join(map(_escape, _cells(row, columns))) + " |" for row in rows), ""]


def _escape(text: str) -> str:
    """Names and verdicts come from elsewhere: they may not open a column, a link or a tag."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    for character in "\\`|[]*":
        text = text.replace(character, "\\" + character)
    return text


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
