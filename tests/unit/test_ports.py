"""Sinks and progress: measurements never end the work they describe."""

import io
import json
from pathlib import Path

import pytest

from realm_core.errors import ArtifactError
from realm_core.ports import FanOutSink, JsonLinesSink, MemorySink, MetricSink, NullSink, Progress


def test_every_sink_is_a_metric_sink(tmp_path: Path) -> None:
    for sink in (MemorySink(), JsonLinesSink(tmp_path / "a.jsonl"), FanOutSink(), NullSink()):
        assert isinstance(sink, MetricSink)


def test_rows_reach_every_sink_of_a_fan_out(tmp_path: Path) -> None:
    memory, path = MemorySink(), tmp_path / "deep" / "metrics.jsonl"
    sink = FanOutSink(memory, JsonLinesSink(path), NullSink())
    sink.log(3, {"loss": 0.5})
    sink.log(4, {"loss": 0.25})
    assert memory.rows == [(3, {"loss": 0.5}), (4, {"loss": 0.25})]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 3, "loss": 0.5},
        {"step": 4, "loss": 0.25},
    ]


def test_a_metrics_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "metrics.jsonl", tmp_path):
        with pytest.raises(ArtifactError, match=r"cannot be written .*; choose another file"):
            JsonLinesSink(path)


def test_a_metrics_file_that_breaks_later_warns_once_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = JsonLinesSink(tmp_path / "metrics.jsonl")
    sink.path.unlink()
    sink.path.mkdir()
    for step in (5, 6):
        sink.log(step, {"loss": 1.0})
    assert capsys.readouterr().err.count("rows are lost from step 5 on") == 1


class Stream(io.TextIOWrapper):
    """A text stream in memory."""

    def __init__(self, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", newline="")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def text(self) -> str:
        return self.buffer.getvalue().decode()  # type: ignore[attr-defined]


def test_progress_in_a_log_is_a_plain_line_now_and_then_and_at_the_end() -> None:
    now = [0.0]
    stream = Stream()
    bar = Progress("train", 100, stream=stream, every_seconds=10.0, clock=lambda: now[0])
    for done in range(1, 101):
        now[0] += 0.5
        bar.update(done, "loss 0.5")
    lines = stream.text().splitlines()
    assert lines[0] == "train: 20/100 steps, 2.0/s, 40 s left loss 0.5"
    assert lines[-1] == "train: 100/100 steps, 2.0/s, 0 s left loss 0.5"
    assert len(lines) == 5
    assert all(Progress.LINE.fullmatch(line) for line in lines)


def test_progress_on_a_terminal_rewrites_one_line() -> None:
    now = [0.0]
    stream = Stream(terminal=True)
    bar = Progress("train", 3, stream=stream, clock=lambda: now[0])
    for done in (1, 2, 3):
        now[0] += 1
        bar.update(done)
    assert stream.text().count("\r") == 3
    assert stream.text().count("\n") == 1


def test_progress_survives_a_total_of_nothing_and_a_clock_that_stands() -> None:
    stream = Stream()
    Progress("train", 0, stream=stream, clock=lambda: 1.0).update(0)
    assert stream.text().startswith("train: 0/0 steps")
    assert Progress.LINE.fullmatch(stream.text().strip())
