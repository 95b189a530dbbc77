"""The stages on a home in miniature: what they make, what they recognise, and what they refuse."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from realm_core.artifacts.manifest import read_manifest
from realm_core.artifacts.store import BY_CHECKPOINT, VERSIONED, Store
from realm_core.config import Config, ModelConfig
from realm_core.errors import ArtifactError, ConfigError, DataError
from realm_core.index.snapshot import read_matrix
from realm_core.model.bundle import EMBEDDER
from realm_core.model.weights import StartWeights, load_start_weights
from realm_core.ports import MemorySink
from realm_core.stages import corpus, evaluate, finetune, ict, index, qualify, questions, reembed
from tests.versions import FIRST, LATER, SINK, open_later, reseal, set_config


def digests(store: Store) -> dict[str, str]:
    return {
        f"{kind}/{name}": store.manifest(kind, name).digest
        for kind in VERSIONED + BY_CHECKPOINT
        for name in store.names(kind)
    }


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_inputs_and_settings_give_the_same_digests_again(
    tiny_home: Store, build_home: Callable, tmp_path: Path
) -> None:
    assert digests(build_home(tmp_path / "again")) == digests(tiny_home)


@pytest.mark.slow
def test_another_seed_gives_other_digests(tiny_home: Store, build_home: Callable, tmp_path: Path) -> None:
    other = digests(build_home(tmp_path / "other", "seed=8"))
    assert not set(other.values()) & set(digests(tiny_home).values())


@pytest.mark.parametrize(
    ("positions", "named"), [(80, "lengths.joint=96 "), (95, "lengths.joint=96 "), (40, "lengths.document=64 ")]
)
def test_lengths_that_the_start_weights_cannot_hold_are_refused_before_the_first_step(
    tiny_home: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positions: int, named: str
) -> None:
    def shorter(model: ModelConfig, vocabulary: int) -> StartWeights:
        start = load_start_weights(model, vocabulary)
        return replace(start, shape=replace(start.shape, max_positions=positions))

    def refuse(*arguments: object) -> None:
        raise AssertionError("a step was made")

    monkeypatch.setattr(ict, "load_start_weights", shorter)
    monkeypatch.setattr(ict, "train_ict", refuse)
    with pytest.raises(ConfigError, match=f"{named}exceeds the {positions} positions of the model; shorten it"):
        ict.run(tiny_home.config(), corpus=tiny_home.newest("corpus"), out=tmp_path / "ict", sink=SINK)


def test_finished_work_is_not_done_again(tiny_home: Store, refresh: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("done already")

    for module in (reembed, index, qualify, evaluate, corpus, ict):
        monkeypatch.setattr(module, "building", refuse)
    before = digests(tiny_home)
    refresh(tiny_home, LATER)
    config = tiny_home.config()
    blocks = tiny_home.path("corpus", "v0001")
    corpus.run(config, source=tiny_home.source("corpus"), out=blocks, sink=SINK)
    ict.run(config, corpus=blocks, out=tiny_home.path("ict", "v0001"), sink=SINK)
    assert digests(tiny_home) == before


def test_settings_of_other_sections_do_not_spoil_finished_work(tiny_home: Store) -> None:
    config = set_config("pretrain.steps=99", "reader.steps=3", "evaluate.dev_questions=7")
    assert ict.plan(config, corpus=tiny_home.path("corpus", "v0001")).describes(tiny_home.manifest("ict", "v0001"))


# --- corpus and questions --------------------------------------------------------------------------------------------


def test_the_manifest_of_a_corpus_names_the_digest_of_every_shard(tiny_home: Store) -> None:
    made = tiny_home.manifest("corpus", "v0001")
    assert sorted(made.facts["shards"]) == ["shard-000", "shard-001"]
    for name, digest in made.facts["shards"].items():
        assert digest == made.files[f"{name}/tokens.safetensors"]
    assert made.facts["documents"] == 40 and sum(made.facts["shard_blocks"].values()) == made.facts["blocks"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"title": "A", "text": "One."}\n{"title": "B"\n', r"documents\.jsonl:2: not JSON"),
        ('{"title": "A", "text": "One."}\n\n{"title": "B"}\n', r"documents\.jsonl:3: the field 'text' is missing"),
        (
            '{"title": "A", "text": "One."}\n{"title": "A", "text": "One."}\n',
            r"documents\.jsonl:2: .*occurs more than once",
        ),
        ("", r"documents\.jsonl: no documents"),
        ("\n\n", r"documents\.jsonl: no documents"),
        ('{"title": "A", "text": ""}\n', "none of 1 documents gave a block"),
    ],
)
def test_a_wrong_document_is_named_by_file_and_line_and_nothing_is_published(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "documents.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        corpus.run(set_config(), source=tmp_path / "documents.jsonl", out=tmp_path / "out" / "v1", sink=SINK)
    assert [entry.name for entry in (tmp_path / "out").iterdir() if not entry.is_file()] == []


def test_wrong_lines_are_counted_where_the_settings_skip_them(tmp_path: Path) -> None:
    rows = ['{"title": "A", "text": "Snow fell in July 1969. Nobody was there."}', "{", '{"title": "B"}']
    (tmp_path / "documents.jsonl").write_text("\n".join(rows))
    made = corpus.run(
        set_config("corpus.on_error=skip"), source=tmp_path / "documents.jsonl", out=tmp_path / "c", sink=SINK
    )
    assert made.facts["documents"] == 1
    assert made.facts["dropped"]["bad_json"] >= 1 and made.facts["dropped"]["missing_field"] >= 1


def test_a_corpus_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for place, found in (
        (tmp_path / "absent.jsonl", "no such corpus file or folder"),
        (tmp_path, "no file whose name"),
    ):
        with pytest.raises(DataError, match=found):
            corpus.run(set_config(), source=place, out=tmp_path / "out", sink=SINK)


def test_a_split_without_questions_is_named(tmp_path: Path) -> None:
    rows = [{"question": f"Who is {i}?", "answers": ["x"], "split": "train"} for i in range(3)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="no dev questions among 3; add some, or a split field"):
        questions.run(set_config(), source=tmp_path / "q.jsonl", out=tmp_path / "out", sink=SINK)


def test_an_altered_corpus_is_not_trained_on(home: Store, tmp_path: Path) -> None:
    path = home.path("corpus", "v0001") / "shard-000" / "tokens.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\x00\x01")
    with pytest.raises(ArtifactError, match=r"shard-000/tokens\.safetensors: sha256"):
        ict.run(home.config(), corpus=home.path("corpus", "v0001"), out=tmp_path / "ict", sink=SINK)
    with pytest.raises(ArtifactError, match=r"shard-000/tokens\.safetensors: sha256"):
        embed(home, LATER, tmp_path / "snapshot")


def test_a_folder_of_another_stage_is_refused(tiny_home: Store, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="written by stage questions, expected corpus; pass the right folder"):
        ict.run(tiny_home.config(), corpus=tiny_home.path("questions", "v0001"), out=tmp_path / "ict", sink=SINK)


def test_metrics_of_the_warm_start_reach_the_sink(tiny_home: Store, tmp_path: Path) -> None:
    sink = MemorySink()
    ict.run(tiny_home.config(), corpus=tiny_home.path("corpus", "v0001"), out=tmp_path / "ict", sink=sink)
    names = {name for _, values in sink.rows for name in values}
    assert {"ict/loss", "ict/accuracy", "warmup/loss"} <= names
    assert [step for step, values in sink.rows if "warmup/loss" in values] == list(range(6))


# --- embedding -------------------------------------------------------------------------------------------------------


def embed(store: Store, key: str, out: Path, config: Config | None = None) -> Any:
    return reembed.run(
        config or store.config(),
        checkpoint=store.path("checkpoints", key),
        corpus=store.path("corpus", "v0001"),
        out=out,
        sink=SINK,
    )


def test_every_block_has_a_vector_and_the_manifest_names_the_encoder(tiny_home: Store) -> None:
    made = tiny_home.manifest("snapshots", LATER)
    for name, blocks in tiny_home.manifest("corpus", "v0001").facts["shard_blocks"].items():
        assert len(read_matrix(tiny_home.path("snapshots", LATER) / f"{name}.npy")) == blocks
    assert made.facts["encoder"] == tiny_home.manifest("checkpoints", LATER).files[EMBEDDER]
    assert (made.facts["bad_vectors"], made.facts["zero_vectors"], made.facts["step"]) == (0, 0, 4)


def test_a_pass_that_was_cut_short_keeps_its_finished_shards(
    tiny_home: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = reembed.embed_blocks, []

    def second_fails(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(reembed, "embed_blocks", second_fails)
    with pytest.raises(KeyboardInterrupt):
        embed(tiny_home, LATER, tmp_path / "s")
    monkeypatch.setattr(reembed, "embed_blocks", real)
    made = embed(tiny_home, LATER, tmp_path / "s")
    assert made.record["resumed_shards"] == 1
    assert made.digest == tiny_home.manifest("snapshots", LATER).digest


def scratch_with(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> Path:
    """The scratch folder of a pass with checkpoint `key` that ended after its last shard."""

    def stop(self: Any, digests: dict[str, str]) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reembed._Pass, "report", stop)
        with pytest.raises(KeyboardInterrupt):
            embed(store, key, tmp_path / "s")
    return tmp_path / ".s.partial"


def test_shards_of_another_checkpoint_are_not_taken_over(
    tiny_home: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch_with(tiny_home, tmp_path, monkeypatch, FIRST)
    made = embed(tiny_home, LATER, tmp_path / "s")
    assert made.record["resumed_shards"] == 0
    assert made.digest == tiny_home.manifest("snapshots", LATER).digest


def test_a_finished_shard_that_was_altered_is_embedded_again(
    tiny_home: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = scratch_with(tiny_home, tmp_path, monkeypatch, LATER)
    data = bytearray((scratch / "shard-001.npy").read_bytes())
    data[-1] ^= 1
    (scratch / "shard-001.npy").write_bytes(data)
    made = embed(tiny_home, LATER, tmp_path / "s")
    assert made.record["resumed_shards"] == 1
    assert made.digest == tiny_home.manifest("snapshots", LATER).digest


def test_what_an_attempt_with_another_corpus_left_is_not_published(
    tiny_home: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = scratch_with(tiny_home, tmp_path, monkeypatch, LATER)
    shutil.copy(scratch / "shard-000.npy", scratch / "shard-007.npy")
    (scratch / ".done.json").write_text("{")
    made = embed(tiny_home, LATER, tmp_path / "s")
    assert sorted(made.files) == ["shard-000.npy", "shard-001.npy"]
    assert sorted(entry.name for entry in (tmp_path / "s").iterdir()) == ["manifest.json", *sorted(made.files)]


def poison(store: Store, key: str) -> None:
    """Weights that are not finite, in a checkpoint that is otherwise in order."""
    path = store.path("checkpoints", key) / EMBEDDER
    tensors = load_file(path)
    tensors["embedder.cls.dense.bias"][0] = float("nan")
    save_file(tensors, path)
    reseal(store.path("checkpoints", key))


def test_a_checkpoint_of_nan_is_refused_and_leaves_nothing_behind(home: Store, tmp_path: Path) -> None:
    poison(home, LATER)
    with pytest.raises(
        ArtifactError,
        match=r"checkpoints/r1-s0000004: 320 of 320 vectors are not finite; it is broken, resume training",
    ):
        embed(home, LATER, tmp_path / "s")
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir() and entry.name != "home"] == []


def test_an_altered_checkpoint_is_not_embedded(home: Store, tmp_path: Path) -> None:
    path = home.path("checkpoints", LATER) / EMBEDDER
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ArtifactError, match=r"embedder\.safetensors: sha256"):
        embed(home, LATER, tmp_path / "s")


def test_a_checkpoint_whose_weights_were_dropped_is_not_embedded(home: Store, tmp_path: Path) -> None:
    home.path("checkpoints", LATER).joinpath("pruned.json").touch()
    with pytest.raises(ArtifactError, match="its weights were dropped by retention; embed a newer checkpoint"):
        embed(home, LATER, tmp_path / "s")


def test_a_checkpoint_of_another_vocabulary_is_refused(home: Store, tmp_path: Path) -> None:
    rows = ['{"title": "A", "text": "Snow fell in July 1969. Nobody was there."}']
    (tmp_path / "documents.jsonl").write_text("\n".join(rows))
    corpus.run(home.config(), source=tmp_path / "documents.jsonl", out=tmp_path / "c", sink=SINK)
    with pytest.raises(ArtifactError, match=r"other vocabulary than .*; build the corpus with it"):
        reembed.run(
            home.config(),
            checkpoint=home.path("checkpoints", LATER),
            corpus=tmp_path / "c",
            out=tmp_path / "s",
            sink=SINK,
        )


def test_an_empty_shard_does_not_count_in_the_smallest_norm(
    tiny_home: Store, tiny_sources: dict[str, str], tmp_path: Path
) -> None:
    lines = Path(tiny_sources["corpus"]).read_text("utf-8").splitlines()[:2]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = set_config("corpus.shards=8")
    corpus.run(config, source=tmp_path / "documents.jsonl", out=tmp_path / "c", sink=SINK)
    ict.run(config, corpus=tmp_path / "c", out=tmp_path / "i", sink=SINK)
    made = reembed.run(config, checkpoint=tmp_path / "i", corpus=tmp_path / "c", out=tmp_path / "s", sink=SINK)
    assert 0 in read_manifest(tmp_path / "c").facts["shard_blocks"].values()
    assert made.facts["norm_min"] > 0
    index.run(
        config, snapshot=tmp_path / "s", checkpoint=tmp_path / "i", corpus=tmp_path / "c", out=tmp_path / "x", sink=SINK
    )


# --- reader ----------------------------------------------------------------------------------------------------------


def test_a_reader_opens_without_the_checkpoint_it_started_from(tiny_home: Store, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_home.path("sparse_readers", "v0001"), tmp_path / "reader"))
    reader = finetune.load_reader(folder)
    assert reader.max_span_width == tiny_home.config().reader.max_span_width


def tune(store: Store, out: Path) -> Any:
    return finetune.run(
        set_config("reader.searcher_beam=300"),  # the tiny retriever finds little
        index=store.path("indexes", LATER),
        snapshot=store.path("snapshots", LATER),
        checkpoint=store.path("checkpoints", LATER),
        corpus=store.path("corpus", "v0001"),
        questions=store.path("questions", "v0001"),
        out=out,
        sink=SINK,
    )


@pytest.mark.slow
def test_fine_tuning_on_an_index_moves_the_question_tower_alone(tiny_home: Store, tmp_path: Path) -> None:
    made = tune(tiny_home, tmp_path / "reader")
    assert made.facts["retrieval"] == "dense" and made.parents["index"] == tiny_home.manifest("indexes", LATER).digest
    version = open_later(tiny_home)
    before = {name: weight.clone() for name, weight in version.retriever.query_tower.state_dict().items()}
    after = finetune.with_question_tower(version.retriever, tmp_path / "reader").query_tower.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert tune(tiny_home, tmp_path / "again").digest == made.digest


def test_a_reader_of_another_start_is_refused_in_the_evaluation(tiny_home: Store, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"not fine-tuned from .*; pass the checkpoint it started from"):
        evaluate.run(
            tiny_home.config(),
            index=None,
            checkpoint=None,
            reader=tiny_home.path("sparse_readers", "v0001"),
            reader_start=tiny_home.path("checkpoints", LATER),
            corpus=tiny_home.path("corpus", "v0001"),
            questions=tiny_home.path("questions", "v0001"),
            split="dev",
            out=tmp_path / "e",
            sink=SINK,
        )


def test_what_the_gate_and_the_report_need_is_scored_whatever_else_is_asked(tiny_home: Store, tmp_path: Path) -> None:
    made = evaluate.run(
        set_config("evaluate.ks=[3]"),
        index=None,
        checkpoint=None,
        reader=tiny_home.path("sparse_readers", "v0001"),
        reader_start=tiny_home.path("ict", "v0001"),
        corpus=tiny_home.path("corpus", "v0001"),
        questions=tiny_home.path("questions", "v0001"),
        split="dev",
        out=tmp_path / "e",
        sink=SINK,
    )
    assert {"recall_at_3", "recall_at_5", "recall_at_20"} <= made.facts["metrics"].keys()
    assert made.facts["metrics"]["recall_at_3"] <= made.facts["metrics"]["recall_at_5"]


def test_an_evaluation_keeps_every_prediction_with_its_evidence(tiny_home: Store) -> None:
    made = tiny_home.manifest("evaluations", LATER)
    rows = [
        json.loads(x) for x in (tiny_home.path("evaluations", LATER) / "predictions.jsonl").read_text().splitlines()
    ]
    assert len(rows) == made.facts["questions"] == 10
    assert made.facts["metrics"]["exact_match"] == sum(row["correct"] for row in rows) / len(rows)
    for row in rows:
        assert row["block"] in row["retrieved"]
