"""Lineage: from a version down to the corpus, told from manifests alone."""

import json
import shutil
from collections.abc import Callable

import pytest

from realm_core.artifacts.lineage import locate, render, to_json, walk
from realm_core.artifacts.manifest import PRUNED, read_manifest
from realm_core.artifacts.store import Store
from realm_core.errors import ArtifactError
from realm_core.stages import promote

LATER = "r1-s0000004"


def places(store: Store, kind: str, name: str) -> list[str]:
    return [f"{node.kind}/{node.name}" for node in walk(store, kind, name).values()]


def test_an_index_walks_down_to_the_corpus(tiny_home: Store) -> None:
    assert sorted(places(tiny_home, "indexes", LATER)) == [
        "checkpoints/r1-s0000000",
        "checkpoints/r1-s0000004",
        "corpus/v0001",
        "ict/v0001",
        "indexes/r1-s0000000",  # served the steps before
        "indexes/r1-s0000004",
        "snapshots/r1-s0000000",
        "snapshots/r1-s0000004",
    ]


def test_the_version_itself_comes_first_and_every_ancestor_once(tiny_home: Store) -> None:
    found = places(tiny_home, "evaluations", LATER)
    assert found[0] == f"evaluations/{LATER}"
    assert len(found) == len(set(found))


def test_every_parent_named_by_a_node_is_in_the_walk(tiny_home: Store) -> None:
    nodes = walk(tiny_home, "indexes", LATER)
    assert all(digest in nodes for node in nodes.values() for digest in node.manifest.parents.values())


def test_the_walk_goes_through_checkpoints_whose_weights_were_dropped(home: Store) -> None:
    before = places(home, "indexes", LATER)
    promote.run(home.config(), store=home, name=LATER)
    (home.home / "live.history.jsonl").unlink()  # nothing is kept for a rollback then
    (home.path("indexes", "r1-s0000000") / PRUNED).touch()
    home.prune_checkpoints("r1", keep=1, spare=set())
    assert home.checkpoints("r1") == [LATER]
    assert places(home, "indexes", LATER) == before


def test_a_parent_that_is_gone_is_named_with_its_child(home: Store) -> None:
    digest = read_manifest(home.path("ict", "v0001")).digest
    shutil.rmtree(home.path("ict", "v0001"))
    with pytest.raises(
        ArtifactError, match=f"checkpoints/r1-s0000000: its ict {digest[:12]} is not in this store; restore that folder"
    ):
        walk(home, "indexes", LATER)


def test_an_edited_ancestor_is_named(home: Store) -> None:
    path = home.path("corpus", "v0001") / "manifest.json"
    path.write_text(path.read_text("utf-8").replace('"documents": 40', '"documents": 41'), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"corpus/v0001/manifest\.json: content gives .* it was edited"):
        walk(home, "indexes", LATER)


def test_a_version_is_found_by_name_by_digest_or_because_it_is_live(tiny_home: Store) -> None:
    digest = tiny_home.manifest("indexes", LATER).digest
    assert locate(tiny_home, None) == ("indexes", "r1-s0000000")
    assert locate(tiny_home, LATER) == ("indexes", LATER)
    assert locate(tiny_home, digest[:12]) == ("indexes", LATER)
    assert locate(tiny_home, tiny_home.manifest("corpus", "v0001").digest) == ("corpus", "v0001")


@pytest.mark.parametrize("wanted", ["r1-s0000099", "", "abc", "zzzzzzzz"])
def test_an_unknown_version_is_refused_with_those_there_are(tiny_home: Store, wanted: str) -> None:
    with pytest.raises(ArtifactError, match="newest indexes: r1-s0000000, r1-s0000004"):
        locate(tiny_home, wanted)


def test_the_json_form_is_complete_and_plain(tiny_home: Store) -> None:
    walked = json.loads(json.dumps(to_json(walk(tiny_home, "indexes", LATER))))
    assert (walked["kind"], walked["version"]) == ("indexes", LATER)
    assert walked["digest"] == tiny_home.manifest("indexes", LATER).digest == walked["nodes"][0]["digest"]
    by_digest = {node["digest"]: node for node in walked["nodes"]}
    index = by_digest[walked["digest"]]
    assert {role: by_digest[digest]["kind"] for role, digest in index["parents"].items()} == {
        "snapshot": "snapshots",
        "checkpoint": "checkpoints",
        "corpus": "corpus",
    }
    for node in walked["nodes"]:
        assert node["code"] and node["config_digest"] and node["record"]["git"] and node["record"]["created"]


def test_the_text_form_shows_shards_code_settings_and_sources(tiny_home: Store) -> None:
    shown = render(walk(tiny_home, "indexes", LATER))
    manifest = tiny_home.manifest("corpus", "v0001")
    for name, digest in manifest.facts["shards"].items():
        assert f"{name} {digest[:12]}" in shown
    assert f"stage corpus code {manifest.code}, settings {manifest.config_digest[:12]}" in shown
    assert f"from checkpoint checkpoints/{LATER}, corpus corpus/v0001, snapshot snapshots/{LATER}" in shown
    assert f"documents {manifest.sources['documents'][:12]}" in shown


def test_the_text_form_names_the_dagster_and_tracker_runs(
    copy_home: Callable, refresh: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copy_home()
    for kind in ("snapshots", "indexes", "verdicts", "evaluations"):
        shutil.rmtree(store.path(kind, LATER))
    monkeypatch.setenv("REALM_DAGSTER_RUN_ID", "dagster-7")
    monkeypatch.setenv("REALM_MLFLOW_RUN_ID", "mlflow-8")
    refresh(store, LATER)
    shown = render(walk(store, "indexes", LATER))
    assert ", dagster run dagster-7, mlflow run mlflow-8" in shown


@pytest.mark.parametrize("kind", ["indexes", "checkpoints", "snapshots", "evaluations"])
def test_the_label_that_lineage_shows_can_be_asked_for(tiny_home: Store, realm: Callable, kind: str) -> None:
    code, out, _ = realm("lineage", f"{kind}/{LATER}", "--home", tiny_home.home)
    assert code == 0 and out.startswith(f"{kind}/{LATER}  {tiny_home.manifest(kind, LATER).digest[:12]}")


def test_a_label_of_nothing_is_refused(tiny_home: Store, realm: Callable) -> None:
    for label in ("checkpoints/r1-s0000099", "trainer/r1", "indexes/"):
        code, _, err = realm("lineage", label, "--home", tiny_home.home)
        assert code == 2 and f"no artifact named or digested {label!r}" in err
