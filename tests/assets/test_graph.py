"""The asset graph that Dagster shows: nouns, edges, partitions, and strings that select them."""

import json
import subprocess
import sys

import dagster as dg
import pytest
from dagster import AssetKey

from orchestration.definitions import defs
from orchestration.defs import jobs

PARENTS = {
    "corpus_shards": set(),
    "pretraining_shards": {"corpus_shards"},
    "question_sets": set(),
    "ict_checkpoint": {"corpus_shards"},
    "sparse_reader": {"ict_checkpoint", "corpus_shards", "question_sets"},
    "sparse_result": {"sparse_reader", "corpus_shards", "question_sets"},
    "live_index_pointer": set(),
    "realm_checkpoint": {"ict_checkpoint", "corpus_shards", "pretraining_shards", "live_index_pointer"},
    "embedding_snapshot": {"realm_checkpoint", "corpus_shards"},
    "mips_index": {"embedding_snapshot", "realm_checkpoint", "corpus_shards"},
    "qa_eval": {"mips_index", "realm_checkpoint", "sparse_reader", "question_sets"},
    "promoted_index": {"mips_index", "qa_eval"},
    "qa_reader": {"mips_index", "realm_checkpoint", "question_sets"},
    "qa_result": {"qa_reader", "mips_index", "question_sets"},
}
BY_CHECKPOINT = {
    "realm_checkpoint",
    "embedding_snapshot",
    "mips_index",
    "qa_eval",
    "promoted_index",
    "qa_reader",
    "qa_result",
}
HEAVY = ("torch", "faiss", "transformers", "mlflow", "pandas", "pyarrow")


def test_the_graph_has_the_nouns_of_the_loop_and_their_edges() -> None:
    graph = defs.resolve_asset_graph()
    found = {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys}
        for key in graph.get_all_asset_keys()
    }
    assert found == PARENTS


def test_everything_made_from_a_checkpoint_shares_its_partitions() -> None:
    graph = defs.resolve_asset_graph()
    partitioned = {key.to_user_string(): graph.get(key).partitions_def for key in graph.get_all_asset_keys()}
    names = {key: definition.name for key, definition in partitioned.items() if definition is not None}
    assert names == dict.fromkeys(BY_CHECKPOINT, "realm_ckpt")


def test_every_job_selects_its_assets_by_string() -> None:
    graph = defs.resolve_asset_graph()
    selected = {
        job.name: {key.to_user_string() for key in defs.resolve_job_def(job.name).asset_layer.executable_asset_keys}
        for job in jobs.ALL
        if job.name not in ("start_training", "estimate_refresh")  # these make no asset
    }
    assert selected == {
        "bootstrap": {
            "corpus_shards",
            "pretraining_shards",
            "question_sets",
            "ict_checkpoint",
            "sparse_reader",
            "sparse_result",
        },
        "grow_corpus": {"corpus_shards"},
        "refresh_index": {"embedding_snapshot", "mips_index", "qa_eval", "promoted_index"},
        "finetune": {"qa_reader", "qa_result"},
        "train_segment": {"realm_checkpoint"},
    }
    for names in selected.values():
        for name in names:
            assert dg.AssetSelection.from_string(name).resolve(graph) == {AssetKey(name)}
    downstream = dg.AssetSelection.from_string('key:"mips_index"+').resolve(graph)
    assert {"qa_eval", "promoted_index"} <= {key.to_user_string() for key in downstream}


def test_the_refresh_job_runs_every_check_of_the_index_and_all_of_them_block() -> None:
    graph = defs.resolve_asset_graph()
    keys = {key for key in graph.asset_check_keys if key.asset_key == AssetKey("mips_index")}
    assert {key.name for key in keys} == {
        "no_missing_shard",
        "checksum",
        "vectors_sane",
        "recall_vs_bruteforce",
        "retriever_not_collapsed",
    }
    assert all(graph.get_check_spec(key).blocking for key in keys)
    assert defs.resolve_job_def("refresh_index").asset_layer.asset_graph.asset_check_keys >= keys


def test_every_asset_says_which_code_makes_it_and_what_it_is() -> None:
    graph = defs.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.description
        assert node.group_name in ("corpus", "train", "index", "evaluate", "serving")
        assert node.code_version or not node.is_materializable


@pytest.mark.slow
def test_the_definitions_load_in_a_fresh_interpreter_without_heavy_imports_and_without_a_home(tmp_path) -> None:
    code = (
        "import json, sys, dagster as dg\n"
        "from orchestration.definitions import defs\n"
        "dg.Definitions.validate_loadable(defs)\n"
        f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == []
