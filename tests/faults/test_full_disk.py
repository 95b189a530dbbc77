"""A disk that fills up: one clear error, nothing half written, and the same command works once there is room."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from realm_core.artifacts.manifest import Plan, open_artifact
from realm_core.artifacts.publish import building, read_json_lines
from realm_core.artifacts.store import Store, checkpoint_key
from realm_core.errors import ArtifactError, RealmError
from realm_core.index.snapshot import write_matrix
from realm_core.ports import NullSink
from realm_core.stages import corpus, ict, index, pretrain, reembed

pytestmark = pytest.mark.faults

FIRST, LATER = "r1-s0000000", "r1-s0000004"
SINK = NullSink()
PLAN = Plan(stage="index", code="1", config_digest="c" * 64)


class Disk:
    """A disk that can be made full for a while."""

    def __init__(self, folder: Path, mounted: bool) -> None:
        self.folder, self.mounted = folder, mounted

    @contextmanager
    def full(self, left: int) -> Iterator[None]:
        """So many bytes are free inside the block. Short blocks: the limit on files holds for this process' log too."""
        if self.mounted:
            ballast = self.folder / "ballast"
            ballast.write_bytes(bytes(max(0, shutil.disk_usage(self.folder).free - left)))
            yield
            ballast.unlink()
            return
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(params=["a small disk", "a limit on the size of files"])
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    """A real file system of a few MiB where we may mount one; and, for everybody, a limit of the operating system."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = request.param == "a small disk"
    if mounted:
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a file system is not allowed here")
    # Python ignores SIGXFSZ, so that a write over the limit is an error and no death; make sure of it.
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield Disk(folder, mounted)
    signal.signal(signal.SIGXFSZ, before)
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def no_room(act: Callable[[], Any]) -> str:
    """The message of the one error."""
    with pytest.raises(
        ArtifactError, match=r"disk full or quota reached, \d+ bytes free; free space and run again"
    ) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def visible(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name[0] != ".") if folder.exists() else []


def write_text(folder: Path) -> None:
    (folder / "file").write_text("x" * 3_000_000)


def write_numpy(folder: Path) -> None:
    write_matrix(folder / "file.npy", np.ones((3000, 256), dtype=np.float32))


def write_safetensors(folder: Path) -> None:
    save_file({"a": np.ones(800_000, dtype=np.float32)}, folder / "file.safetensors")


def write_parquet(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    noise = np.random.default_rng(0).standard_normal(400_000)
    pq.write_table(pa.table({"a": noise}), folder / "file.parquet", compression=None)


@pytest.mark.parametrize("write", [write_text, write_numpy, write_safetensors, write_parquet])
def test_whatever_writes_a_full_disk_is_one_clear_error_and_publishes_nothing(disk: Disk, write: Callable) -> None:
    def build() -> None:
        with building(disk.folder / "kind" / "a", PLAN) as made:
            write(made.folder)
            made.commit({})

    with disk.full(left=300_000):
        message = no_room(build)
    assert message.startswith(str(disk.folder / "kind")) and message.endswith("nothing was published")
    assert visible(disk.folder / "kind") == []
    assert not (disk.folder / "kind" / ".a.partial").exists()
    build()
    open_artifact(disk.folder / "kind" / "a")


def test_a_manifest_that_does_not_fit_publishes_nothing(disk: Disk) -> None:
    def build() -> None:
        with building(disk.folder / "kind" / "a", PLAN) as made:
            (made.folder / "file").write_text("x")
            with disk.full(left=0):
                made.commit({"facts": "x" * 300_000})

    no_room(build)
    assert visible(disk.folder / "kind") == []


def test_every_stage_says_so_and_works_once_there_is_room(disk: Disk, tiny_home: Store) -> None:
    config = tiny_home.config()
    checkpoint, blocks = tiny_home.path("checkpoints", LATER), tiny_home.path("corpus", "v0001")
    snapshot = tiny_home.path("snapshots", LATER)
    out = disk.folder / "out"
    stages: dict[str, Callable[[], Any]] = {
        "corpus": lambda: corpus.run(config, source=tiny_home.source("corpus"), out=out / "corpus", sink=SINK),
        "ict": lambda: ict.run(config, corpus=blocks, out=out / "ict", sink=SINK),
        "reembed": lambda: reembed.run(config, checkpoint=checkpoint, corpus=blocks, out=out / "reembed", sink=SINK),
        "index": lambda: index.run(
            config, snapshot=snapshot, checkpoint=checkpoint, corpus=blocks, out=out / "index", sink=SINK
        ),
    }
    for stage in stages.values():
        with disk.full(left=8_000):
            no_room(stage)
        assert visible(out) == []
    whole = {
        "corpus": tiny_home.manifest("corpus", "v0001"),
        "ict": tiny_home.manifest("ict", "v0001"),
        "reembed": tiny_home.manifest("snapshots", LATER),
        "index": tiny_home.manifest("indexes", LATER),
    }
    assert {name: stage().digest for name, stage in stages.items()} == {
        name: made.digest for name, made in whole.items()
    }


def test_a_trainer_on_a_full_disk_ends_in_one_line_and_resumes_to_the_same_end(
    disk: Disk, tiny_home: Store, copy_home: Callable
) -> None:
    def train(store: Store) -> None:
        pretrain.run(
            store.config(),
            store=store,
            training_run="r1",
            corpus=store.newest("corpus"),
            start=store.newest("ict"),
            sink=SINK,
        )

    whole = copy_home("whole")
    train(whole)
    store = Store.open(Path(shutil.copytree(tiny_home.home, disk.folder / "home")))
    with disk.full(left=100_000), pytest.raises(RealmError, match="disk full"):
        train(store)
    assert store.names("checkpoints")[-1] == LATER
    train(store)
    assert store.names("checkpoints")[-1] == checkpoint_key("r1", 12)
    for key in store.names("checkpoints"):
        assert store.manifest("checkpoints", key).digest == whole.manifest("checkpoints", key).digest


def test_the_pointer_stays_whole_on_a_full_disk(disk: Disk, tiny_home: Store) -> None:
    store = Store.open(Path(shutil.copytree(tiny_home.home, disk.folder / "home")))
    before = (store.home / "live.json").read_text("utf-8")
    with disk.full(left=0), pytest.raises(ArtifactError, match="disk full"):
        store.move_live(LATER, "digest", "checkpoint", "x" * 1_000_000, None)
    assert (store.home / "live.json").read_text("utf-8") == before
    store.move_live(LATER, "digest", "checkpoint", "now it fits", None)
    assert store.require_live().reason == "now it fits"
    rows = read_json_lines(store.home / "live.history.jsonl")
    assert [row["reason"] for row in rows] == ["first", "now it fits"]
    assert [row["generation"] for row in rows] == [1, 2]


def test_a_home_is_not_half_made_on_a_full_disk(disk: Disk, tiny_home: Store, tiny_sources: dict[str, str]) -> None:
    with disk.full(left=0):
        no_room(lambda: Store.create(disk.folder / "home", tiny_home.config(), tiny_sources, "tiny"))
    store = Store.create(disk.folder / "home", tiny_home.config(), tiny_sources, "tiny")
    assert json.loads((store.home / "home.json").read_text("utf-8"))["profile"] == "tiny"


def demo(home: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "orchestration.cli", "demo", "--profile", "tiny", "--home", str(home)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_the_main_job_on_a_disk_without_room_or_writing_is_one_line(disk: Disk) -> None:
    if not disk.mounted:
        pytest.skip("needs a file system of its own")
    for left in (30_000, 150_000):
        with disk.full(left):
            done = demo(disk.folder / f"home{left}")
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 2
        assert last.startswith("error: ")
        assert "disk full or quota reached" in last or "cannot be written" in last  # SQLite has several words for it
        assert "Traceback" not in done.stderr
    subprocess.run(["mount", "-o", "remount,ro", str(disk.folder)], check=True)
    done = demo(disk.folder / "home30000")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "cannot be written (Read-only file system)" in done.stderr
