"""Growth that is killed, or meets a full or read-only disk: the old version answers, and the same command finishes it."""

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from realm_core.artifacts.store import Store
from realm_core.corpus.shards import Corpus
from realm_core.corpus.sources import Source
from realm_core.ports import NullSink
from realm_core.stages import grow, refresh
from tests.faults.test_full_disk import Disk, disk, no_room

__all__ = ["disk"]
pytestmark = pytest.mark.faults
FIRST = "r1-s0000000"
NEW = [
    {"id": f"new {number}", "title": f"Quorvane {number}", "text": "A glass lighthouse. It is guarded."}
    for number in range(3)
]

ADD = """
import os, signal, sys
from realm_core import cli
from realm_core.corpus import growth, writer
from realm_core.stages import promote, reembed

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

moment = sys.argv.pop(1)
if moment == "while packing":
    writer._write_shard = die
elif moment == "before embedding":
    reembed.run = die
elif moment == "while embedding":
    reembed.embed_blocks = die
elif moment == "before the promotion":
    promote.run = die
cli.main()
"""


@pytest.fixture
def new(tmp_path: Path) -> Path:
    path = tmp_path / "new.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in NEW))
    return path


@pytest.mark.parametrize(
    ("moment", "versions"),
    [
        ("while packing", 1),
        ("before embedding", 2),
        ("while embedding", 2),
        ("before the promotion", 2),
    ],
)
def test_a_killed_add_leaves_the_old_version_live_and_the_same_command_finishes_it(
    home: Store, new: Path, start_python: Callable, realm: Callable, moment: str, versions: int
) -> None:
    before = home.live()
    process = start_python(ADD, moment, "corpus", "add", new, "--home", home.home)
    _, problem = process.communicate()
    assert process.returncode == -signal.SIGKILL, problem
    assert home.live() == before and len(home.names("corpus")) == versions
    code, out, err = realm("corpus", "add", new, "--home", home.home, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["corpus"], told["index"]) == ("v0002", f"{FIRST}+v0002")
    assert len(Corpus.open(home.newest("corpus"))) == told["blocks"]
    assert not list((home.home / "corpus").glob(".*.partial")) and not list(
        (home.home / "snapshots").glob(".*.partial")
    )


def test_on_a_full_disk_growth_is_one_line_and_works_once_there_is_room(
    disk: Disk, tiny_home: Store, new: Path
) -> None:
    store = Store.open(Path(shutil.copytree(tiny_home.home, disk.folder / "home")))
    before, config = store.live(), store.config()
    add, sink = grow.Add(source=Source.find(new)), NullSink()
    for _ in range(2):
        with disk.full(left=1_000):
            no_room(lambda: grow.apply(config, store=store, change=add, sink=sink))
        assert store.names("corpus") == ["v0001"]
    grow.apply(config, store=store, change=add, sink=sink)
    with disk.full(left=1_000):
        no_room(lambda: refresh.over_newest_corpus(config, store=store, sink=sink, reason="test"))
    assert store.live() == before
    outcome = refresh.over_newest_corpus(config, store=store, sink=sink, reason="test")
    assert outcome is not None and outcome[0].index == f"{FIRST}+v0002"


@pytest.mark.parametrize("disk", ["a small disk"], indirect=True)
def test_on_a_read_only_disk_growth_is_one_line(disk: Disk, tiny_home: Store, new: Path, realm: Callable) -> None:
    shutil.copytree(tiny_home.home, disk.folder / "home")
    remount = ["mount", "-o", "remount,ro", str(disk.folder)]
    if subprocess.run(remount, capture_output=True, check=False).returncode != 0:
        pytest.skip("remounting is not allowed here")
    code, _, err = realm("corpus", "add", new, "--home", disk.folder / "home")
    assert code == 2 and err.count("\n") == 1 and "cannot be written" in err
