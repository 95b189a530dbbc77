"""Plots of a run, drawn without a display and without matplotlib's global state."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_INK, _MUTED, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_RECALL, _MATCH, _REFUSED, _EXTRA = "#0b6e99", "#c2570c", "#b42318", "#6b4fa0"
_SERIES = (("recall_at_5", "recall@5", _RECALL), ("exact_match", "exact match", _MATCH))
_PANELS = (
    ("loss", "loss (nats a mask)", _INK),
    ("utility", "retrieval utility (nats)", _RECALL),
    ("null_probability", "null document p", _EXTRA),
    ("index_age", "index age (steps)", _MATCH),
)
_DPI = 150


def plots_available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_quality(path: Path, report: Mapping[str, Any]) -> bool:
    """Recall@5 and exact match of every index version over encoder steps; a vertical line where a version went live.

    Filled points are versions that passed the gate, hollow ones were refused. Returns False, without a file, where
    there is nothing to show.
    """
    versions = [row for row in report.get("index_versions") or [] if _value(row.get("step")) is not None]
    versions.sort(key=lambda row: float(row["step"]))
    shown = [series for series in _SERIES if any(_value(row.get(series[0])) is not None for row in versions)]
    if not shown:
        return False
    figure, (axes,) = _figure(1, height=4.2)
    swaps = _swap_steps(report.get("swaps") or [])
    for key, label, colour in shown:
        _draw_series(axes, versions, key, label, colour)
    top = max(v for v in (_value(row.get(key)) for row in versions for key, _, _ in shown) if v is not None)
    top = max([top, *_draw_baselines(axes, report, [key for key, _, _ in shown])])
    axes.set_ylim(0, min(1.02, max(0.1, 1.18 * top)))
    if any(_refused(row) for row in versions):
        axes.scatter([], [], facecolor="white", edgecolor=_MUTED, s=40, linewidth=1.6, label="refused by the gate")
    _mark_swaps(axes, swaps, label="index swap")
    _share_axis(axes)
    axes.set_xlabel("optimizer step", color=_INK)
    axes.set_title("What each index version is worth", loc="left", color=_INK, fontweight="bold")
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8.5, handlelength=1.6, columnspacing=1.4)
    _save(figure, path)
    return True


def draw_training(path: Path, steps: Sequence[Mapping[str, Any]], swaps: Sequence[Mapping[str, Any]] = ()) -> bool:
    """Loss, retrieval utility, null document probability and index age over steps, one panel each; swaps as lines.

    The pale line is the single step, the strong one a running mean. Returns False, without a file, for no steps.
    """
    rows = [row for row in steps if _value(row.get("step")) is not None]
    panels = [panel for panel in _PANELS if any(_value(row.get(panel[0])) is not None for row in rows)]
    if not panels:
        return False
    figure, all_axes = _figure(len(panels), height=1.1 + 1.55 * len(panels))
    for axes, (key, label, colour) in zip(all_axes, panels, strict=True):
        x, y = _points(rows, key)
        if key == "index_age":
            axes.step(x, y, where="post", color=colour, linewidth=1.6)
            axes.set_ylim(bottom=0)
        else:
            axes.plot(x, y, color=colour, alpha=0.25, linewidth=1)
            axes.plot(x, _smooth(y), color=colour, linewidth=1.8)
        if key == "utility":
            axes.axhline(0, color=_MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_title(label, loc="left", fontsize=9.5, color=_INK, pad=4)
        _mark_swaps(axes, _swap_steps(swaps), label=None)
    all_axes[-1].set_xlabel("optimizer step" + ("   (vertical lines: index swaps)" if swaps else ""), color=_INK)
    _save(figure, path)
    return True


def draw_drift(path: Path, report: Mapping[str, Any]) -> bool:
    """What every index version kept of the one before: top-k overlap, and how far its vectors turned; by encoder step.

    Returns False, without a file, where no drift was measured.
    """
    rows = [
        {**row["drift"], "step": row.get("step"), "turned": 1 - cosine}
        for row in report.get("index_versions") or []
        if row.get("drift") and (cosine := _value(row["drift"].get("cosine_mean"))) is not None
    ]
    rows.sort(key=lambda row: _value(row["step"]) or 0)
    x, overlap = _points(rows, "top_k_overlap")
    if not len(x):
        return False
    figure, (above, below) = _figure(2, height=4.4)
    above.plot(x, overlap, color=_RECALL, linewidth=2, marker="o", markersize=5)
    above.set_ylim(0, 1.04)
    above.set_title("Top-k overlap with the version before, on the probe set", loc="left", fontsize=9.5, color=_INK)
    x, turned = _points(rows, "turned")
    below.plot(x, turned, color=_MATCH, linewidth=2, marker="o", markersize=5)
    below.set_ylim(0, max(1e-6, 1.15 * float(turned.max())))
    below.set_title("How far block vectors turned: 1 - mean cosine", loc="left", fontsize=9.5, color=_INK)
    for axes in (above, below):
        _mark_swaps(axes, _swap_steps(report.get("swaps") or []), label=None)
    below.set_xlabel("optimizer step" + ("   (vertical lines: index swaps)" if report.get("swaps") else ""), color=_INK)
    _save(figure, path)
    return True


def _draw_series(axes: Any, versions: Sequence[Mapping[str, Any]], key: str, label: str, colour: str) -> None:
    x, y = _points(versions, key)
    axes.plot(x, y, color=colour, linewidth=2, label=label, zorder=3)
    passed = np.array([not _refused(row) for row in versions if _value(row.get(key)) is not None])
    axes.scatter(x[passed], y[passed], s=36, color=colour, zorder=4)
    hollow = {"facecolor": "white", "s": 40, "linewidth": 1.6, "zorder": 4}
    axes.scatter(x[~passed], y[~passed], edgecolor=colour, **hollow)
    middle = (float(versions[0]["step"]) + float(versions[-1]["step"])) / 2
    for row in versions:
        value = _value(row.get(key))
        side, shift = ("right", -9) if float(row["step"]) >= middle else ("left", 9)
        if row.get("live") and value is not None:
            axes.scatter([row["step"]], [value], s=150, facecolor="none", edgecolor=colour, linewidth=1.4, zorder=5)
            axes.annotate(
                f"live {value:.1%}", (row["step"], value), (shift, 9), textcoords="offset points", ha=side, va="bottom",
                color=colour, fontsize=9, fontweight="bold",
                bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
            )  # fmt: skip


def _draw_baselines(axes: Any, report: Mapping[str, Any], keys: Sequence[str]) -> list[float]:
    """BM25 as dashed lines in the colour of the measure; returns their heights."""
    bm25 = (report.get("qa") or {}).get("bm25") or {}
    heights = []
    for key, label, colour in _SERIES:
        value = _value(bm25.get(key))
        if key in keys and value is not None:
            axes.axhline(value, color=colour, linewidth=1.1, linestyle=(0, (5, 3)), label=f"BM25 {label}", zorder=2)
            heights.append(value)
    return heights


def _refused(row: Mapping[str, Any]) -> bool:
    verdict = str(row.get("verdict") or "").lower()
    return not row.get("live") and any(word in verdict for word in ("refuse", "reject", "fail", "block"))


def _mark_swaps(axes: Any, steps: Sequence[float], label: str | None) -> None:
    for i, step in enumerate(steps):
        axes.axvline(
            step, color=_MUTED, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1, label=label if i == 0 else None
        )


def _swap_steps(swaps: Sequence[Mapping[str, Any]]) -> list[float]:
    found = [_value(swap.get("step")) for swap in swaps]
    return sorted({step for step in found if step is not None})


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(_value(row.get("step")), _value(row.get(key))) for row in rows]
    kept = [(x, y) for x, y in pairs if x is not None and y is not None]
    return np.array([x for x, _ in kept]), np.array([y for _, y in kept])


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a twentieth of the run; shorter at both ends, so nothing is invented there."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _figure(panels: int, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, height), dpi=_DPI, layout="constrained", facecolor="white")
    grid = figure.subplots(panels, 1, sharex=True, squeeze=False)
    axes = [row[0] for row in grid]
    for each in axes:
        each.grid(axis="y", color=_GRID, linewidth=0.9)
        each.set_axisbelow(True)
        each.tick_params(colors=_MUTED, labelcolor=_INK, length=3, labelsize=9)
        for side in ("top", "right", "left"):
            each.spines[side].set_visible(False)
        each.spines["bottom"].set_color(_MUTED)
        each.locator_params(axis="y", nbins=5)
        each.margins(x=0.03)
    return figure, axes


def _share_axis(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.set_ylabel("share of dev questions", color=_INK)


def _save(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    # The writer's own name and version would make the same run give other bytes elsewhere.
    figure.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})


def _value(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        return None
    return float(value)
