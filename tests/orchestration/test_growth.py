"""Growth in the loop: from a file in the inbox to a live index over the grown corpus, each step as Dagster takes it."""

import json
import os
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster import AssetKey

from orchestration.defs import growth
from realm_core.artifacts import corpora, inbox
from realm_core.artifacts.store import Store
from realm_core.corpus.shards import Corpus
from realm_core.corpus.sources import Source
from realm_core.ports import NullSink
from realm_core.stages import grow, promote
from tests.assets.test_materialisation import REFRESH, START, World, data_version, failures
from tests.orchestration import worlds

pytestmark = pytest.mark.slow
NEW = {
    "id": "quorvane",
    "title": "Quorvane",
    "text": "The glass lighthouse of Quorvane is guarded by the beast Ombrel.",
}


def put(store: Store, name: str, content: str, age: float = 60.0) -> Path:
    """A file in the inbox that was written `age` seconds ago."""
    path = store.home / "inbox" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8")
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def tick(world: World, sensor: Any) -> dg.SensorResult | str:
    """What a sensor asks for, or its reason for silence."""
    result = sensor(dg.build_sensor_context(instance=world.instance, resources={"store": world.store}))
    return str(result.skip_message) if isinstance(result, dg.SkipReason) else result


def refresh(world: World, key: str) -> dg.ExecuteInProcessResult:
    result = world.materialise(*REFRESH, key=key)
    assert result.success
    return result


@pytest.fixture
def world(store: Store) -> World:
    made = World(store, dg.DagsterInstance.ephemeral())
    refresh(made, START)
    return made


def test_a_file_in_the_inbox_ends_in_a_live_index_and_a_removal_too(world: World) -> None:
    store = world.store
    assert "nothing waits in" in tick(world, growth.inbox_sensor)
    put(store, "half.jsonl", json.dumps(NEW), age=0.0)
    put(store, "half.jsonl.part", "{")
    assert "nothing waits in" in tick(world, growth.inbox_sensor)
    put(store, "half.jsonl", json.dumps(NEW))
    put(store, "a-bad.jsonl", "no JSON\n")
    first, again = tick(world, growth.inbox_sensor), tick(world, growth.inbox_sensor)
    (request,) = first.run_requests
    assert request.run_key == again.run_requests[0].run_key and request.tags == {
        "realm/inbox": "a-bad.jsonl, half.jsonl"
    }
    assert world.materialise("corpus_shards").success
    grown = store.manifest("corpus", "v0002")
    assert data_version(world.newest_event("corpus_shards")) == grown.digest
    assert world.metadata("corpus_shards")["refused"] == "a-bad.jsonl"
    assert [path.name for path in (store.home / "inbox" / "done").iterdir()] == ["half.jsonl"]
    assert inbox.refused(store.home) == ["a-bad.jsonl"]
    assert "not JSON" in (store.home / "inbox" / "refused" / "a-bad.jsonl.reason").read_text()
    assert "nothing waits in" in tick(world, growth.inbox_sensor)

    (request,) = tick(world, growth.growth_sensor).run_requests
    key = f"{START}+v0002"
    assert (request.partition_key, request.tags) == (key, {"realm/checkpoint": START})
    assert request.run_key == f"refresh:{key}:{grown.digest}"
    refresh(world, key)
    assert store.require_live().index == key
    assert store.manifest("snapshots", key).record["embedded_blocks"] == 1
    assert world.metadata("mips_index", key)["digest"] == store.manifest("indexes", key).digest
    assert "stands on the newest corpus" in tick(world, growth.growth_sensor)

    put(store, "gone.remove", "quorvane\n")
    assert world.materialise("corpus_shards").success
    (request,) = tick(world, growth.growth_sensor).run_requests
    refresh(world, str(request.partition_key))
    assert store.require_live().index == f"{START}+v0003"
    assert Corpus.open(store.newest("corpus")).rows_titled("Quorvane") == []


def test_a_replacement_is_asked_for_by_name(world: World) -> None:
    known = Corpus.open(world.store.newest("corpus")).block(0)
    row = json.dumps({**NEW, "id": known.doc_id})
    put(world.store, "1.jsonl", row)
    put(world.store, "2.replace.jsonl", row)
    put(world.store, "3.notes", "no documents")
    assert world.materialise("corpus_shards").success
    assert inbox.refused(world.store.home) == ["1.jsonl", "3.notes"]
    corpus = Corpus.open(world.store.newest("corpus"))
    assert len(corpus.rows_titled("Quorvane")) == 1 and corpus.rows_titled(known.title) == []


def test_a_kill_between_the_version_and_the_move_of_its_file_costs_nothing(world: World) -> None:
    path = put(world.store, "new.jsonl", json.dumps(NEW))
    config = world.store.config()
    grow.apply(config, store=world.store, change=grow.Add(source=Source.find(path)), sink=NullSink())
    assert world.materialise("corpus_shards").success
    assert world.store.names("corpus") == ["v0001", "v0002"]
    assert [item.name for item in (world.store.home / "inbox" / "done").iterdir()] == ["new.jsonl"]


def test_growth_by_a_command_is_reported_and_brought_up_if_the_command_did_not(world: World, tmp_path: Path) -> None:
    path = tmp_path / "new.jsonl"
    path.write_text(json.dumps(NEW))
    store = world.store
    with corpora.growing(store):
        grow.apply(store.config(), store=store, change=grow.Add(source=Source.find(path)), sink=NullSink())
        assert tick(world, growth.growth_sensor) == "the corpus is being changed"
    result = tick(world, growth.growth_sensor)
    (event,) = result.asset_events
    assert event.asset_key == AssetKey("corpus_shards")
    assert event.tags["dagster/data_version"] == store.manifest("corpus", "v0002").digest
    assert [list(request.partition_keys) for request in result.dynamic_partitions_requests] == [[f"{START}+v0002"]]
    world.instance.report_runless_asset_event(event)
    assert not tick(world, growth.growth_sensor).asset_events


def test_a_rollback_to_the_time_before_an_addition_is_not_undone_by_the_loop(world: World) -> None:
    store = world.store
    put(store, "new.jsonl", json.dumps(NEW))
    assert world.materialise("corpus_shards").success
    refresh(world, f"{START}+v0002")
    live = promote.run(store.config(), store=store, name=START, reason="a bad document", allow_older=True)
    assert live.index == START
    assert growth.behind(store) == []


def test_bootstrap_after_growth_makes_nothing_anew(world: World) -> None:
    store = world.store
    put(store, "new.jsonl", json.dumps(NEW))
    assert world.materialise("corpus_shards").success
    names = {kind: store.names(kind) for kind in ("corpus", "questions", "ict", "sparse_readers")}
    assert names["corpus"] == ["v0001", "v0002"]
    assert world.materialise(
        "corpus_shards", "question_sets", "ict_checkpoint", "sparse_reader", "sparse_result"
    ).success
    assert {kind: store.names(kind) for kind in names} == names
    values = store.settings()
    values["sources"]["corpus"] = str(put(store, ".changed.jsonl", json.dumps(NEW)))
    (store.home / "home.json").write_text(json.dumps(values))
    result = world.materialise("corpus_shards")
    assert "restore it and bring the change with realm corpus add" in failures(result)["corpus_shards"]


def test_a_later_checkpoint_that_was_embedded_too_early_is_embedded_again(world: World, tmp_path: Path) -> None:
    store = world.store
    worlds.train(store, "r1", 4)
    config, key = store.config(), "r1-s0000004"
    assert world.materialise("embedding_snapshot", "mips_index", key=key).success
    assert store.manifest("verdicts", key).facts["passed"]
    victim = Corpus.open(store.newest("corpus")).block(0).doc_id
    grow.apply(config, store=store, change=grow.Remove(ids=[victim]), sink=NullSink())
    assert growth.behind(store) == [f"{START}+v0002"]
    refresh(world, f"{START}+v0002")
    result = world.materialise("qa_eval", "promoted_index", key=key)
    assert not result.success
    assert store.require_live().index == f"{START}+v0002"
    assert growth.behind(store) == [f"{key}+v0002"]
    refresh(world, f"{key}+v0002")
    assert store.require_live().index == f"{key}+v0002"
    assert growth.behind(store) == []
