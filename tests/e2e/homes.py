"""The installed command on a real home: its processes, its ports, and what they leave behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import psutil

from realm_core.artifacts.store import Store

# A machine that others use too is many times slower than a quiet one: what is waited for has minutes.
PATIENCE = 600.0
# The trainer never gets far ahead of its index, so that a few versions go live meanwhile.
SETTINGS = (
    "pretrain.steps=80",
    "pretrain.checkpoint_every=20",
    "pretrain.max_index_age=40",
    "pretrain.keep=40",
    "refresh.backlog=newest",
)


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
        return [line for _, line in self.living()]

    def living(self) -> Iterator[tuple[psutil.Process, str]]:
        """Living processes that work on this home, and their command lines."""
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
        for process, _ in list(self.living()):
            process.kill()
        for process in self.started:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str, body: dict[str, Any] | None = None) -> Callable[[], str | None]:
    """What a server says, None as long as it is not there."""

    def ask() -> str | None:
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return str(reply.read().decode())
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return None

    return ask
