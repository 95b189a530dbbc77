"""The report: complete, readable, and robust against whatever is missing or hostile in it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from realm_core.evaluate import plots
from realm_core.evaluate.report import rich_table, table, write_report


def version(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "checkpoint": f"step-{step:06d}", "step": step, "index_digest": f"{step:064x}", "dagster_run_id": "run-1",
        "triggered_by": "sensor", "recall_vs_exact": 1.0, "recall_at_5": 0.4, "exact_match": 0.1, "age_steps": 30,
        "null_probability": 0.25, "live": False, "verdict": "promoted", **changes,
    }  # fmt: skip


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "seconds": 61.4,
        "index_versions": [
            version(0),
            version(30, live=True, recall_at_5=0.625),
            version(60, verdict="refused: recall"),
        ],
        "live": {"checkpoint": "step-000030", "index_digest": f"{30:064x}"},
        "swaps": [{"step": 3, "index_digest": "a"}, {"step": 41, "index_digest": "b"}],
        "qa": {"bm25": {"recall_at_5": 0.6, "recall_at_20": 0.7, "exact_match": None}, "realm": {"recall_at_5": 0.7}},
        "dagster_home": "somewhere",
        "mlflow": {"tracking_uri": "http://127.0.0.1:5000", "run_id": None},
    }


STEPS = [
    {"step": i, "loss": 3.0 - i / 50, "utility": 0.1, "null_probability": None, "index_age": i % 9} for i in range(40)
]


def test_the_report_is_written_for_programs_and_for_people(report: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert write_report(tmp_path, report, STEPS) == ["report.json", "report.md", "quality.png", "training.png"]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    text = (tmp_path / "report.md").read_text()
    assert "(quality.png)" in text
    assert "| ● | step-000030 |" in text
    assert "3 index versions · 2 swaps" in text
    for name in ("quality.png", "training.png"):
        image = (tmp_path / name).read_bytes()
        assert image.startswith(b"\x89PNG")
        assert len(image) > 10_000


def test_the_same_report_gives_the_same_bytes(report: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, report, STEPS)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_the_table_shows_every_version_and_marks_the_live_one(report: dict[str, Any]) -> None:
    lines = table(report).splitlines()
    (live,) = [line for line in lines if "●" in line]
    assert "step-000030" in live
    assert "0.625" in live
    assert sum("step-0000" in line for line in lines) == 4  # three versions and the closing line
    assert max(map(len, lines)) <= 120
    assert any(line.split() == ["bm25", "0.600", "0.700", "–"] for line in lines)


@pytest.mark.parametrize(
    "empty",
    [
        {},
        {"index_versions": [], "swaps": [], "qa": {}, "live": None, "mlflow": None},
        {
            "index_versions": [dict.fromkeys(version(0)), {}],
            "swaps": [{"step": None}],
            "qa": {"bm25": None},
            "seconds": None,
        },
        {"index_versions": [version(4, recall_at_5=float("nan"), exact_match=float("inf"))], "seconds": float("nan")},
        {"index_versions": [version(4, live=True)], "live": {}},
    ],
)
def test_anything_may_be_missing(empty: dict[str, Any], tmp_path: Path) -> None:
    assert {"report.json", "report.md"} <= set(
        write_report(tmp_path, empty, [{"step": None}, {"step": 1, "loss": float("nan")}])
    )
    assert "NaN" not in (tmp_path / "report.json").read_text()
    assert "index version" in table(empty)


def test_without_matplotlib_there_is_a_note_and_no_plot(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_report(tmp_path, report, STEPS) == ["report.json", "report.md"]
    assert "matplotlib is not installed" in (tmp_path / "report.md").read_text()


def test_names_from_elsewhere_cannot_write_markup(report: dict[str, Any], tmp_path: Path) -> None:
    report["index_versions"][0]["verdict"] = "<script>x</script> | [y](javascript:z)\n# head [red]"
    write_report(tmp_path, report)
    text = (tmp_path / "report.md").read_text()
    assert "<script>" not in text
    assert "[y](" not in text
    assert "\n# head" not in text
    assert "[red]" in table(report, width=200)


def test_the_rich_table_is_what_the_text_shows(report: dict[str, Any]) -> None:
    assert len(rich_table(report).renderables) == 3
