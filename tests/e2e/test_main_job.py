"""The main job as a person runs it: real daemon, real detached trainer, real time."""

import json
from collections import Counter
from typing import Any

import dagster as dg
import pytest
from dagster import AssetKey, DagsterRunStatus
from mlflow import MlflowClient

from tests.e2e.homes import Home

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1500)]
CHECKS = {"no_missing_shard", "checksum", "vectors_sane", "recall_vs_bruteforce", "retriever_not_collapsed"}


def finished_runs(instance: dg.DagsterInstance, job: str) -> list[dg.DagsterRun]:
    return [run for run in instance.get_runs(dg.RunsFilter(job_name=job)) if run.is_finished]


def test_the_report_has_the_promised_keys_and_tells_one_story(finished: tuple[Home, dict[str, Any]]) -> None:
    home, report = finished
    assert json.loads((home.path / "report.json").read_text()) == report
    assert set(report) == {
        "seconds",
        "index_versions",
        "live",
        "swaps",
        "qa",
        "dagster_home",
        "mlflow",
        "training",
        "refreshes",
    }
    for version in report["index_versions"]:
        assert set(version) == {
            "checkpoint",
            "step",
            "index_digest",
            "dagster_run_id",
            "triggered_by",
            "recall_vs_exact",
            "recall_at_5",
            "exact_match",
            "age_steps",
            "null_probability",
            "drift",
            "top_k_overlap",
            "live",
            "verdict",
        }
    assert set(report["qa"]) == {"bm25", "ict", "realm"}
    assert {tuple(scores) for scores in report["qa"].values()} == {("recall_at_5", "recall_at_20", "exact_match")}
    assert all(value is not None for scores in report["qa"].values() for value in scores.values())
    assert report["live"]["checkpoint"] == "r1-s0000080"
    assert [version["checkpoint"] for version in report["index_versions"] if version["live"]] == ["r1-s0000080"]
    known = {version["index_digest"]: version for version in report["index_versions"]}
    assert report["swaps"][0]["step"] == 0
    for swap in report["swaps"]:
        assert known[swap["index_digest"]]["age_steps"] == swap["step"] - known[swap["index_digest"]]["step"]
    told = home.errors.read_text()  # what the person who waits sees of the stages in other processes
    for stage in ("encoder warm-up: 6/6", "pretrain r1: 80/80", "fine-tune reader: 6/6"):
        assert stage in told
    for name in ("report.md", "quality.png", "training.png"):
        assert (home.path / name).stat().st_size > 0


def test_the_sensor_caused_every_refresh_and_the_trainer_swapped_while_it_ran(
    finished: tuple[Home, dict[str, Any]],
) -> None:
    _, report = finished
    versions = report["index_versions"]
    assert len(versions) >= 3
    assert {version["triggered_by"] for version in versions} == {"sensor:checkpoint_sensor"}
    assert {version["verdict"] for version in versions} == {"passed"}
    assert len(report["swaps"]) >= 2
    assert report["training"]["stalled_seconds"] < report["training"]["seconds"]
    assert report["refreshes"]["measured"] == len(versions)
    assert 0 < report["refreshes"]["overhead_seconds"] < report["refreshes"]["live_after_seconds"]
    assert 0 < report["refreshes"]["live_beyond_embedding_seconds"] < report["refreshes"]["live_after_seconds"]


def test_runs_partitions_and_checks_are_in_dagsters_event_log(finished: tuple[Home, dict[str, Any]]) -> None:
    home, report = finished
    versions = {version["checkpoint"]: version for version in report["index_versions"]}
    with home.instance() as instance:
        assert Counter(run.status for run in instance.get_runs()) == {DagsterRunStatus.SUCCESS: len(versions) + 3}
        refreshes = finished_runs(instance, "refresh_index")
        assert {run.run_id for run in refreshes} == {version["dagster_run_id"] for version in versions.values()}
        assert {run.tags["dagster/sensor_name"] for run in refreshes} == {"checkpoint_sensor"}
        keys = list(instance.get_dynamic_partitions("realm_ckpt"))
        assert keys == home.store.names("checkpoints") == [f"r1-s{step:07d}" for step in range(0, 81, 20)]
        reported = instance.fetch_materializations(AssetKey("realm_checkpoint"), limit=1000).records
        assert Counter(record.partition_key for record in reported) == Counter(keys)
        for asset in ("embedding_snapshot", "mips_index", "qa_eval", "promoted_index"):
            assert instance.get_materialized_partitions(AssetKey(asset)) == set(versions)
        for record in instance.fetch_materializations(AssetKey("mips_index"), limit=1000).records:
            tags = record.asset_materialization.tags
            assert tags["dagster/data_version"] == versions[record.partition_key]["index_digest"]
        for run in refreshes:
            records = instance.get_records_for_run(run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
            found = [record.event_log_entry.dagster_event.asset_check_evaluation_data for record in records.records]
            assert {check.check_name for check in found} == CHECKS
            assert {check.partition for check in found} == {run.tags["dagster/partition"]}
            assert all(check.passed for check in found)


def test_mlflow_holds_the_numbers_of_training_and_of_every_index(finished: tuple[Home, dict[str, Any]]) -> None:
    home, report = finished
    client = MlflowClient(report["mlflow"]["tracking_uri"])
    run = client.get_run(report["mlflow"]["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["realm.run_id"] == "r1"
    assert run.data.tags["live_index_digest"] == report["live"]["index_digest"]

    def series(name: str) -> dict[int, float]:
        return {row.step: row.value for row in client.get_metric_history(run.info.run_id, name)}

    for name in ("loss", "utility", "null_probability", "index_age"):
        assert sorted(series(name)) == list(range(1, 81)), name
    for metric, key in (
        ("dev/recall_at_5", "recall_at_5"),
        ("dev/exact_match", "exact_match"),
        ("index/recall_vs_exact", "recall_vs_exact"),
    ):
        assert series(metric) == {version["step"]: version[key] for version in report["index_versions"]}, metric
    swap = report["swaps"][-1]
    step = next(
        version["step"] for version in report["index_versions"] if version["index_digest"] == swap["index_digest"]
    )
    assert series("index_age")[swap["step"] + 1] == swap["step"] - step
    assert not list((home.path / "mlflow" / "spool").glob("*.jsonl"))


def test_lineage_reaches_the_corpus_file_and_the_runs(finished: tuple[Home, dict[str, Any]]) -> None:
    home, report = finished
    nodes = json.loads(home.run("lineage", "--json"))
    nodes = nodes["nodes"] if isinstance(nodes, dict) else nodes
    kinds = Counter(node["kind"] for node in nodes)
    assert {"indexes", "snapshots", "checkpoints", "ict", "corpus"} <= set(kinds)
    assert nodes[0]["digest"] == report["live"]["index_digest"]
    assert nodes[0]["record"]["dagster_run_id"] in {version["dagster_run_id"] for version in report["index_versions"]}
    mlflow = {node["record"].get("mlflow_run_id") for node in nodes if node["kind"] == "checkpoints"}
    assert report["mlflow"]["run_id"] in mlflow


def test_a_question_is_answered_by_the_live_index(finished: tuple[Home, dict[str, Any]]) -> None:
    home, report = finished
    answer = json.loads(home.run("ask", "Which ship carried the 1918 flu to Western Samoa?", "--json"))
    assert answer["index_digest"] == report["live"]["index_digest"]
    assert answer["passages"]


def test_nothing_is_left_running(finished: tuple[Home, dict[str, Any]]) -> None:
    assert finished[0].processes() == []


def test_the_same_command_again_says_what_is_there_and_starts_nothing(finished: tuple[Home, dict[str, Any]]) -> None:
    home, report = finished
    logs = {path: path.stat().st_size for path in (home.path / "logs").iterdir()}
    assert json.loads(home.run(*home.main_job())) == report
    assert "all done before" in home.last_error()
    assert {path: path.stat().st_size for path in (home.path / "logs").iterdir()} == logs


def test_other_settings_and_a_changed_corpus_are_refused(finished: tuple[Home, dict[str, Any]]) -> None:
    home, _ = finished
    home.run(*home.main_job(), "--set=pretrain.steps=99", code=2)
    assert "pretrain.steps is 80 there, 99 now" in home.last_error()
    before = home.documents.read_bytes()
    try:
        home.documents.write_bytes(before + b'{"title": "New", "text": "Nobody knew this before."}\n')
        home.run(*home.main_job(), code=2)
        assert home.last_error().startswith(f"error: {home.documents}: changed since")
    finally:
        home.documents.write_bytes(before)
