"""The installed command on real homes: processes, ports, and what they leave behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

from realm_core.artifacts.store import Store
from tests.orchestration import worlds

# A machine that others use too is many times slower than a quiet one: what is waited for has minutes.
PATIENCE = 600.0
# Training long enough for an index version or two to go live meanwhile.
SETTINGS = ("pretrain.steps=480", "pretrain.checkpoint_every=20", "pretrain.batch=16", "pretrain.keep=40")


@dataclass
class Home:
    """A home, the command line that works on it, and the processes that belong to it."""

    path: Path
    documents: Path
    questions: Path
    settings: Sequence[str] = SETTINGS
    started: list[subprocess.Popen] = field(default_factory=list)

    @property
    def store(self) -> Store:
        return Store(self.path)

    def main_job(self) -> list[str]:
        command = ["run", "--profile", "tiny", "--corpus", str(self.documents), "--questions", str(self.questions)]
        return [*command, *(f"--set={setting}" for setting in self.settings), "--json"]

    def start(self, *arguments: str) -> subprocess.Popen:
        """Start a command and do not wait; standard error goes to a file beside the home."""
        command = [sys.executable, "-m", "orchestration.cli", *arguments, "--home", str(self.path)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("REALM", "DAGSTER"))}
        with self.errors.open("ab") as errors:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                cwd=self.path.parent,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def run(self, *arguments: str, code: int = 0) -> str:
        """Run a command to its end; what it printed."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, self.errors.read_text()
        return output

    @property
    def errors(self) -> Path:
        return self.path.parent / "stderr.log"

    def last_error(self) -> str:
        return self.errors.read_text().splitlines()[-1]

    def wait_for(self, condition: Callable[[], Any], what: str, process: subprocess.Popen | None = None) -> Any:
        """The first true value of `condition`; fails early if `process` ends before."""
        deadline = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert process is None or process.poll() is None, f"{what}: {self.errors.read_text()}"
            assert time.monotonic() < deadline, f"{what}: {self.errors.read_text()}"
            time.sleep(0.2)
        return found

    def processes(self) -> list[str]:
        """Command lines of living processes that work on this home."""
        return [line for _, line in self._living()]

    def _living(self) -> Iterator[tuple[psutil.Process, str]]:
        for process in psutil.process_iter(["cmdline", "environ", "status"]):
            words, environment = process.info["cmdline"] or [], process.info["environ"] or {}
            if process.info["status"] == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                continue
            if environment.get("REALM_HOME") == str(self.path) or str(self.path) in words:
                yield process, f"{process.pid} {' '.join(words)}"

    def interrupt(self, process: subprocess.Popen) -> int:
        """Ctrl-C, as a terminal sends it to the command in front."""
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE)
        return process.returncode

    def instance(self) -> dg.DagsterInstance:
        return dg.DagsterInstance.from_config(str(self.path / "dagster"))

    def live(self) -> str | None:
        live = self.store.live()
        return live.index if live else None

    def end(self) -> None:
        """End whatever a failed test left."""
        for process, _ in list(self._living()):
            process.kill()
        for process in self.started:
            process.kill()
            process.wait()


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    documents, questions = worlds.sources(tmp_path)
    made = Home(tmp_path / "home", documents, questions)
    yield made
    made.end()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Home, dict[str, Any]]]:
    """A home in which the main job ran once, undisturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    documents, questions = worlds.sources(folder)
    made = Home(folder / "home", documents, questions)
    yield made, json.loads(made.run(*made.main_job()))
    made.end()


@pytest.fixture
def free_ports() -> tuple[int, int]:
    """Two ports of the loopback interface that nobody uses now."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]
