"""The stages `index` and `qualify` on a home in miniature: what they demand of a version, and what they find."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from realm_core.artifacts.manifest import read_manifest
from realm_core.artifacts.store import Store
from realm_core.config import Config
from realm_core.errors import ArtifactError
from realm_core.index.snapshot import read_matrix, write_matrix
from realm_core.model.bundle import EMBEDDER
from realm_core.stages import corpus, qualify
from realm_core.stages import index as index_stage
from tests.versions import FIRST, LATER, SINK, open_later, reseal, set_config

# --- index -----------------------------------------------------------------------------------------------------------


def build_index(store: Store, out: Path, config: Config | None = None, **places: Path) -> Any:
    made = {
        "snapshot": store.path("snapshots", LATER),
        "checkpoint": store.path("checkpoints", LATER),
        "corpus": store.path("corpus", "v0001"),
        **places,
    }
    return index_stage.run(config or store.config(), **made, out=out, sink=SINK)


def test_an_index_names_its_three_parents_and_the_shards(tiny_home: Store) -> None:
    made = tiny_home.manifest("indexes", LATER)
    assert made.parents == {
        "snapshot": tiny_home.manifest("snapshots", LATER).digest,
        "checkpoint": tiny_home.manifest("checkpoints", LATER).digest,
        "corpus": tiny_home.manifest("corpus", "v0001").digest,
    }
    assert made.facts["shards"] == tiny_home.manifest("snapshots", LATER).facts["shards"]


def test_an_index_of_another_checkpoint_or_corpus_is_refused(
    tiny_home: Store, tiny_sources: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=r"made from checkpoint .*; pass the checkpoint of this version"):
        build_index(tiny_home, tmp_path / "x", checkpoint=tiny_home.path("checkpoints", FIRST))
    lines = Path(tiny_sources["corpus"]).read_text("utf-8").splitlines()[:30]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines), encoding="utf-8")
    corpus.run(tiny_home.config(), source=tmp_path / "documents.jsonl", out=tmp_path / "c", sink=SINK)
    with pytest.raises(ArtifactError, match=r"made from corpus .*; pass the corpus of this version"):
        build_index(tiny_home, tmp_path / "x", corpus=tmp_path / "c")
    assert not (tmp_path / "x").exists()


def test_an_index_over_altered_or_missing_vectors_is_refused(home: Store, tmp_path: Path) -> None:
    path = home.path("snapshots", LATER) / "shard-001.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"shard-001\.npy: sha256 .*run stage reembed again"):
        build_index(home, tmp_path / "x")
    path.unlink()
    with pytest.raises(ArtifactError, match=r"shard-001\.npy: missing"):
        build_index(home, tmp_path / "x")


def test_a_version_opens_only_with_the_checkpoint_and_corpus_it_was_built_from(
    tiny_home: Store, copy_home: Callable
) -> None:
    assert open_later(tiny_home).name == LATER
    with pytest.raises(ArtifactError, match=r"made from checkpoint .*; pass the checkpoint of this version"):
        open_later(tiny_home, checkpoint=tiny_home.path("checkpoints", FIRST))
    with pytest.raises(ArtifactError, match="made from corpus"):
        open_later(tiny_home, corpus=tiny_home.path("questions", "v0001"))


@pytest.mark.parametrize("where", ["indexes", "checkpoints"])
def test_a_version_with_an_altered_byte_does_not_open(home: Store, where: str) -> None:
    path = home.path(where, LATER) / ("vectors.npy" if where == "indexes" else EMBEDDER)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{path.name}: sha256"):
        open_later(home)


def test_an_opened_version_finds_what_exact_search_finds(tiny_home: Store) -> None:
    version = open_later(tiny_home)
    queries = np.random.default_rng(0).standard_normal((5, version.search_index.dimension)).astype(np.float32)
    vectors = np.concatenate(
        [read_matrix(tiny_home.path("snapshots", LATER) / f"{name}.npy") for name in version.corpus.shards]
    )
    expected = np.argsort(-(queries @ vectors.T), axis=1)[:, :3]
    assert (version.search_vectors(queries, 3)[1] == expected).all()


def test_more_passages_than_there_are_gives_all_of_them(tiny_home: Store) -> None:
    version = open_later(tiny_home)
    rows = version.search([version.tokenizer.ids("snow")], 10**6, None)
    assert sorted(rows[0].tolist()) == list(range(len(version.corpus)))


# --- the verdict -----------------------------------------------------------------------------------------------------


def examine(store: Store, config: Config | None = None, **places: Path) -> dict[str, dict[str, Any]]:
    made = {
        "index": store.path("indexes", LATER),
        "snapshot": store.path("snapshots", LATER),
        "checkpoint": store.path("checkpoints", LATER),
        "corpus": store.path("corpus", "v0001"),
        **places,
    }
    return qualify.examine(config or store.config(), **made)


def refused(findings: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, finding in findings.items() if not finding["passed"]}


def test_a_sound_version_passes_every_check(tiny_home: Store) -> None:
    made = tiny_home.manifest("verdicts", LATER)
    assert made.facts["passed"] and refused(made.facts["findings"]) == set()
    assert made.facts["index_digest"] == tiny_home.manifest("indexes", LATER).digest
    assert made.facts["recall_vs_exact"] == 1.0


def test_a_missing_shard_is_found_and_named(home: Store) -> None:
    (home.path("snapshots", LATER) / "shard-001.npy").unlink()
    findings = examine(home)
    assert refused(findings) == {"no_missing_shard", "checksum", "recall_vs_bruteforce"}
    assert "shard-001.npy: missing" in findings["no_missing_shard"]["found"]


def test_a_shard_that_lacks_a_block_is_found(home: Store) -> None:
    path = home.path("snapshots", LATER) / "shard-001.npy"
    write_matrix(path, read_matrix(path)[:-1].copy())
    reseal(home.path("snapshots", LATER))
    found = examine(home)["no_missing_shard"]
    assert not found["passed"]
    assert "vectors for" in found["found"] or "made from snapshot" in found["found"]


@pytest.mark.parametrize("where", ["indexes", "snapshots"])
def test_a_flipped_byte_is_found_and_the_file_never_opened(
    home: Store, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = home.path(where, LATER) / ("vectors.npy" if where == "indexes" else "shard-000.npy")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    monkeypatch.delattr(qualify, "load_index")
    findings = examine(home)
    assert refused(findings) == {"checksum", "recall_vs_bruteforce"}
    assert f"{path.name}: sha256" in findings["checksum"]["found"]
    assert findings["recall_vs_bruteforce"]["found"] == 0.0


def test_parents_that_do_not_belong_together_are_found(tiny_home: Store) -> None:
    findings = examine(tiny_home, snapshot=tiny_home.path("snapshots", FIRST))
    assert refused(findings) == {"no_missing_shard", "recall_vs_bruteforce"}
    assert "made from checkpoint" in findings["no_missing_shard"]["found"]


POOR = {
    "hnsw": ["index.backend=faiss_hnsw", "index.params={m: 2, ef_construction: 2, ef_search: 1}"],
}


@pytest.mark.parametrize("kind", POOR)
def test_an_index_that_misses_too_much_is_refused(tiny_home: Store, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("faiss")
    config = set_config(*POOR[kind])
    build_index(tiny_home, tmp_path / "x", config)
    findings = examine(tiny_home, config, index=tmp_path / "x")
    assert refused(findings) == {"recall_vs_bruteforce"}
    assert 0.0 < findings["recall_vs_bruteforce"]["found"] < 0.95


def test_a_retriever_that_has_collapsed_is_refused(home: Store) -> None:
    config = home.config()
    limit = config.gate.max_null_probability
    metrics = home.manifest("checkpoints", LATER).facts["metrics"]
    assert metrics["null_probability"] < limit
    reseal(home.path("checkpoints", LATER), metrics={**metrics, "null_probability": limit + 0.01})
    findings = examine(home)
    assert findings["retriever_not_collapsed"] == {"passed": False, "found": limit + 0.01}


def test_vectors_that_are_all_zero_or_not_finite_are_refused(home: Store) -> None:
    for facts in ({"zero_vectors": 1}, {"bad_vectors": 1}):
        reseal(home.path("snapshots", LATER), **{"zero_vectors": 0, "bad_vectors": 0, **facts})
        assert "vectors_sane" in refused(examine(home))


def test_a_failed_verdict_is_an_artifact_and_not_an_error(tiny_home: Store, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    config = set_config(*POOR["hnsw"])
    build_index(tiny_home, tmp_path / "x", config)
    made = qualify.run(
        config,
        index=tmp_path / "x",
        snapshot=tiny_home.path("snapshots", LATER),
        checkpoint=tiny_home.path("checkpoints", LATER),
        corpus=tiny_home.path("corpus", "v0001"),
        out=tmp_path / "verdict",
    )
    assert made.facts["passed"] is False
    assert read_manifest(tmp_path / "verdict") == made


def test_the_probe_is_the_same_every_time(tiny_home: Store, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    config = set_config(*POOR["hnsw"])
    build_index(tiny_home, tmp_path / "x", config)
    torch.manual_seed(1)
    first = examine(tiny_home, config, index=tmp_path / "x")
    torch.manual_seed(2)
    assert examine(tiny_home, config, index=tmp_path / "x") == first
