"""Assets materialised in this process against a real small home: what Dagster is told is what the manifests say."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster import AssetKey

from orchestration.definitions import defs
from realm_core.artifacts.store import Store
from realm_core.errors import DataError
from realm_core.params import load_config
from realm_core.ports import MemorySink, Tracker
from realm_core.stages import qualify, reembed
from tests.orchestration import worlds

START = "r1-s0000000"
REFRESH = ("embedding_snapshot", "mips_index", "qa_eval", "promoted_index")
CHECKS = ("no_missing_shard", "checksum", "vectors_sane", "recall_vs_bruteforce", "retriever_not_collapsed")


@dataclass
class MemoryTracker:
    """Keeps rows and tags in memory."""

    sinks: dict[str, MemorySink] = field(default_factory=dict)
    tags: dict[str, dict[str, str]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)

    def sink(self, run: str) -> MemorySink:
        return self.sinks.setdefault(run, MemorySink())

    def tag(self, run: str, tags: Mapping[str, str]) -> None:
        self.tags.setdefault(run, {}).update(tags)

    def register(self, run: str, version: Mapping[str, str]) -> None:
        self.aliases["candidate"] = version["index"]

    def champion(self, run: str, version: Mapping[str, str]) -> None:
        self.aliases["champion"] = version["index"]

    def finish(self, run: str, status: str = "FINISHED") -> None:
        self.ended[run] = status

    def url(self, run: str) -> str | None:
        return f"http://tracker/{run}"


@dataclass
class World:
    """One home, one Dagster instance, one tracker."""

    store: Store
    instance: dg.DagsterInstance
    tracker: MemoryTracker = field(default_factory=MemoryTracker)

    def materialise(
        self, *names: str, key: str | None = None, config: Mapping[str, Any] | None = None
    ) -> dg.ExecuteInProcessResult:
        """Materialise assets and the checks on them, in a run of its own."""
        if key:
            self.instance.add_dynamic_partitions("realm_ckpt", [key])
        selected = dg.AssetSelection.assets(*names)
        return dg.materialize(
            [*defs.assets, *defs.asset_checks],
            selection=selected | dg.AssetSelection.checks_for_assets(*names),
            partition_key=key,
            instance=self.instance,
            resources={"store": self.store, "tracker": self.tracker},
            run_config={"ops": {"promoted_index": {"config": dict(config)}}} if config else None,
            raise_on_error=False,
        )

    def newest_event(self, asset: str, key: str | None = None) -> dg.EventLogRecord:
        records = self.instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=AssetKey(asset), asset_partitions=[key] if key else None), limit=1
        ).records
        return records[0]

    def metadata(self, asset: str, key: str | None = None) -> dict[str, Any]:
        found = self.newest_event(asset, key).asset_materialization.metadata
        return {name: value.value for name, value in found.items()}


@pytest.fixture
def world(store: Store) -> World:
    return World(store, dg.DagsterInstance.ephemeral())


def data_version(record: dg.EventLogRecord) -> str:
    return record.asset_materialization.tags["dagster/data_version"]


def failures(result: dg.ExecuteInProcessResult) -> dict[str, str]:
    """Step -> what it said when it failed."""
    events = [event for event in result.all_events if event.event_type_value == "STEP_FAILURE"]
    return {
        event.step_key: data.user_failure_data.description if data.user_failure_data else data.error.message
        for event in events
        if (data := event.step_failure_data)
    }


def test_the_memory_tracker_is_a_tracker() -> None:
    assert isinstance(MemoryTracker(), Tracker)


@pytest.mark.slow
def test_the_bootstrap_reports_the_digest_of_every_artifact_it_makes(empty_store: Store) -> None:
    world = World(empty_store, dg.DagsterInstance.ephemeral())
    names = {
        "corpus_shards": ("corpus", "v0001"),
        "question_sets": ("questions", "v0001"),
        "ict_checkpoint": ("ict", "v0001"),
        "sparse_reader": ("sparse_readers", "v0001"),
        "sparse_result": ("results", "bm25"),
    }
    assert world.materialise(*names).success
    for asset, (kind, name) in names.items():
        manifest = empty_store.manifest(kind, name)
        assert data_version(world.newest_event(asset)) == manifest.digest
        shown = world.metadata(asset)
        assert shown["digest"] == manifest.digest
        assert Path(shown["folder"]) == empty_store.path(kind, name)
        assert shown["parents"] == dict(manifest.parents)
    assert world.metadata("corpus_shards")["shards"] == empty_store.manifest("corpus", "v0001").facts["shards"]
    assert world.metadata("corpus_shards")["blocks"] == empty_store.manifest("corpus", "v0001").facts["blocks"]
    assert [step for step, _ in world.tracker.sinks["ict"].rows]


def test_materialising_again_makes_nothing_new(world: World) -> None:
    assert world.materialise("corpus_shards", "question_sets", "ict_checkpoint").success
    assert world.store.names("corpus") == world.store.names("ict") == ["v0001"]
    assert data_version(world.newest_event("corpus_shards")) == world.store.manifest("corpus", "v0001").digest


def test_a_refresh_reports_digests_verdicts_and_scores_and_moves_the_pointer(world: World) -> None:
    result = world.materialise(*REFRESH, key=START)
    assert result.success
    store = world.store
    for asset, kind in (("embedding_snapshot", "snapshots"), ("mips_index", "indexes"), ("qa_eval", "evaluations")):
        manifest = store.manifest(kind, START)
        assert data_version(world.newest_event(asset, START)) == manifest.digest
        assert manifest.record["dagster_run_id"] == result.run_id
    index = store.manifest("indexes", START)
    live = store.require_live()
    assert (live.index, live.index_digest, live.dagster_run_id) == (START, index.digest, result.run_id)
    assert data_version(world.newest_event("promoted_index", START)) == index.digest
    snapshot = world.metadata("embedding_snapshot", START)
    assert snapshot["shards"] == store.manifest("snapshots", START).facts["shards"]
    assert set(snapshot["shards"]) == set(store.manifest("corpus", "v0001").facts["shards"])
    assert world.metadata("mips_index", START)["mlflow"] == "http://tracker/r1"

    checks = {evaluation.check_name: evaluation for evaluation in result.get_asset_check_evaluations()}
    assert set(checks) == set(CHECKS)
    assert all(evaluation.passed for evaluation in checks.values())
    assert {evaluation.metadata["index_digest"].value for evaluation in checks.values()} == {index.digest}

    rows = {name: value for _, values in world.tracker.sinks["r1"].rows for name, value in values.items()}
    assert {"dev/recall_at_5", "dev/exact_match", "index/recall_vs_exact", "index/generation"} <= set(rows)
    assert world.tracker.tags["r1"]["live_index_digest"] == index.digest


@pytest.mark.slow
def test_every_later_version_shows_how_far_it_lies_from_the_one_before(world: World) -> None:
    later = "r1-s0000004"
    assert world.materialise(*REFRESH, key=START).success
    assert not [name for name in world.metadata("mips_index", START) if name.startswith("drift/")]
    worlds.train(world.store, "r1", 4)
    assert world.materialise(*REFRESH, key=later).success
    facts = world.store.manifest("drifts", later).facts
    shown, promoted = world.metadata("mips_index", later), world.metadata("promoted_index", later)
    for name in ("top_k_overlap", "cosine_mean", "distance_mean", "age_steps"):
        assert shown[f"drift/{name}"] == promoted[f"drift/{name}"] == facts[name]
    assert promoted["drift/against"] == START
    assert promoted["state"] == "live" and promoted["recall_vs_exact"] == shown_recall(world, later)
    assert promoted["mlflow"] == "http://tracker/r1" and promoted["dropped by retention"] == "none"
    logged = {
        name: value for step, values in world.tracker.sinks["r1"].rows if step == 4 for name, value in values.items()
    }
    assert logged["drift/top_k_overlap"] == facts["top_k_overlap"]
    assert world.tracker.aliases == {"candidate": later, "champion": later}


def shown_recall(world: World, key: str) -> float:
    return float(world.store.manifest("verdicts", key).facts["recall_vs_exact"])


@pytest.mark.slow
def test_a_drift_that_cannot_be_measured_stops_no_refresh(world: World) -> None:
    later = "r1-s0000004"
    assert world.materialise(*REFRESH, key=START).success
    worlds.train(world.store, "r1", 4)
    name = next(iter(world.store.manifest("indexes", START).files))
    (world.store.path("indexes", START) / name).unlink()
    assert world.materialise(*REFRESH, key=later).success
    assert world.store.require_live().index == later and not world.store.has("drifts", later)


@pytest.mark.slow
def test_old_versions_are_dropped_when_a_new_one_goes_live(world: World) -> None:
    from realm_core.artifacts import settings

    settings.change(world.store, ["retention.keep_indexes=2", "retention.grace_seconds=0"])
    for step in (0, 4, 8, 12):
        if step:
            worlds.train(world.store, "r1", step)
        assert world.materialise(*REFRESH, key=f"r1-s{step:07d}").success
    promoted = world.metadata("promoted_index", "r1-s0000012")
    assert promoted["dropped by retention"] == "r1-s0000004"
    assert world.store.is_pruned("r1-s0000004") or not list(world.store.path("indexes", "r1-s0000004").glob("*.npy"))


def test_promotion_is_observed_on_the_live_pointer(world: World) -> None:
    assert world.materialise(*REFRESH, key=START).success
    records = world.instance.fetch_observations(AssetKey("live_index_pointer"), limit=5).records
    assert [record.asset_observation.tags["dagster/data_version"] for record in records] == [
        world.store.require_live().index_digest
    ]


def test_a_partition_of_realm_checkpoint_trains_the_segment_up_to_its_step(world: World) -> None:
    assert world.materialise(*REFRESH, key=START).success
    assert world.materialise("realm_checkpoint", key="r1-s0000004").success
    manifest = world.store.manifest("checkpoints", "r1-s0000004")
    assert data_version(world.newest_event("realm_checkpoint", "r1-s0000004")) == manifest.digest
    assert manifest.parents["live_index"] == world.store.require_live().index_digest
    assert world.store.checkpoints("r1") == [START, "r1-s0000004"]


@pytest.mark.slow
def test_segments_and_a_long_trainer_in_turns_leave_what_one_of_them_alone_does(world: World, tmp_path: Path) -> None:
    assert world.materialise(*REFRESH, key=START).success
    alone = Store(Path(shutil.copytree(world.store.home, tmp_path / "alone")))
    worlds.train(alone, "r1", 12)
    assert world.materialise("realm_checkpoint", key="r1-s0000004").success
    worlds.train(world.store, "r1", 8)  # the body of the long trainer
    assert world.tracker.ended == {}
    assert world.materialise("realm_checkpoint", key="r1-s0000012").success
    assert world.tracker.ended == {"r1": "FINISHED"}
    for key in alone.names("checkpoints"):
        assert world.store.manifest("checkpoints", key).digest == alone.manifest("checkpoints", key).digest


@pytest.mark.slow
def test_a_segment_may_end_anywhere_and_the_next_one_goes_on_from_there(world: World) -> None:
    assert world.materialise(*REFRESH, key=START).success
    for key in ("r1-s0000003", "r1-s0000006"):
        assert world.materialise("realm_checkpoint", key=key).success
    assert world.store.names("checkpoints") == [START, "r1-s0000003", "r1-s0000004", "r1-s0000006"]
    result = world.materialise("realm_checkpoint", key="r1-s0000005")
    assert "the run is at r1-s0000006 already and left none there" in failures(result)["realm_checkpoint"]
    result = world.materialise("realm_checkpoint", key="r1-s0000013")
    assert "the run ends at pretrain.steps=12" in failures(result)["realm_checkpoint"]


@pytest.mark.slow
def test_a_segment_waits_for_no_trainer_and_trains_beside_none(world: World) -> None:
    assert world.materialise(*REFRESH, key=START).success
    with world.store.training_lease("r1").hold("a trainer of r1", by="the detached trainer"):
        result = world.materialise("realm_checkpoint", key="r1-s0000004")
    assert "a trainer of r1 already runs as process" in failures(result)["realm_checkpoint"]
    assert world.store.names("checkpoints") == [START]


def test_a_reader_is_tuned_and_scored_on_one_index_version(world: World) -> None:
    assert world.materialise(*REFRESH, key=START).success
    assert world.materialise("qa_reader", "qa_result", key=START).success
    reader, result = (world.store.manifest(kind, START) for kind in ("readers", "results"))
    assert reader.parents["index"] == result.parents["index"] == world.store.require_live().index_digest
    assert data_version(world.newest_event("qa_result", START)) == result.digest
    assert "test/exact_match" in dict(world.tracker.sinks["r1"].rows)[0]


@pytest.fixture
def unqualified(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world whose index finds three in ten of what exact search finds."""
    monkeypatch.setattr(qualify, "recall_against_exact", lambda *_: 0.3)
    return world


def test_a_failing_check_fails_the_run_and_leaves_the_pointer(unqualified: World) -> None:
    result = unqualified.materialise(*REFRESH, key=START)
    assert not result.success
    verdicts = {evaluation.check_name: evaluation.passed for evaluation in result.get_asset_check_evaluations()}
    assert verdicts == {**dict.fromkeys(CHECKS, True), "recall_vs_bruteforce": False}
    assert unqualified.store.live() is None
    assert not unqualified.instance.get_materialized_partitions(AssetKey("promoted_index"))
    assert unqualified.tracker.aliases == {}


def test_promotion_alone_in_another_run_is_refused_by_the_library(unqualified: World) -> None:
    unqualified.materialise(*REFRESH, key=START)
    alone = unqualified.materialise("promoted_index", key=START)
    assert not alone.success
    assert "recall_vs_bruteforce" in failures(alone)["promoted_index"]
    assert unqualified.store.live() is None


def test_promotion_of_what_was_never_qualified_is_refused(world: World) -> None:
    assert world.materialise("embedding_snapshot", key=START).success
    refused = world.materialise("promoted_index", key=START)
    assert not refused.success
    assert world.store.live() is None
    assert world.materialise("mips_index", key=START).success  # its checks run with it
    (world.store.path("verdicts", START) / "manifest.json").unlink()
    assert "not qualified" in failures(world.materialise("promoted_index", key=START))["promoted_index"]
    assert world.store.live() is None


@pytest.mark.slow
def test_a_rollback_needs_a_word_and_then_passes_the_same_gate(world: World) -> None:
    assert world.materialise(*REFRESH, key=START).success
    worlds.train(world.store, "r1", 4)
    assert world.materialise(*REFRESH, key="r1-s0000004").success
    refused = world.materialise("promoted_index", key=START)
    assert "older" in failures(refused)["promoted_index"]
    assert world.store.require_live().index == "r1-s0000004"
    assert world.materialise("promoted_index", key=START, config={"allow_older": True, "reason": "worse"}).success
    live = world.store.require_live()
    assert (live.index, live.reason, live.generation) == (START, "worse", 3)


def test_an_altered_index_cannot_go_live(world: World) -> None:
    assert world.materialise("embedding_snapshot", "mips_index", key=START).success
    folder = world.store.path("indexes", START)
    name = next(iter(world.store.manifest("indexes", START).files))
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert name in failures(world.materialise("promoted_index", key=START))["promoted_index"]
    assert world.store.live() is None


def test_an_operators_error_fails_once_with_its_own_words(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def broken(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise DataError("documents.jsonl:3: not JSON; mend the line")

    monkeypatch.setattr(reembed, "run", broken)
    result = world.materialise("embedding_snapshot", key=START)
    assert failures(result) == {"embedding_snapshot": "documents.jsonl:3: not JSON; mend the line"}
    assert len(calls) == 1
    assert not [event for event in result.all_events if event.event_type_value == "STEP_UP_FOR_RETRY"]


def test_a_fault_of_the_machine_is_tried_once_more(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def flaky(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return real(*arguments, **named)

    real = reembed.run
    monkeypatch.setattr(reembed, "run", flaky)
    assert world.materialise("embedding_snapshot", key=START).success
    assert len(calls) == 2


@pytest.mark.slow
def test_queries_come_from_a_corpus_of_their_own_where_the_home_has_one(empty_store: Store, tmp_path: Path) -> None:
    news, _ = worlds.sources(tmp_path / "news", articles=8)
    settings = empty_store.settings()
    sources = {**settings["sources"], "pretrain_corpus": str(news)}
    store = Store.create(empty_store.home, empty_store.config(), sources, "tiny")
    world = World(store, dg.DagsterInstance.ephemeral())
    assert world.materialise("corpus_shards", "pretraining_shards", "ict_checkpoint").success
    made = store.manifest("pretrain_corpus", "v0001")
    assert data_version(world.newest_event("pretraining_shards")) == made.digest
    assert made.files["vocab.txt"] == store.manifest("corpus", "v0001").files["vocab.txt"]
    assert world.materialise("realm_checkpoint", key=START).success
    assert store.manifest("checkpoints", START).parents["corpus"] == made.digest
    assert world.materialise(*REFRESH[:2], key=START).success
    assert store.manifest("indexes", START).parents["corpus"] == store.manifest("corpus", "v0001").digest


def test_a_home_with_one_corpus_materialises_no_second(empty_store: Store) -> None:
    world = World(empty_store, dg.DagsterInstance.ephemeral())
    result = world.materialise("corpus_shards", "pretraining_shards", "ict_checkpoint")
    assert result.success
    assert not result.asset_materializations_for_node("pretraining_shards")
    assert empty_store.pretraining_corpus() == empty_store.newest("corpus")


def test_a_corpus_smaller_than_a_beam_is_refused_before_training(empty_store: Store) -> None:
    short = Store.create(
        empty_store.home,
        load_config(None, "tiny", ["reader.searcher_beam=5000"]),
        empty_store.settings()["sources"],
        "tiny",
    )
    result = World(short, dg.DagsterInstance.ephemeral()).materialise("corpus_shards", "ict_checkpoint")
    assert not result.success
    assert "reader.searcher_beam=5000: more than the" in failures(result)["corpus_shards"]
    assert short.names("ict") == []
