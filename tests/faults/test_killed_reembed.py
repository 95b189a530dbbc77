"""A re-embedding pass that is killed goes on at the shard it was in."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from realm_core.artifacts.store import Store
from realm_core.ports import NullSink
from realm_core.stages import reembed

pytestmark = pytest.mark.faults

LATER = "r1-s0000004"

PASS = """
import os, signal, sys
from pathlib import Path
from realm_core.artifacts.store import Store
from realm_core.ports import NullSink
from realm_core.stages import reembed

store, out, moment = Store.open(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
embed, write = reembed.embed_blocks, reembed.write_matrix
begun = []

def embed_blocks(*arguments, **options):
    begun.append(1)
    if moment == "while embedding" and len(begun) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return embed(*arguments, **options)

def write_matrix(path, vectors):
    write(path, vectors)
    if moment == "half a shard" and len(begun) == 2:
        path.write_bytes(path.read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)

def report(self, digests):
    os.kill(os.getpid(), signal.SIGKILL)

reembed.embed_blocks, reembed.write_matrix = embed_blocks, write_matrix
if moment == "before the manifest":
    reembed._Pass.report = report
reembed.run(
    store.config(),
    checkpoint=store.path("checkpoints", "r1-s0000004"),
    corpus=store.path("corpus", "v0001"),
    out=out,
    sink=NullSink(),
)
"""


@pytest.mark.parametrize(("moment", "kept"), [("while embedding", 1), ("half a shard", 1), ("before the manifest", 2)])
def test_finished_shards_of_a_killed_pass_are_not_embedded_again(
    tiny_home: Store,
    tmp_path: Path,
    start_python: Callable,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    kept: int,
) -> None:
    out = tmp_path / "snapshots" / LATER
    process = start_python(PASS, tiny_home.home, out, moment)
    _, problem = process.communicate()
    assert process.returncode == -signal.SIGKILL, problem
    assert [entry.name for entry in out.parent.iterdir() if entry.name[0] != "."] == []
    scratch = out.parent / f".{LATER}.partial"
    before = {path.name: path.stat().st_mtime_ns for path in scratch.glob("*.npy")}

    real, embedded = reembed.embed_blocks, []

    def count(*arguments: object, **options: object) -> object:
        embedded.append(arguments[2])
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(reembed, "embed_blocks", count)
    made = reembed.run(
        tiny_home.config(),
        checkpoint=tiny_home.path("checkpoints", LATER),
        corpus=tiny_home.path("corpus", "v0001"),
        out=out,
        sink=NullSink(),
    )
    assert made.record["resumed_shards"] == kept
    assert len(embedded) == 2 - kept
    assert made.digest == tiny_home.manifest("snapshots", LATER).digest
    assert (out / "shard-000.npy").stat().st_mtime_ns == before["shard-000.npy"]
    assert not scratch.exists()
