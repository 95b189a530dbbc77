"""The list of index versions for a terminal."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from realm_core.evaluate.versions import when

_SHARES = (("exact", "recall_vs_exact"), ("R@5", "recall_at_5"), ("EM", "exact_match"))


def table(versions: Sequence[Mapping[str, Any]], width: int = 250) -> str:
    """Plain text as wide as it must be, some 125 columns; `overlap` and `cosine` are the drift against the version before."""
    view = Table(box=box.SIMPLE_HEAD)
    for heading in ("index", "state", "digest"):
        view.add_column(heading, no_wrap=True)
    for heading in ("step", *(heading for heading, _ in _SHARES), "overlap", "cosine"):
        view.add_column(heading, justify="right", no_wrap=True)
    for heading in ("made", "dagster run", "verdict"):
        view.add_column(heading, no_wrap=True)
    for version in versions:
        drift = version["drift"] or {}
        state = version["state"] + ("" if version["bytes_kept"] else " (dropped)")
        view.add_row(
            version["index"],
            state,
            version["index_digest"][:8],
            str(version["step"]),
            *(_share(version[key]) for _, key in _SHARES),
            _share(drift.get("top_k_overlap")),
            _share(drift.get("cosine_mean")),
            when(version["made_at"])[5:],
            (version["dagster_run_id"] or "–")[:8],
            version["verdict"],
        )
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(view)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
