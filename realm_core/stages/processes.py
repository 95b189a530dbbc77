"""Starting and joining the processes of one training stage.

Either torchrun started them all, on one machine or many, and each of them runs the stage; or the stage runs in one process
with `runtime.processes` above 1 and starts the others here. That one process then keeps what it holds (a lease, a tracker)
and publishes alone. The others live no longer than it does, and if one of them dies the stage ends with its last words.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from realm_core.config import Config, RuntimeConfig
from realm_core.errors import ConfigError, RealmError
from realm_core.model.device import device_kind
from realm_core.model.world import World
from realm_core.params import config_from
from realm_core.ports import NullSink

_TIMEOUT = timedelta(minutes=30)  # longest wait for the others: a checkpoint is written, a large index opened
_LAST_WORDS_SECONDS = 10.0


def launched() -> bool:
    """Whether the processes of the stage are there already."""
    return dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def world_of(config: Config, stage: str, **job: Any) -> Iterator[World]:
    """The processes that share a stage; `stage` and `job` (JSON values) are what the others run: see `main`.

    Raises RealmError if one of them ends before its time.
    """
    runtime = config.runtime
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", dist.get_rank())))
    elif launched():
        dist.init_process_group(_backend(runtime), timeout=_TIMEOUT)
        world = World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
        try:
            yield world
        except RuntimeError as error:
            if _is_silence(error):
                raise RealmError(
                    f"{world}: another process is gone; its own message says why, run the stage again"
                ) from error
            raise
        finally:
            dist.destroy_process_group()
    elif runtime.processes > 1:
        with _Peers(runtime, {"stage": stage, "config": config.model_dump(mode="json"), **job}) as world:
            yield world
    else:
        yield World()


class _Peers:
    """The other processes of a stage that this process leads."""

    def __init__(self, runtime: RuntimeConfig, job: Mapping[str, Any]) -> None:
        self.runtime, self.job, self.size = runtime, job, runtime.processes
        self.started: list[subprocess.Popen[str]] = []
        self.done = threading.Event()

    def __enter__(self) -> World:
        self.folder = tempfile.TemporaryDirectory(prefix="realm-processes-")
        try:
            for rank in range(1, self.size):
                self.started.append(self._start(rank))
            self._wait_until_ready()
            _join(self.runtime, Path(self.folder.name), 0, self.size)
        except BaseException:
            self._end()
            raise
        threading.Thread(target=self._watch, daemon=True).start()
        return World(0, self.size, 0)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.done.set()
        try:
            if kind is None:
                self._require_good_end()
            elif isinstance(error, RuntimeError) and _is_silence(error):
                self._require_good_end(_LAST_WORDS_SECONDS)
                raise RealmError(f"{World(0, self.size)}: another process is gone; run the stage again") from error
        finally:
            self._end()

    def _start(self, rank: int) -> "subprocess.Popen[str]":
        with self._log(rank).open("w") as log:
            peer = subprocess.Popen(
                [sys.executable, "-m", "realm_core.stages.processes"],
                stdin=subprocess.PIPE,  # never closed before the end: it is how a peer notices that this process died
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,  # a terminal's Ctrl-C is for the process that leads
            )
        assert peer.stdin is not None
        place = {"folder": self.folder.name, "rank": rank, "size": self.size}
        with suppress(BrokenPipeError):  # it ended already; the rendezvous tells
            peer.stdin.write(json.dumps({**self.job, "place": place}) + "\n")
            peer.stdin.flush()
        return peer

    def _wait_until_ready(self) -> None:
        """A process that cannot even start says so now, not at the end of a rendezvous."""
        waiting = list(range(1, self.size))
        while waiting := [rank for rank in waiting if not _ready(Path(self.folder.name), rank).exists()]:
            if problem := self._problem():
                raise RealmError(problem)
            time.sleep(0.05)

    def _log(self, rank: int) -> Path:
        return Path(self.folder.name) / f"process-{rank}.log"

    def _watch(self) -> None:
        """End a stage that waits for a dead process: not every collective notices by itself."""
        while not self.done.wait(1.0):
            if (problem := self._problem()) and not self.done.wait(_LAST_WORDS_SECONDS):
                print(f"error: {problem}", file=sys.stderr, flush=True)
                os._exit(2)

    def _problem(self) -> str | None:
        for rank, peer in enumerate(self.started, start=1):
            if peer.poll() not in (None, 0):
                said = self._log(rank).read_text(encoding="utf-8", errors="replace").strip()
                if peer.returncode != 2:  # not an operator's error: where it happened matters
                    print(said, file=sys.stderr, flush=True)
                words = said.splitlines()[-1].removeprefix("error: ") if said else "without a word"
                return f"process {rank} of {self.size} ended with code {peer.returncode}: {words}; run the stage again"
        return None

    def _require_good_end(self, patience: float = _TIMEOUT.total_seconds()) -> None:
        for peer in self.started:
            with suppress(subprocess.TimeoutExpired):
                peer.wait(patience)
        if problem := self._problem():
            raise RealmError(problem)

    def _end(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        for peer in self.started:
            if peer.stdin is not None:
                with suppress(BrokenPipeError):
                    peer.stdin.close()
            peer.kill()
            peer.wait()
        self.folder.cleanup()


def _is_silence(error: RuntimeError) -> bool:
    """Whether a collective failed because its other end is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def _ready(folder: Path, rank: int) -> Path:
    return folder / f"process-{rank}.ready"


def _join(runtime: RuntimeConfig, folder: Path, rank: int, size: int) -> None:
    names = {name for _, name in socket.if_nameindex()}
    if "lo" in names:  # all on this machine: nothing listens to the network
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(folder / "rendezvous"), size)
    dist.init_process_group(_backend(runtime), store=store, rank=rank, world_size=size, timeout=_TIMEOUT)


def _backend(runtime: RuntimeConfig) -> str:
    kind = device_kind(runtime)
    if kind == "xla":
        raise ConfigError("runtime.device=xla: trains in one process; set runtime.device=cpu or cuda for several")
    return "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"


def main() -> int:
    """A process that helps another one: its job stands on the first line of standard input."""
    from realm_core.artifacts.store import Store
    from realm_core.stages import ict, pretrain

    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_leader, daemon=True).start()
    config, place = config_from(job["config"], where="settings of the leading process"), job["place"]
    corpus, sink = Path(job["corpus"]), NullSink()
    _ready(Path(place["folder"]), place["rank"]).touch()
    _join(config.runtime, Path(place["folder"]), place["rank"], place["size"])
    try:
        if job["stage"] == "ict":
            ict.run(config, corpus=corpus, out=Path(job["out"]), sink=sink)
        else:
            names = {"training_run": job["training_run"], "until": job["until"]}
            store, start = Store.open(Path(job["home"])), Path(job["start"])
            pretrain.run(config, store=store, corpus=corpus, start=start, sink=sink, **names)
    except RealmError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    dist.destroy_process_group()
    return 0


def _end_with_the_leader() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
