"""What the library asks of the outside world. Trackers, registries and clocks are plugged in by the caller."""

import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from realm_core.errors import ArtifactError

Clock = Callable[[], float]  # seconds since the epoch
Metrics = Mapping[str, float | int]


@runtime_checkable
class MetricSink(Protocol):
    """Receives measurements while a stage runs. An implementation must never raise into the stage."""

    def log(self, step: int, values: Metrics) -> None: ...


@dataclass
class MemorySink:
    """Keeps the rows in memory."""

    rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def log(self, step: int, values: Metrics) -> None:
        self.rows.append((step, dict(values)))


class JsonLinesSink:
    """Appends one JSON object a row to a file, so that a run can be read while it goes on.

    Raises ArtifactError at once if the file cannot be written. A disk that fills up later costs rows, not the run.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be written ({error.strerror}); choose another file") from None
        self.path, self.warned = path, False

    def log(self, step: int, values: Metrics) -> None:
        line = json.dumps({"step": step, **values}) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            if not self.warned:
                print(f"warning: {self.path}: rows are lost from step {step} on ({error.strerror})", file=sys.stderr)
            self.warned = True


class FanOutSink:
    """Hands every row to several sinks."""

    def __init__(self, *sinks: MetricSink) -> None:
        self.sinks = sinks

    def log(self, step: int, values: Metrics) -> None:
        for sink in self.sinks:
            sink.log(step, values)


class NullSink:
    """Drops everything."""

    def log(self, step: int, values: Metrics) -> None:
        return None


@runtime_checkable
class TextStream(Protocol):
    """What progress is written to; `sys.stderr` is one."""

    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...
    def isatty(self) -> bool: ...


@dataclass
class Progress:
    """Rate and time left: a rewritten line on a terminal, a plain line every `every_seconds` in a log."""

    LINE: ClassVar = re.compile(r"[^:]+: \d+/\d+ \w+, [\d.]+/s, (\d+|inf) s left.*")  # what such a line looks like

    what: str
    total: int
    unit: str = "steps"
    stream: TextStream = field(default_factory=lambda: sys.stderr)
    every_seconds: float = 10.0
    clock: Clock = time.monotonic

    def __post_init__(self) -> None:
        self.began = self.shown = self.clock()

    def update(self, done: int, note: str = "") -> None:
        now = self.clock()
        tty = self.stream.isatty()
        last = done >= self.total
        if not last and now - self.shown < (0.2 if tty else self.every_seconds):
            return
        self.shown = now
        rate = done / max(now - self.began, 1e-9)
        left = (self.total - done) / rate if rate > 0 else float("inf")
        line = f"{self.what}: {done}/{self.total} {self.unit}, {rate:.1f}/s, {left:.0f} s left {note}".rstrip()
        self.stream.write(f"\r\x1b[2K{line}" if tty else line + "\n")
        if tty and last:
            self.stream.write("\n")
        self.stream.flush()


@runtime_checkable
class Tracker(Protocol):
    """An experiment tracker. Like a sink, it never raises into the work it observes."""

    def sink(self, run: str) -> MetricSink:
        """Where the metrics of training run `run` go."""
        ...

    def tag(self, run: str, tags: Mapping[str, str]) -> None:
        """Tie the tracked run to digests and to runs elsewhere."""
        ...

    def register(self, run: str, version: Mapping[str, str]) -> None:
        """Enter an index version, `index` and `index_digest` with what else is known, in the model registry; it becomes
        the candidate there."""
        ...

    def champion(self, run: str, version: Mapping[str, str]) -> None:
        """Enter the version if it is not there yet; the registry's champion becomes whatever is live."""
        ...

    def finish(self, run: str, status: str = "FINISHED") -> None:
        """Training has ended: FINISHED, FAILED, or KILLED if it can go on later."""
        ...

    def url(self, run: str) -> str | None:
        """Where a person finds the tracked run; None while the tracker cannot be reached."""
        ...
