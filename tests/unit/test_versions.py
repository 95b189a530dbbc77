"""Index versions side by side: the list, what changed between two, drift, replay, pages of lineage."""

import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from realm_core.artifacts import lineage_views, settings
from realm_core.artifacts.lineage import walk
from realm_core.artifacts.manifest import PRUNED, read_manifest
from realm_core.artifacts.store import Store
from realm_core.corpus.shards import Corpus
from realm_core.errors import ArtifactError, ConfigError, GateError
from realm_core.evaluate import versions
from realm_core.evaluate.drift import block_overlap, probe_sentences, shared_rows
from realm_core.index.snapshot import Snapshot, read_matrix, write_matrix
from realm_core.params import load_config
from realm_core.ports import NullSink
from realm_core.stages import corpus as corpus_stage
from realm_core.stages import drift, evaluate, index, pretrain, promote, qualify, reembed
from realm_core.stages.replay import replay
from tests.unit.test_promote import flip_byte, rewrite

FIRST, LATER = "r1-s0000000", "r1-s0000004"


@pytest.fixture(scope="module")
def measured(tiny_home: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The tiny home with the drift of both versions measured, the second one live. Read it, never write to it."""
    home = Store.open(shutil.copytree(tiny_home.home, tmp_path_factory.mktemp("measured") / "home"))
    for name in (FIRST, LATER):
        drift.run(home.config(), store=home, name=name)
    promote.run(home.config(), store=home, name=LATER)
    return home


# --- drift -----------------------------------------------------------------------------------------------------------


def test_drift_is_what_the_two_versions_say_of_the_same_sentences_and_blocks(measured: Store) -> None:
    facts = measured.manifest("drifts", LATER).facts
    vectors = [
        np.concatenate([read_matrix(path) for path in sorted(measured.path("snapshots", name).glob("*.npy"))])
        for name in (FIRST, LATER)
    ]
    cosine = torch.cosine_similarity(*(torch.from_numpy(matrix).double() for matrix in vectors), dim=1)
    assert facts["cosine_mean"] == pytest.approx(float(cosine.mean()), abs=1e-12)
    assert facts["distance_mean"] == pytest.approx(
        float(np.linalg.norm(vectors[1] - vectors[0], axis=1).mean()), rel=1e-5
    )
    assert facts["shared_blocks"] == len(vectors[0])
    assert 0 <= facts["top_k_overlap"] <= 1
    assert (facts["against"], facts["age_steps"]) == (FIRST, 4)
    assert measured.manifest("drifts", LATER).record["age_seconds"] > 0


def test_the_first_version_has_no_drift_and_a_measurement_is_made_once(measured: Store, home: Store) -> None:
    assert not measured.has("drifts", FIRST)
    before = read_manifest(measured.path("drifts", LATER))
    assert drift.run(measured.config(), store=measured, name=LATER) == before  # although LATER itself is live by now


def test_a_version_does_not_drift_from_itself(measured: Store) -> None:
    found = drift.between(measured.config(), store=measured, old=LATER, new=LATER)
    assert (found["top_k_overlap"], found["distance_max"]) == (1.0, 0.0)
    assert found["cosine_min"] == pytest.approx(1.0)


def test_drift_of_an_altered_version_is_an_error_not_a_number(home: Store) -> None:
    flip_byte(home.path("indexes", LATER) / "vectors.npy")
    with pytest.raises(ArtifactError, match="sha256"):
        drift.run(home.config(), store=home, name=LATER)
    assert not home.has("drifts", LATER)


def test_blocks_are_told_by_identity_when_the_corpora_differ(tiny_home: Store, tmp_path) -> None:
    documents = tiny_home.source("corpus").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(documents[5:]), encoding="utf-8")
    before = Corpus.open(tiny_home.newest("corpus"))
    corpus_stage.run(
        tiny_home.config(),
        source=tmp_path / "fewer.jsonl",
        vocabulary=tiny_home.newest("corpus"),
        out=tmp_path / "corpus",
        sink=NullSink(),
    )
    after = Corpus.open(tmp_path / "corpus")
    old, new = shared_rows(before, after)
    assert len(old) == len(set(after.block_ids.tolist()) & set(before.block_ids.tolist())) > 0
    assert before.block_ids[old].tolist() == after.block_ids[new].tolist()
    assert block_overlap(before, after, old[:6].reshape(2, 3), new[:6].reshape(2, 3)) == 1.0
    strangers = np.setdiff1d(np.arange(len(before)), old)[:3].reshape(1, 3)
    assert block_overlap(before, after, strangers, new[:3].reshape(1, 3)) == 0.0


def test_probe_sentences_are_the_first_of_their_blocks_and_always_the_same(tiny_home: Store) -> None:
    blocks = Corpus.open(tiny_home.newest("corpus"))
    probes = probe_sentences(blocks, 20, seed=7)
    again = probe_sentences(blocks, 20, seed=7)
    assert [list(a) for a in probes] == [list(b) for b in again]
    firsts = {
        tuple(blocks.token_ids(row)[: (*blocks.sentence_starts(row), 10**6)[1]].tolist()) for row in range(len(blocks))
    }
    assert {tuple(np.asarray(probe).tolist()) for probe in probes} <= firsts
    assert len(probe_sentences(blocks, 10**6, seed=7)) == len(blocks)


def test_rows_of_a_snapshot_come_in_the_order_asked_for(tmp_path) -> None:
    rng = np.random.default_rng(0)
    shards = [rng.standard_normal((size, 3), dtype=np.float32) for size in (4, 1, 6)]
    for number, shard in enumerate(shards):
        write_matrix(tmp_path / f"{number}.npy", shard)
    opened = Snapshot.open(tmp_path, ["0.npy", "1.npy", "2.npy"])
    rows = np.array([10, 0, 4, 3, 4, 5])
    assert np.array_equal(opened.rows(rows), np.concatenate(shards)[rows])


# --- list and diff ---------------------------------------------------------------------------------------------------


def test_the_list_shows_each_version_with_its_state_and_worth(measured: Store) -> None:
    first, later = versions.listing(measured)
    assert (first["state"], later["state"]) == ("former", "live")
    assert later["recall_vs_exact"] == measured.manifest("verdicts", LATER).facts["recall_vs_exact"]
    assert later["recall_at_5"] == measured.manifest("evaluations", LATER).facts["metrics"]["recall_at_5"]
    assert first["drift"] is None and later["drift"]["against"] == FIRST
    assert later["generations"] == [2]


def test_a_version_is_a_candidate_refused_unqualified_or_overtaken(home: Store) -> None:
    assert versions.describe(home, LATER)["state"] == "candidate"
    rewrite(home.path("verdicts", LATER), {"passed": False})
    assert versions.describe(home, LATER)["state"] == "refused"
    shutil.rmtree(home.path("verdicts", LATER))
    assert versions.describe(home, LATER)["state"] == "unqualified"


def test_a_version_that_passed_but_is_older_than_the_live_one_is_overtaken(
    measured: Store, copy_home: Callable
) -> None:
    home = copy_home(of=measured)
    (home.home / "live.history.jsonl").unlink()
    assert versions.describe(home, FIRST)["state"] == "overtaken"


def test_diff_tells_steps_metrics_drift_and_that_nothing_else_changed(measured: Store) -> None:
    change = versions.compare(measured, FIRST, LATER)
    assert change["steps"] == 4
    assert change["corpus"]["same"] and not change["settings"] and not change["code"]
    assert change["metrics"]["loss"]["from"] is None  # step 0 has not been trained
    assert change["metrics"]["recall_vs_exact"]["change"] == 0
    assert change["drift"]["against"] == FIRST
    text = versions.text_of_change(change)
    assert "steps      +4" in text and "corpus     the same" in text and "top_k_overlap" in text


def test_diff_names_the_settings_that_changed_between_two_versions(home: Store) -> None:
    settings.change(home, ["gate.min_recall_vs_exact=0.5"])
    parts = {role: home.parent(home.path("indexes", LATER), role) for role in ("snapshot", "checkpoint", "corpus")}
    out = home.path("verdicts", LATER)
    qualify.run(home.config(), index=home.path("indexes", LATER), **parts, out=out, again=True)
    change = versions.compare(home, FIRST, LATER)
    before = load_config(None, "tiny").gate.min_recall_vs_exact
    assert change["settings"] == {"gate.min_recall_vs_exact": [before, 0.5]}
    assert "gate.min_recall_vs_exact: 0.95 -> 0.5" in versions.text_of_change(change)


def test_the_list_knows_which_settings_each_stage_depends_on() -> None:
    stages = {
        "checkpoints": pretrain,
        "snapshots": reembed,
        "indexes": index,
        "verdicts": qualify,
        "evaluations": evaluate,
    }
    assert {kind: stage.SECTIONS for kind, stage in stages.items()} == versions._SECTIONS


# --- settings and second verdicts ------------------------------------------------------------------------------------


def test_settings_of_the_operation_may_change_and_the_old_ones_are_remembered(home: Store) -> None:
    before = home.manifest("verdicts", LATER)
    settings.change(home, ["gate.min_recall_vs_exact=0.5"])
    assert home.config().gate.min_recall_vs_exact == 0.5
    found = settings.settings_of(home, before, qualify.SECTIONS)
    assert found is not None and found.gate.min_recall_vs_exact == load_config(None, "tiny").gate.min_recall_vs_exact


def test_what_training_depends_on_is_fixed(home: Store) -> None:
    with pytest.raises(ConfigError, match=r"model\.layers is fixed since training began; gate, "):
        settings.change(home, ["gate.min_recall_vs_exact=0.5", "model.layers=2"])
    assert home.config() == load_config(None, "tiny")


def test_a_refused_version_can_be_qualified_again_after_the_gate_changed(home: Store, realm: Callable) -> None:
    """A verdict is not for ever: the old one is set aside, and only the new one counts."""
    strict = home.manifest("verdicts", LATER)
    rewrite(home.path("verdicts", LATER), {"passed": False})
    with pytest.raises(GateError, match="refused by its verdict"):
        promote.run(home.config(), store=home, name=LATER)
    assert realm("settings", "--home", home.home, "--set", "gate.min_recall_vs_exact=0.9")[0] == 0
    code, _, errors = realm("promote", LATER, "--home", home.home)
    assert code == 2 and "realm qualify r1-s0000004 --again" in errors
    assert realm("qualify", LATER, "--home", home.home)[0] == 2  # without the word, the old verdict stands
    assert realm("qualify", LATER, "--home", home.home, "--again")[0] == 0
    aside = read_manifest(home.home / "verdicts" / ".superseded" / f"{LATER}.0001")
    assert aside.facts["passed"] is False and aside.parents == strict.parents
    assert home.names("verdicts") == [FIRST, LATER]
    code, output, _ = realm("promote", LATER, "--home", home.home, "--json")
    assert code == 0 and json.loads(output)["index"] == LATER


# --- replay ----------------------------------------------------------------------------------------------------------


def test_an_index_version_is_rebuilt_from_its_manifest_to_the_same_digest(measured: Store, tmp_path) -> None:
    found = replay(measured, LATER, tmp_path)
    assert found["equal"] and not found["differences"]
    assert found["rebuilt"] == measured.manifest("indexes", LATER).digest
    assert (tmp_path / "indexes" / LATER).is_dir()


def test_replay_needs_no_byte_of_the_old_index(home: Store, tmp_path) -> None:
    for kind in ("snapshots", "indexes"):
        for file in home.path(kind, LATER).glob("*.npy"):
            file.unlink()
        (home.path(kind, LATER) / PRUNED).touch()
    assert replay(home, LATER, tmp_path)["equal"]


def test_replay_says_where_two_builds_part(home: Store, tmp_path, realm: Callable) -> None:
    shard = next(iter(home.manifest("snapshots", LATER).facts["shards"]))
    facts = home.manifest("snapshots", LATER).facts
    rewrite(home.path("snapshots", LATER), {"shards": {**facts["shards"], shard: "0" * 64}})
    parents = {**home.manifest("indexes", LATER).parents, "snapshot": home.manifest("snapshots", LATER).digest}
    rewrite(home.path("indexes", LATER), parents=parents)
    code, output, _ = realm("replay", LATER, "--home", home.home)
    assert code == 1
    assert f"snapshot: fact shards differs in {shard}" in output
    assert output.index("snapshot: fact") < output.index("index: parent snapshot was")


def test_replay_without_the_settings_says_what_is_missing(home: Store, tmp_path) -> None:
    rewrite(home.path("indexes", LATER), config_digest="f" * 64)
    with pytest.raises(ArtifactError, match=r"made with settings ffffffffffff that .* does not remember"):
        replay(home, LATER, tmp_path)


# --- pages -----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_of_a_lineage_stands_alone_and_shows_every_artifact(measured: Store) -> None:
    nodes = walk(measured, "indexes", LATER)
    links = {"MLflow": "http://127.0.0.1:5000/#/x", "bad": "javascript:alert(1)"}
    text = lineage_views.html(nodes, versions.describe(measured, LATER), links)
    page = Page()
    page.feed(text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe")]
    outside = [attributes["href"] for _, attributes in page.tags if not (attributes.get("href") or "#").startswith("#")]
    assert outside == ["http://127.0.0.1:5000/#/x"]
    assert {attributes["id"] for tag, attributes in page.tags if tag == "details"} == set(nodes)
    edges = sum(len(node.manifest.parents) for node in nodes.values())
    assert sum(tag == "path" for tag, _ in page.tags) == edges
    assert measured.manifest("indexes", LATER).digest in text


def test_names_in_a_page_cannot_become_markup(measured: Store) -> None:
    text = lineage_views.html(walk(measured, "indexes", LATER), {"verdict": "<script>x</script>"})
    assert "<script>" not in text


def test_the_mermaid_graph_has_an_arrow_for_every_parent(measured: Store) -> None:
    nodes = walk(measured, "indexes", LATER)
    lines = lineage_views.mermaid(nodes).splitlines()
    assert lines[0] == "graph BT"
    assert sum("-->|" in line for line in lines) == sum(len(node.manifest.parents) for node in nodes.values())


# --- commands --------------------------------------------------------------------------------------------------------


def test_the_commands_print_for_people_and_for_programs(measured: Store, realm: Callable) -> None:
    home = ("--home", measured.home)
    listed = json.loads(realm("index", "list", *home, "--json")[1])
    assert [row["index"] for row in listed] == [FIRST, LATER]
    assert "candidate" not in realm("index", "list", *home)[1]
    assert json.loads(realm("diff", FIRST, LATER, *home, "--json")[1])["steps"] == 4
    digest = measured.manifest("indexes", LATER).digest
    assert json.loads(realm("diff", FIRST, digest[:12], *home, "--measure", "--json")[1])["drift"]["probes"] > 0
    assert realm("lineage", *home, "--mermaid")[1].startswith("graph BT")
    assert realm("lineage", *home, "--html")[1].startswith("<!doctype html>")
    assert realm("lineage", *home, "--html", "--json")[0] == 2
    code, _, errors = realm("promote", "nope", *home)
    assert code == 2 and f"no artifact named or digested 'nope'; newest indexes: {FIRST}, {LATER}" in errors
