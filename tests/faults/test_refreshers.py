"""Refreshers that meet: each other, checkpoints that come faster, retention, and vectors that are not what they should be."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file, save_file

from realm_core.artifacts.manifest import MANIFEST, file_sha256, read_manifest
from realm_core.artifacts.store import PRUNED, Store, checkpoint_key
from realm_core.errors import ArtifactError, GateError
from realm_core.index.version import IndexVersion, open_version
from realm_core.model.bundle import EMBEDDER
from realm_core.model.device import resolve
from realm_core.ports import NullSink
from realm_core.stages import index, promote, qualify, reembed

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

FIRST, LATER = "r1-s0000000", "r1-s0000004"

# Embeds, tells after every shard, and waits for a line before it goes on.
REFRESHER = """
import sys
from pathlib import Path
from realm_core.artifacts.store import Store
from realm_core.errors import RealmError
from realm_core.ports import NullSink
from realm_core.stages import reembed

store, key, patient = Store.open(Path(sys.argv[1])), sys.argv[2], sys.argv[3] == "patient"
embed = reembed.embed_blocks

def embed_blocks(*arguments, **options):
    made = embed(*arguments, **options)
    if patient:
        print("shard", flush=True)
        sys.stdin.readline()
    return made

reembed.embed_blocks = embed_blocks
try:
    made = reembed.run(
        store.config(),
        checkpoint=store.path("checkpoints", key),
        corpus=store.newest("corpus"),
        out=store.path("snapshots", key),
        sink=NullSink(),
    )
    print("made", made.digest, made.record["resumed_shards"], flush=True)
except RealmError as problem:
    print("refused", problem, flush=True)
"""


@pytest.fixture
def fresh(copy_home: Callable) -> Store:
    """A home whose later checkpoint is not embedded yet."""
    store = copy_home()
    for kind in ("snapshots", "indexes", "verdicts", "evaluations"):
        shutil.rmtree(store.path(kind, LATER))
    return store


def test_of_two_refreshers_of_one_checkpoint_the_second_leaves_at_once_and_a_dead_one_blocks_nobody(
    fresh: Store, start_python: Callable, tiny_home: Store
) -> None:
    first = start_python(REFRESHER, fresh.home, LATER, "patient")
    assert first.stdout.readline() == "shard\n"
    second = start_python(REFRESHER, fresh.home, LATER, "hasty")
    said = second.communicate(timeout=120)[0]
    assert said.startswith("refused") and "another process is building it" in said
    first.send_signal(signal.SIGKILL)  # its lease dies with it, and what it finished stays
    first.wait()
    third = start_python(REFRESHER, fresh.home, LATER, "hasty")
    said = third.communicate(timeout=120)[0].split()
    assert said[:2] == ["made", tiny_home.manifest("snapshots", LATER).digest]


def test_retention_spares_a_checkpoint_that_is_being_embedded_until_it_is_settled(
    fresh: Store, start_python: Callable, refresh: Callable
) -> None:
    reader = start_python(REFRESHER, fresh.home, LATER, "patient")
    assert reader.stdout.readline() == "shard\n"
    psutil.Process(reader.pid).suspend()  # in the middle of its pass, for as long as it takes
    values = fresh.manifest("checkpoints", LATER)
    for step in (8, 12, 16):
        folder = Path(
            shutil.copytree(fresh.path("checkpoints", LATER), fresh.path("checkpoints", checkpoint_key("r1", step)))
        )
        (folder / MANIFEST).write_text(replace(values, facts={**values.facts, "step": step}).to_json())
    assert fresh.prune_checkpoints("r1", keep=1, spare=set()) == [checkpoint_key("r1", step) for step in (8, 12)]
    psutil.Process(reader.pid).resume()
    said = reader.communicate("\n\n", timeout=120)[0]
    assert "made" in said
    refresh(fresh, LATER)
    promote.run(fresh.config(), store=fresh, name=LATER)
    assert fresh.require_live().index == LATER
    assert not (fresh.path("checkpoints", LATER) / PRUNED).exists()  # it is live: its query tower is needed


def test_a_checkpoint_that_retention_took_is_refused_and_the_next_one_is_not(fresh: Store) -> None:
    (fresh.path("checkpoints", LATER) / PRUNED).write_text("{}")
    with pytest.raises(ArtifactError, match="weights were dropped by retention; embed a newer checkpoint"):
        embed(fresh, LATER)


def embed(store: Store, key: str, corpus: Path | None = None) -> None:
    made = {"checkpoint": store.path("checkpoints", key), "corpus": corpus or store.newest("corpus")}
    reembed.run(store.config(), **made, out=store.path("snapshots", key), sink=NullSink())


def flip(path: Path, place: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_in_a_shard_is_named_and_nothing_is_built_from_it(fresh: Store) -> None:
    embed(fresh, LATER)
    shard = fresh.path("snapshots", LATER) / "shard-001.npy"
    flip(shard)
    with pytest.raises(ArtifactError, match=r"shard-001\.npy: sha256 .*, its manifest says"):
        build(fresh, LATER)
    assert not fresh.has("indexes", LATER)


def build(store: Store, key: str) -> None:
    made = {kind: store.path(f"{kind}s", key) for kind in ("checkpoint", "snapshot")}
    index.run(store.config(), **made, corpus=store.newest("corpus"), out=store.path("indexes", key), sink=NullSink())


def test_a_byte_flipped_after_the_verdict_is_found_at_the_gate_and_the_old_index_answers_on(home: Store) -> None:
    folder = home.path("indexes", LATER)
    flip(next(path for path in folder.iterdir() if path.name != MANIFEST))
    with pytest.raises(ArtifactError, match="sha256"):
        promote.run(home.config(), store=home, name=LATER)
    assert home.require_live().index == FIRST
    assert [moved.index for moved in home.live_history()] == [FIRST]


def test_a_byte_flipped_before_the_verdict_is_its_finding_and_the_gate_refuses(home: Store) -> None:
    shutil.rmtree(home.path("verdicts", LATER))
    flip(home.path("snapshots", LATER) / "shard-000.npy")
    parts = {kind: home.path(f"{kind}s", LATER) for kind in ("snapshot", "checkpoint")}
    parts |= {"index": home.path("indexes", LATER), "corpus": home.newest("corpus")}
    verdict = qualify.run(home.config(), **parts, out=home.path("verdicts", LATER))
    assert not verdict.facts["passed"] and not verdict.facts["findings"]["checksum"]["passed"]
    with pytest.raises(GateError, match="refused by its verdict"):
        promote.run(home.config(), store=home, name=LATER)


def test_shards_of_two_encoders_do_not_become_one_index(home: Store) -> None:
    for kind in ("indexes", "verdicts"):
        shutil.rmtree(home.path(kind, LATER))
    mixed = home.path("snapshots", LATER)
    shutil.copy(home.path("snapshots", FIRST) / "shard-000.npy", mixed / "shard-000.npy")
    with pytest.raises(ArtifactError, match=r"shard-000\.npy: sha256"):
        build(home, LATER)
    # Somebody helpful mends the digest as well: the manifest no longer is the one that was published.
    manifest = json.loads((mixed / MANIFEST).read_text())
    manifest["files"]["shard-000.npy"] = file_sha256(mixed / "shard-000.npy")
    (mixed / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="it was edited, restore it"):
        build(home, LATER)


def test_shards_left_by_another_encoder_are_embedded_again(fresh: Store, tiny_home: Store) -> None:
    scratch = fresh.home / "snapshots" / f".{LATER}.partial"
    scratch.mkdir()
    names = [path.name for path in tiny_home.path("snapshots", FIRST).glob("*.npy")]
    for name in names:
        shutil.copy(tiny_home.path("snapshots", FIRST) / name, scratch / name)
    shards = {name.removesuffix(".npy"): file_sha256(scratch / name) for name in names}
    corpus = fresh.manifest("corpus", "v0001").digest
    foreign = file_sha256(fresh.path("checkpoints", FIRST) / EMBEDDER)
    (scratch / ".done.json").write_text(json.dumps({"encoder": foreign, "corpus": corpus, "shards": shards}))
    embed(fresh, LATER)
    assert fresh.manifest("snapshots", LATER).digest == tiny_home.manifest("snapshots", LATER).digest
    assert fresh.manifest("snapshots", LATER).record["resumed_shards"] == 0


def test_questions_are_not_embedded_by_another_encoder_than_the_documents(tiny_home: Store) -> None:
    with pytest.raises(ArtifactError, match=r"made from checkpoint .*; pass the checkpoint of this version"):
        open_version(
            tiny_home.path("indexes", FIRST),
            checkpoint=tiny_home.path("checkpoints", LATER),
            corpus=tiny_home.newest("corpus"),
            device=resolve(tiny_home.config().runtime),
        )


def test_vectors_that_are_not_numbers_are_counted_and_the_next_checkpoint_is_not_held_up(
    fresh: Store, refresh: Callable
) -> None:
    folder = fresh.path("checkpoints", LATER)
    whole = Path(shutil.copytree(folder, fresh.home.parent / "whole"))
    weights = load_file(folder / EMBEDDER)
    name = next(name for name in weights if "embeddings.word" in name or "word_embeddings" in name)
    weights[name][1000:1050] = float("nan")
    save_file(weights, folder / EMBEDDER)
    made = read_manifest(folder)
    broken = replace(made, files={**made.files, EMBEDDER: file_sha256(folder / EMBEDDER)})
    (folder / MANIFEST).write_text(broken.to_json())
    with pytest.raises(ArtifactError, match=r"\d+ of \d+ vectors are not finite; it is broken, resume training"):
        embed(fresh, LATER)
    assert not fresh.has("snapshots", LATER) and fresh.require_live().index == FIRST
    after = checkpoint_key("r1", 8)
    made = read_manifest(whole)
    shutil.move(whole, fresh.path("checkpoints", after))
    (fresh.path("checkpoints", after) / MANIFEST).write_text(replace(made, facts={**made.facts, "step": 8}).to_json())
    refresh(fresh, after)
    promote.run(fresh.config(), store=fresh, name=after)
    assert fresh.require_live().index == after


def test_norms_that_exploded_are_in_the_verdict(home: Store) -> None:
    finding = home.manifest("verdicts", LATER).facts["findings"]["vectors_sane"]
    norms = [float(word) for word in finding["found"].replace(",", "").split() if word[0].isdigit()]
    vectors = np.concatenate([np.load(path) for path in sorted(home.path("snapshots", LATER).glob("*.npy"))])
    lengths = np.linalg.norm(vectors, axis=1)
    assert norms[-2:] == pytest.approx([lengths.min(), lengths.max()], rel=1e-2)


PROMOTER = """
import os, signal, sys
from pathlib import Path
from realm_core.artifacts import pointer as module
from realm_core.artifacts.store import Store
from realm_core.stages import promote

store = Store.open(Path(sys.argv[1]))
if sys.argv[2] == "dies":
    module.write_durably = lambda path, text: os.kill(os.getpid(), signal.SIGKILL)
print("ready", flush=True)
sys.stdin.readline()
promote.run(store.config(), store=store, name="r1-s0000004", reason="promoted")
"""


def test_a_promotion_killed_between_history_and_pointer_moves_nothing_and_can_be_repeated(
    home: Store, start_python: Callable
) -> None:
    process = start_python(PROMOTER, home.home, "dies")
    process.communicate("\n", timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert home.require_live().index == FIRST
    assert promote.run(home.config(), store=home, name=LATER).generation == 3
    assert home.require_live().index == LATER
    assert [moved.generation for moved in home.live_history()] == [1, 2, 3]


def test_promotions_at_once_move_the_pointer_once(home: Store, start_python: Callable) -> None:
    rivals = [start_python(PROMOTER, home.home, "lives") for _ in range(2)]
    for rival in rivals:
        assert rival.stdout.readline() == "ready\n"
    for rival in rivals:
        rival.stdin.write("\n")
        rival.stdin.flush()
    for rival in rivals:
        assert rival.wait(timeout=120) == 0, rival.stderr.read()
    assert [moved.reason for moved in home.live_history()] == ["first", "promoted"]


def test_a_batch_of_questions_ends_on_the_version_it_began_with(home: Store) -> None:
    """The pointer moves, and files of the version disappear, while its questions are being searched."""
    store, version = home, opened(home, FIRST)
    questions = version.corpus.tokenizer.batch_ids(["Which ship?", "Who wrote it?", "In which year?"])
    before = version.search(questions, 5, None)
    halves = [version.search(questions[:1], 5, None)]
    promote.run(store.config(), store=store, name=LATER)
    shutil.rmtree(store.path("indexes", FIRST))
    halves.append(version.search(questions[1:], 5, None))
    assert np.array_equal(np.concatenate(halves), before)
    assert opened(store, store.require_live().index).digest != version.digest


# Again and again: opens what is live, asks questions one after the other, waits after the first until somebody has moved the
# pointer, and tells what it found and where the pointer stood before and after.
READER = """
import json, sys
from pathlib import Path
from realm_core.artifacts.store import Store
from tests.faults.test_refreshers import QUESTIONS, asked, opened

store = Store.open(Path(sys.argv[1]))
while True:
    live = store.require_live()
    version, found = opened(store, live.index), []
    for question in QUESTIONS:
        found += asked(version, question)
        if len(found) == 1:
            print("begun", flush=True)
            if sys.stdin.readline() == "":
                sys.exit()
    now = store.require_live().generation
    print(json.dumps({"digest": version.digest, "found": found, "generations": [live.generation, now]}), flush=True)
"""
QUESTIONS = ("Which ship?", "Who wrote it?", "In which year?")


def opened(store: Store, key: str) -> IndexVersion:
    made = {"checkpoint": store.path("checkpoints", key), "corpus": store.newest("corpus")}
    return open_version(store.path("indexes", key), **made, device=resolve(store.config().runtime))


def asked(version: IndexVersion, question: str) -> list[tuple[list[int], list[float]]]:
    """Rows and scores of one question: random towers find the same rows, and no two the same scores."""
    ids = version.corpus.tokenizer.batch_ids([question])
    scores, rows = version.search_vectors(version.embed(ids, 16), 5)
    return [(rows[0].tolist(), scores[0].tolist())]


def test_every_batch_of_a_process_that_keeps_asking_is_answered_by_one_version_while_the_pointer_moves(
    home: Store, start_python: Callable
) -> None:
    versions = [opened(home, key) for key in (FIRST, LATER)]
    expected = {version.digest: [asked(version, text)[0] for text in QUESTIONS] for version in versions}
    first, later = ([score for _, scores in found for score in scores] for found in expected.values())
    assert not np.isclose(first, later, atol=1e-4).any(), "the versions cannot be told apart"
    reader, batches = start_python(READER, home.home), []
    for number in range(6):
        assert reader.stdout.readline() == "begun\n", reader.stderr.read()
        promote.run(home.config(), store=home, name=(LATER, FIRST)[number % 2], allow_older=True)
        reader.stdin.write("go on\n")
        reader.stdin.flush()
        batches.append(json.loads(reader.stdout.readline()))
    for batch in batches:
        before, after = batch["generations"]
        assert after == before + 1
        for (rows, scores), (right_rows, right_scores) in zip(batch["found"], expected[batch["digest"]], strict=True):
            assert rows == right_rows
            assert np.allclose(scores, right_scores, atol=1e-5)
    assert {batch["digest"] for batch in batches} == set(expected)


def test_a_gate_without_the_metrics_it_needs_refuses_and_one_with_worse_ones_too(home: Store) -> None:
    values = home.settings()
    values["config"]["gate"]["max_recall_drop"] = 0.0
    (home.home / "home.json").write_text(json.dumps(values))
    for key, recall in ((FIRST, 0.9), (LATER, 0.1)):
        folder = home.path("evaluations", key)
        made = read_manifest(folder)
        metrics = {**made.facts["metrics"], "recall_at_5": recall, "exact_match": 1.0 - recall}
        (folder / MANIFEST).write_text(replace(made, facts={**made.facts, "metrics": metrics}).to_json())
        shutil.rmtree(home.path("verdicts", key))
        parts = {kind: home.path(f"{kind}s", key) for kind in ("snapshot", "checkpoint")}
        parts |= {"index": home.path("indexes", key), "corpus": home.newest("corpus")}
        qualify.run(home.config(), **parts, out=home.path("verdicts", key))
    # Better exact match, worse recall: the answers may be luck, the passages are not.
    with pytest.raises(GateError, match=r"recall_at_5 0\.100 against 0\.900 of the live .*; it stays live"):
        promote.run(home.config(), store=home, name=LATER)
    shutil.rmtree(home.path("evaluations", LATER))
    with pytest.raises(GateError, match="r1-s0000004 has no scores, which refresh_index"):
        promote.run(home.config(), store=home, name=LATER)
    assert home.require_live().index == FIRST


def test_the_clock_of_a_machine_that_goes_back_moves_nothing_back(home: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1.0)
    promote.run(home.config(), store=home, name=LATER)
    assert [moved.generation for moved in home.live_history()] == [1, 2]
    assert home.require_live().index == LATER
