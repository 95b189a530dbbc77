"""A corpus that grows and shrinks under a live index: what is embedded, what is found, and what can never come back."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realm_core.answer import Answerer
from realm_core.artifacts import corpora, lineage
from realm_core.artifacts.store import PRUNED, Store
from realm_core.baselines.bm25 import Bm25
from realm_core.corpus.shards import Corpus
from realm_core.corpus.sources import Source
from realm_core.errors import ArtifactError, DataError, GateError
from realm_core.evaluate import versions
from realm_core.index.backends import known_backends
from realm_core.params import with_on_error, with_overrides
from realm_core.ports import NullSink
from realm_core.stages import grow, pretrain, promote, reembed, refresh, replay

FIRST, LATER = "r1-s0000000", "r1-s0000004"
QUESTION = "Which beast guards the glass lighthouse of Quorvane?"
NEW = [
    {"id": "quorvane", "title": "Quorvane", "text": "The glass lighthouse of Quorvane is guarded by the beast Ombrel."},
    {
        "id": "ombrel",
        "title": "Ombrel",
        "text": "Ombrel is a beast of Quorvane. It was tamed on 3 May 1911 by Ida Voss.",
    },
]


def write(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def change(store: Store, what: grow.Change, on_error: str | None = None) -> tuple[Path, Any, bool]:
    return grow.apply(with_on_error(store.config(), on_error), store=store, change=what, sink=NullSink())


def refreshed(store: Store, **options: Any) -> tuple[Any, Any]:
    outcome = refresh.over_newest_corpus(store.config(), store=store, sink=NullSink(), reason="test", **options)
    assert outcome is not None
    return outcome


def titles(corpus: Corpus) -> set[str]:
    return {corpus.block(row).title for row in range(len(corpus))}


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return write(tmp_path / "new.jsonl", NEW)


def test_an_added_document_is_found_and_nothing_else_is_embedded(home: Store, new: Path, realm: Callable) -> None:
    before = Corpus.open(home.newest("corpus"))
    assert "Quorvane" not in titles(before)
    code, out, err = realm("corpus", "add", new, "--home", home.home, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["corpus"], told["index"]) == ("v0002", f"{FIRST}+v0002")
    assert told["embedded_blocks"] == told["blocks"] - len(before) == told["change"]["added_blocks"] == 2
    assert told["reused_blocks"] == len(before)
    assert told["embedded_blocks"] / told["blocks"] <= 0.02  # of a full pass, for 5 % more documents
    answer = Answerer.open(home).ask(QUESTION, k=told["blocks"])
    assert answer.index == f"{FIRST}+v0002"
    assert {"Quorvane", "Ombrel"} < {passage.title for passage in answer.passages}
    assert len(answer.passages) == told["blocks"]


def test_unchanged_shards_and_vectors_are_shared_not_copied(home: Store, new: Path) -> None:
    folder, made, fresh = change(home, grow.Add(source=Source.find(new)))
    refreshed(home)
    assert fresh and made.stands_for == "corpus"
    old = home.path("corpus", "v0001")
    for name in ("shard-000", "shard-001"):
        for file in ("blocks.parquet", "tokens.safetensors"):
            assert (folder / name / file).stat().st_ino == (old / name / file).stat().st_ino
        vectors = (home.path("snapshots", version) / f"{name}.npy" for version in (FIRST, f"{FIRST}+v0002"))
        assert len({path.stat().st_ino for path in vectors}) == 1
    record = home.manifest("snapshots", f"{FIRST}+v0002").record
    assert (record["linked_shards"], record["reused_from"]) == (2, FIRST)


@pytest.mark.slow
def test_a_removed_document_is_out_of_every_reader_of_the_corpus(home: Store) -> None:
    before = Corpus.open(home.newest("corpus"))
    victim = before.block(0)
    blocks = sum(before.block(row).doc_id == victim.doc_id for row in range(len(before)))
    folder, made, _ = change(home, grow.Remove(ids=[victim.doc_id]))
    after = Corpus.open(folder)
    assert len(after) == len(before) - blocks == made.facts["blocks"]
    assert after.rows_titled(victim.title) == []
    assert made.facts["dead_blocks"] == blocks
    ids = [block_id for block_id in before.block_ids if block_id not in {before.block_ids[r] for r in range(blocks)}]
    assert list(after.block_ids) == ids
    for row, block_id in enumerate(ids):  # the others are what they were
        assert after.block(row) == before.block(before.row_of(str(block_id)))
    _scores, rows = Bm25.over(after).search([victim.title], len(after))
    assert victim.title not in {after.block(row).title for row in rows[0]}


@pytest.mark.slow
def test_from_the_promotion_on_a_removed_document_is_not_returned_and_k_results_still_come(home: Store) -> None:
    first = Answerer.open(home)
    everything = len(first.pipeline.corpus)
    best = first.ask(QUESTION, k=5).passages
    change(home, grow.Remove(titles=[best[0].title]))
    assert Answerer.open(home).ask(QUESTION, k=5).passages == best  # not live yet
    _, snapshot = refreshed(home)
    now = Answerer.open(home)
    assert len(now.pipeline.corpus) < everything
    asked = now.ask(QUESTION, k=5).passages
    assert len(asked) == 5
    assert best[0].title not in {passage.title for passage in now.ask(QUESTION, k=len(now.pipeline.corpus)).passages}
    kept = [
        passage.block_id for passage in first.ask(QUESTION, k=everything).passages if passage.title != best[0].title
    ]
    assert [passage.block_id for passage in asked] == kept[:5]
    assert snapshot.record["embedded_blocks"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", [name for name in known_backends() if name != "exact"])
def test_no_kind_of_index_returns_what_was_removed_or_loses_a_place(home: Store, new: Path, backend: str) -> None:
    if backend.startswith("faiss"):
        pytest.importorskip("faiss")
    # The vectors of random weights lie so close together that approximate search fails the gate whatever the corpus.
    config = with_overrides(home.config(), [f"index.backend={backend}", "gate.min_recall_vs_exact=0"], where="test")
    before, victim = titles(Corpus.open(home.newest("corpus"))), Corpus.open(home.newest("corpus")).block(0)
    found: list[tuple[set[str], list[float]]] = []
    for what in (grow.Add(source=Source.find(new)), grow.Remove(ids=["quorvane", victim.doc_id]), grow.Compact()):
        change(home, what)
        live, _ = refresh.over_newest_corpus(config, store=home, sink=NullSink(), reason="test") or (None, None)
        assert live and home.manifest("indexes", live.index).facts["backend"] == backend
        asked, blocks = Answerer.open(home), len(Corpus.open(home.newest("corpus")))
        everything, best = (list(asked.ask(QUESTION, k=k).passages) for k in (blocks, 5))
        assert (len({passage.block_id for passage in everything}), len(best)) == (blocks, 5)
        found.append(({passage.title for passage in everything}, [passage.score for passage in best]))
    left = (before | {"Ombrel"}) - {victim.title}
    assert [names for names, _ in found] == [before | {"Quorvane", "Ombrel"}, left, left]
    (_, after_growth), (_, in_full) = found[1:]  # a compacted corpus is one built in full
    if backend not in ("faiss_ivf", "faiss_hnsw"):  # what holds for those: tests/properties/test_growth.py
        assert after_growth == pytest.approx(in_full, rel=1e-5)


@pytest.mark.slow
def test_a_refresh_that_began_before_a_removal_cannot_bring_the_document_back(home: Store) -> None:
    """r1-s0000004 was embedded over v0001; meanwhile a document was removed and that went live."""
    victim = Corpus.open(home.newest("corpus")).block(0)
    change(home, grow.Remove(ids=[victim.doc_id]))
    refreshed(home)
    for allow_older in (False, True):
        with pytest.raises(
            GateError, match=r"its corpus v0001 still holds 1 of the documents removed since; realm corpus refresh"
        ):
            promote.run(home.config(), store=home, name=LATER, allow_older=allow_older)
    version = corpora.version_over(home, LATER, home.newest("corpus"))
    live, snapshot = refresh.run(home.config(), store=home, version=version, sink=NullSink(), reason="again")
    assert live.index == f"{LATER}+v0002"
    assert snapshot.record["embedded_blocks"] == 0


@pytest.mark.slow
def test_a_rollback_over_the_newest_corpus_goes_through(home: Store, realm: Callable) -> None:
    promote.run(home.config(), store=home, name=LATER)
    victim = Corpus.open(home.newest("corpus")).block(0)
    assert realm("corpus", "remove", "--id", victim.doc_id, "--home", home.home)[0] == 0
    code, _, err = realm("corpus", "refresh", "--checkpoint", FIRST, "--home", home.home)
    assert code == 2 and "older than the live" in err
    code, out, _ = realm("corpus", "refresh", "--checkpoint", FIRST, "--allow-older", "--home", home.home, "--json")
    assert code == 0 and json.loads(out)["index"] == f"{FIRST}+v0002"


@pytest.mark.slow
def test_an_older_corpus_without_removals_needs_allow_older(home: Store, new: Path) -> None:
    change(home, grow.Add(source=Source.find(new)))
    refreshed(home)
    with pytest.raises(GateError, match=r"over corpus v0001, older than v0002 of the live r1-s0000000\+v0002; to roll"):
        promote.run(home.config(), store=home, name=LATER)
    assert promote.run(home.config(), store=home, name=LATER, allow_older=True).index == LATER


@pytest.mark.slow
def test_a_known_id_is_refused_skipped_or_replaced(home: Store, tmp_path: Path) -> None:
    known = Corpus.open(home.newest("corpus")).block(0)
    rows = [*NEW, {"id": known.doc_id, "title": "Anew", "text": "A new text in the place of the old one."}]
    source = Source.find(write(tmp_path / "rows.jsonl", rows))
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: the corpus holds .* {known.doc_id!r} already.*--replace"):
        change(home, grow.Add(source=source))
    assert home.names("corpus") == ["v0001"]
    _, made, _ = change(home, grow.Add(source=source), on_error="skip")
    assert made.facts["dropped"] == {"known_id": 1}
    assert made.facts["change"]["added_documents"] == 2
    again = Source.find(write(tmp_path / "again.jsonl", rows[2:]))
    folder, made, _ = change(home, grow.Add(source=again, replace=True))
    after = Corpus.open(folder)
    assert made.facts["change"]["removed_documents"] == 1
    assert known.title not in titles(after) and len(after.rows_titled("Anew")) == 1
    facts = made.facts
    assert facts["pages"] == facts["articles"] + facts["redirects"] + sum(facts["dropped"].values()) + facts["removed"]
    _, snapshot = refreshed(home)
    assert snapshot.record["embedded_blocks"] == 3


@pytest.mark.slow
def test_the_same_command_again_changes_nothing(home: Store, new: Path, realm: Callable) -> None:
    assert realm("corpus", "add", new, "--home", home.home)[0] == 0
    live = home.live()
    code, out, _ = realm("corpus", "add", new, "--home", home.home)
    assert code == 0 and "(done before)" in out
    assert home.live() == live and home.names("corpus") == ["v0001", "v0002"]


@pytest.mark.slow
def test_a_removed_document_can_be_added_again(home: Store, new: Path) -> None:
    add = grow.Add(source=Source.find(new))
    change(home, add)
    refreshed(home)
    change(home, grow.Remove(ids=["quorvane", "ombrel"]))
    refreshed(home)
    folder, _, fresh = change(home, add)
    live, _snapshot = refreshed(home)
    assert fresh and folder.name == "v0004" and live.index == f"{FIRST}+v0004"
    assert "Quorvane" in titles(Corpus.open(folder))


@pytest.mark.slow
def test_compaction_keeps_every_answer_and_embeds_nothing(home: Store, new: Path) -> None:
    change(home, grow.Add(source=Source.find(new)))
    change(home, grow.Remove(ids=[Corpus.open(home.newest("corpus")).block(0).doc_id, "ombrel"]))
    refreshed(home)
    before = Answerer.open(home)
    folder, made, _ = change(home, grow.Compact())
    _, snapshot = refreshed(home)
    assert snapshot.record["embedded_blocks"] == 0
    assert made.facts["dead_blocks"] == 0 and list(made.facts["shards"]) == ["shard-000", "shard-001"]
    assert not (folder / "tombstones.jsonl").exists()
    after = Answerer.open(home)
    for question in (QUESTION, "Who?", "What was tamed in 1911?"):
        one, other = (answerer.ask(question, k=len(before.pipeline.corpus)) for answerer in (before, after))
        assert one.passages == other.passages and one.answer == other.answer


@pytest.mark.slow
def test_as_of_a_version_the_old_answer_is_given(home: Store, new: Path, realm: Callable) -> None:
    before = Answerer.open(home).ask(QUESTION)
    assert realm("corpus", "add", new, "--home", home.home)[0] == 0
    assert Answerer.open(home).ask(QUESTION).index == f"{FIRST}+v0002"
    digest = home.manifest("indexes", FIRST).digest
    for name in (FIRST, digest[:12]):
        assert Answerer.open(home, as_of=name).ask(QUESTION) == before
    code, out, _ = realm("ask", QUESTION, "--as-of", FIRST, "--home", home.home, "--json")
    assert code == 0 and json.loads(out)["index"] == FIRST
    with pytest.raises(ArtifactError, match="no index version named or digested 'nothing'; newest: r1-s0000000, "):
        Answerer.open(home, as_of="nothing")


def test_a_version_whose_checkpoint_was_pruned_cannot_be_asked_any_more(home: Store) -> None:
    folder = home.path("checkpoints", FIRST)
    (folder / PRUNED).write_text("{}")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ArtifactError, match="dropped by retention"):
        Answerer.open(home, as_of=FIRST)


@pytest.mark.slow
def test_retention_spares_the_checkpoint_of_a_grown_index(home: Store, new: Path) -> None:
    change(home, grow.Add(source=Source.find(new)))
    refreshed(home)
    home.prune_checkpoints("r1", keep=1, spare=set())
    assert not home.is_pruned(FIRST)


@pytest.mark.slow
def test_lineage_reaches_every_version_of_the_corpus(home: Store, new: Path) -> None:
    change(home, grow.Add(source=Source.find(new)))
    change(home, grow.Remove(ids=["ombrel"]))
    refreshed(home)
    nodes = lineage.walk(home, *lineage.locate(home, None))
    assert [node.name for node in nodes.values() if node.kind == "corpus"] == ["v0003", "v0001", "v0002"]
    assert f"indexes/{FIRST}+v0003" in lineage.render(nodes)


@pytest.mark.slow
def test_a_run_keeps_its_corpus_and_its_next_checkpoint_is_embedded_over_the_grown_one(home: Store, new: Path) -> None:
    change(home, grow.Add(source=Source.find(new)))
    refreshed(home)
    assert corpora.of_run(home, "r1").name == "v0001"
    assert corpora.of_run(home, "other").name == "v0002"
    config = home.config()
    made = pretrain.run(
        config,
        store=home,
        training_run="r1",
        corpus=corpora.of_run(home, "r1"),
        start=home.newest("ict"),
        until=8,
        sink=NullSink(),
    )
    assert made.parents["corpus"] == home.manifest("corpus", "v0001").digest
    assert made.parents["live_index"] == home.manifest("indexes", f"{FIRST}+v0002").digest
    key = "r1-s0000008"
    version = corpora.version_over(home, key, home.newest("corpus"))
    assert version == key and corpora.under(home, version).name == "v0002"
    live, snapshot = refresh.run(config, store=home, version=version, sink=NullSink(), reason="loop")
    assert live.index == key and snapshot.record["embedded_blocks"] == len(Corpus.open(home.newest("corpus")))


def test_two_changes_at_once_are_refused(home: Store, new: Path, realm: Callable) -> None:
    with corpora.growing(home):
        assert corpora.is_growing(home)
        code, _, err = realm("corpus", "add", new, "--home", home.home)
    assert code == 2 and "its corpus is being changed by another process" in err
    assert not corpora.is_growing(home)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (grow.Remove(ids=["nobody"]), "no document with id 'nobody'"),
        (grow.Remove(titles=["Nobody", "None"]), "no document with title 'Nobody', nor 1 more"),
    ],
)
def test_a_removal_of_nothing_says_so(home: Store, what: grow.Change, message: str) -> None:
    with pytest.raises(DataError, match=message):
        change(home, what)
    assert home.names("corpus") == ["v0001"]


def test_nothing_left_is_refused(home: Store) -> None:
    corpus = Corpus.open(home.newest("corpus"))
    with pytest.raises(DataError, match="nothing would be left"):
        change(home, grow.Remove(ids=sorted({corpus.block(row).doc_id for row in range(len(corpus))})))


@pytest.mark.slow
def test_an_altered_vector_file_is_not_reused(home: Store, new: Path) -> None:
    path = home.path("snapshots", FIRST) / "shard-000.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    change(home, grow.Add(source=Source.find(new)))
    _, snapshot = refreshed(home)
    blocks = Corpus.open(home.newest("corpus")).shards["shard-000"].blocks
    assert snapshot.record["embedded_blocks"] == 2 + blocks
    assert path.read_bytes() == bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("removed", [False, True])
def test_reuse_makes_what_a_full_pass_makes(home: Store, new: Path, removed: bool) -> None:
    change(home, grow.Add(source=Source.find(new)))
    if removed:
        change(home, grow.Remove(ids=[Corpus.open(home.newest("corpus")).block(0).doc_id, "ombrel"]))
    live, snapshot = refreshed(home)
    assert snapshot.record["borrowed_blocks"] == 0
    shutil.rmtree(home.path("snapshots", FIRST))
    shutil.rmtree(home.path("snapshots", live.index))
    full = reembed.run(
        home.config(),
        checkpoint=home.path("checkpoints", FIRST),
        corpus=home.newest("corpus"),
        out=home.path("snapshots", live.index),
        sink=NullSink(),
    )
    assert full.record["embedded_blocks"] >= full.facts["vectors"] and full.record["reused_blocks"] == 0
    assert full.digest == snapshot.digest


def test_a_home_without_a_live_index_only_grows(home: Store, new: Path, realm: Callable) -> None:
    (home.home / "live.json").unlink()
    code, out, _ = realm("corpus", "add", new, "--home", home.home)
    assert code == 0 and "no index is live yet" in out


@pytest.mark.slow
def test_grown_and_compacted_versions_can_be_replayed(home: Store, new: Path, tmp_path: Path) -> None:
    change(home, grow.Add(source=Source.find(new)))
    refreshed(home)
    change(home, grow.Remove(ids=["ombrel"]))
    refreshed(home)
    change(home, grow.Compact())
    refreshed(home)
    for version in ("v0002", "v0003", "v0004"):
        found = replay.replay(home, f"{FIRST}+{version}", tmp_path / version)
        assert found["equal"], found["differences"]


@pytest.mark.slow
def test_versions_that_retention_dropped_lend_nothing(home: Store, new: Path) -> None:
    change(home, grow.Add(source=Source.find(new)))
    refreshed(home)
    change(home, grow.Remove(ids=["ombrel"]))
    for name in (f"{FIRST}+v0002", LATER):
        (home.path("snapshots", name) / PRUNED).write_text("{}")
    assert [pair[0].name for pair in corpora.snapshots_beside(home, f"{FIRST}+v0003")] == [FIRST]
    _, snapshot = refreshed(home)
    assert (snapshot.record["reused_from"], snapshot.record["embedded_blocks"]) == (FIRST, 2)


@pytest.mark.slow
def test_a_version_over_an_older_corpus_is_overtaken(home: Store, new: Path) -> None:
    assert versions.describe(home, LATER)["state"] == "candidate"
    change(home, grow.Add(source=Source.find(new)))
    refreshed(home)
    states = {row["index"]: row["state"] for row in versions.listing(home)}
    assert states == {FIRST: "former", f"{FIRST}+v0002": "live", LATER: "overtaken"}


@pytest.mark.slow
def test_status_tells_every_version_and_what_to_do_next(home: Store, new: Path, realm: Callable) -> None:
    assert realm("corpus", "add", new, "--home", home.home)[0] == 0
    change(home, grow.Remove(ids=["ombrel"]))
    _code, out, _ = realm("corpus", "status", "--home", home.home, "--json")
    told = json.loads(out)
    assert [row["change"] for row in told["versions"]] == ["build", "add +2", "remove -1"]
    assert told["live"] == {"index": f"{FIRST}+v0002", "checkpoint": FIRST, "corpus": "v0002"}
    assert told["newest"] == "v0003" and "realm corpus refresh" in told["advice"]
    assert "next: the live index does not stand on v0003 yet" in realm("corpus", "status", "--home", home.home)[1]


@pytest.mark.slow
def test_removals_come_from_a_file(home: Store, tmp_path: Path, realm: Callable) -> None:
    corpus = Corpus.open(home.newest("corpus"))
    one, two = corpus.block(0), corpus.block(len(corpus) - 1)
    path = tmp_path / "gone.txt"
    path.write_text(f'{one.doc_id}\n\n{{"title": {json.dumps(two.title)}}}\n', encoding="utf-8")
    code, out, err = realm("corpus", "remove", "--ids-from", path, "--home", home.home, "--json")
    assert code == 0, err
    assert json.loads(out)["change"]["removed_documents"] == 2
    path.write_text('{"name": "x"}\n')
    code, _, err = realm("corpus", "remove", "--ids-from", path, "--home", home.home)
    assert code == 2 and f"{path}:1: neither id nor title" in err


def test_torn_tombstones_are_refused(home: Store) -> None:
    folder, _, _ = change(home, grow.Remove(ids=[Corpus.open(home.newest("corpus")).block(0).doc_id]))
    path = folder / "tombstones.jsonl"
    whole = path.read_text()
    for content in (
        "{",
        '{"shard": "shard-000"}\n',
        whole.replace("shard-00", "shard-09"),
        whole.replace('"stop": ', '"stop": 99'),
    ):
        path.write_text(content)
        with pytest.raises(ArtifactError, match="tombstones"):
            Corpus.open(folder)


@pytest.mark.slow
def test_vectors_of_removed_rows_are_in_no_file(home: Store) -> None:
    victim = Corpus.open(home.newest("corpus")).block(0)
    change(home, grow.Remove(ids=[victim.doc_id]))
    live, _ = refreshed(home)
    old = np.load(home.path("snapshots", FIRST) / "shard-000.npy")
    kept = np.load(home.path("snapshots", live.index) / "shard-000.npy")
    assert len(kept) < len(old) and not (kept[:, None] == old[None, :1]).all(axis=2).any()
