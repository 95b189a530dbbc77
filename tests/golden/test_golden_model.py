"""The project's own code against the reference vectors, and the runner that compares them against broken ones."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realm_core.compat import golden, golden_model
from realm_core.compat.golden import FAMILIES, GoldenResult, find_cases, run_case, run_golden, summarise
from realm_core.compat.golden_case import Section
from realm_core.errors import DataError
from realm_core.text.blocks import document_uid
from realm_core.text.tokenizer import SPECIAL_TOKENS, Tokenizer


@pytest.fixture(scope="module")
def results(golden_dir: Path) -> list[GoldenResult]:
    return list(run_golden(golden_dir))


def test_every_reference_value_is_met(results: list[GoldenResult]) -> None:
    misses = [f"{result.case} ({result.precision}): {result.message}" for result in results if not result.ok]
    assert not misses, "\n".join(misses[:20])


def test_every_family_is_exercised_in_each_of_its_precisions(golden_dir: Path, results: list[GoldenResult]) -> None:
    seen = {(result.case.partition(": ")[0], result.precision) for result in results}
    sets = {case.set_name for case in find_cases(golden_dir)}
    for name, family in FAMILIES.items():
        file, _, section = name.partition(".")
        for precision in family.precisions:
            cases = {(f"{file}_{each}" + (f"/{section}" if section else ""), precision) for each in sets}
            assert cases & seen, f"{name} in {precision}"


def test_every_output_of_the_model_files_is_compared_in_both_precisions(
    golden_dir: Path, results: list[GoldenResult]
) -> None:
    for case in find_cases(golden_dir):
        if not case.path("outputs.npz").is_file():
            continue
        names = {key.removesuffix("/f32").removesuffix("/f64") for key in case.arrays("outputs.npz")}
        for precision in ("float32", "float64"):
            compared = {result.case for result in results if result.precision == precision}
            assert {f"{case.name}: {name}" for name in names} <= compared


def copied(golden_dir: Path, tmp_path: Path, family: str, as_set: str) -> Path:
    """The files of one family under another set name."""
    case = next((case for case in find_cases(golden_dir) if case.family == family), None)
    if case is None:
        pytest.skip(f"no {family} among the reference vectors")
    for path in golden_dir.glob(f"{case.name}.*"):
        shutil.copy(path, tmp_path / path.name.replace(f"{case.name}.", f"{family}_{as_set}."))
    return tmp_path


def altered(path: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    arrays[name] = change(arrays.get(name, np.zeros(0)))
    path.chmod(0o644)
    np.savez(path, allow_pickle=False, **arrays)


def test_a_set_of_any_name_is_found_and_a_changed_value_is_a_miss(golden_dir: Path, tmp_path: Path) -> None:
    folder = copied(golden_dir, tmp_path, "RealmEmbedder", as_set="other7")
    altered(folder / "RealmEmbedder_other7.outputs.npz", "query/loss/f64", lambda loss: loss + 1e-6)
    altered(folder / "RealmEmbedder_other7.outputs.npz", "doc/pooler_output/f32", lambda pooled: pooled[:, 1:])
    misses = {(result.case, result.precision): result for result in run_golden(folder) if not result.ok}
    assert set(misses) == {
        ("RealmEmbedder_other7: query/loss", "float64"),
        ("RealmEmbedder_other7: doc/pooler_output", "float32"),
    }
    assert misses["RealmEmbedder_other7: query/loss", "float64"].error == pytest.approx(1e-6, rel=1e-3)
    assert "shape" in misses["RealmEmbedder_other7: doc/pooler_output", "float32"].message


def test_an_output_nobody_computes_and_a_number_that_is_none_are_misses(golden_dir: Path, tmp_path: Path) -> None:
    folder = copied(golden_dir, tmp_path, "RealmEmbedder", as_set="c")
    outputs = folder / "RealmEmbedder_c.outputs.npz"
    altered(outputs, "query/loss/f64", lambda loss: loss * np.nan)
    altered(outputs, "query/entropy/f64", lambda _: np.zeros(2))
    misses = {result.case: result.message for result in run_golden(folder) if not result.ok}
    assert misses["RealmEmbedder_c: query/entropy"] == "not computed"
    assert "beyond" in misses["RealmEmbedder_c: query/loss"]


def test_missing_files_unknown_families_and_damage_are_misses_that_hide_nothing(
    golden_dir: Path, tmp_path: Path
) -> None:
    folder = copied(golden_dir, tmp_path, "RealmScorer", as_set="c")
    (folder / "RealmScorer_c.state.safetensors").unlink()
    (folder / "tf_original_c.json").write_text(
        json.dumps({"vocab": [], "document_uid": [{"title": "", "body": "", "uid_hex": "00"}], "telepathy": [1]})
    )
    (folder / "RealmTokenizerFast_c.json").write_text("{")
    lines = {line.case: line for line in summarise(run_golden(folder))}
    assert set(lines) == {
        "RealmScorer_c",
        "RealmTokenizerFast_c",
        "tf_original_c/document_uid",
        "tf_original_c/telepathy",
    }
    assert not any(line.ok for line in lines.values())
    assert "cannot run" in lines["RealmScorer_c"].message
    assert "349df205" in lines["tf_original_c/document_uid"].message
    assert "no code here" in lines["tf_original_c/telepathy"].message


def test_a_folder_without_cases_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match="name the folder with"):
            list(run_golden(folder))


def test_one_case_can_be_run_alone(golden_dir: Path) -> None:
    case = find_cases(golden_dir)[0]
    assert {result.case.partition(": ")[0].partition("/")[0] for result in run_case(case)} == {case.name}


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of all strings, numbers, booleans and nulls of a JSON tree."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(each, (*place, key))
    else:
        yield place


def with_change(content: Any, place: tuple[Any, ...]) -> Any:
    """The tree with one value changed."""
    changed = copy.deepcopy(content)
    holder = changed
    for step in place[:-1]:
        holder = holder[step]
    old = holder[place[-1]]
    number = isinstance(old, int | float) and not isinstance(old, bool)
    holder[place[-1]] = old + abs(old) + 1 if number else not old if isinstance(old, bool) else f"{old}x"
    return changed


def one_of_each(content: Any) -> dict[tuple[str, ...], tuple[Any, ...]]:
    """The last value under every sequence of keys; a list's positions do not tell places apart."""
    return {tuple(step for step in place if isinstance(step, str)): place for place in leaves(content)}


# Values that the reference was given, and words for people: a change asks another question, and may have the same answer.
GIVEN = {
    "featurizer": {
        *("query_seq_len", "candidate_seq_len", "num_candidates", "max_masks", "separate_candidate_segments"),
        *("text", "span", "export_timestamp"),
    },
    "evaluation": {"prediction", "pattern"},
    "postprocess_candidates": {"retrieved", "query_doc"},
    "wiki_preprocessor": {"text", "max_block_length"},
    "ict_examples": {"mask_rate", "sentence_starts"},
    "realm_model_fn": {"note", "mlm_mask"},
    "bert_adam": {"model"},
    "orqa": {"case", "gold_starts", "gold_ends", "retriever_logits", "reader_logits"},
    "orqa_ops": {"blocks"},
}


@pytest.mark.slow
def test_no_value_of_a_json_file_can_change_unnoticed(golden_dir: Path) -> None:
    for path in sorted(golden_dir.glob("tf_original_*.json")):
        content = json.loads(path.read_text())
        for section in content.keys() - {"vocab"}:
            for keys, place in one_of_each(content[section]).items():
                if GIVEN.get(section, set()).isdisjoint(keys):
                    results = run_section(section, with_change(content[section], place), content)
                    assert not all(result.ok for result in results), f"{section}: {place}"


def run_section(section: str, content: Any, file: dict[str, Any] | None = None) -> list[GoldenResult]:
    return list(golden._run(section, FAMILIES[f"tf_original.{section}"], Section(content, file or {})))


def test_a_json_value_that_nothing_compares_is_a_miss_and_named() -> None:
    case = {"title": "T", "body": "b", "uid_hex": document_uid("T", "b")}
    assert all(result.ok for result in run_section("document_uid", [case]))
    results = run_section("document_uid", [case, case | {"more": {"deep": 1}}])
    assert [(result.case, result.message) for result in results if not result.ok] == [
        ("document_uid: 1/more", "no check here looks at this value")
    ]


def test_an_extra_file_is_compared_too(golden_dir: Path, tmp_path: Path) -> None:
    folder = copied(golden_dir, tmp_path, "RealmForOpenQA", as_set="c")
    path = folder / "RealmForOpenQA_c.extra.json"
    extra = json.loads(path.read_text())
    extra["answer_ids"]["q0"].append([4, 4, 4])  # [MASK] stands in no block
    extra["predictions"]["eval/q1"] += " x"
    path.chmod(0o644)
    path.write_text(json.dumps(extra | {"telepathy": 1}))
    misses = {result.case for result in run_golden(folder) if not result.ok}
    assert misses == {
        f"RealmForOpenQA_c: extra/{name}" for name in ("answer_ids/q0", "predictions/eval/q1", "telepathy")
    }


def test_the_projection_has_the_epsilon_of_the_configuration() -> None:
    sizes = {
        "vocab_size": 9,
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 4,
    }
    rest = {"max_position_embeddings": 8, "type_vocab_size": 2, "hidden_dropout_prob": 0.0, "retriever_proj_size": 3}
    config = {**sizes, **rest, "layer_norm_eps": 1e-3}
    assert golden_model.embedder_of(config).projection_eps == 1e-3
    assert golden_model.retriever_of(config, share=False).query_tower.projection_eps == 1e-3
    with pytest.raises(DataError, match="hidden_act is 'gelu'"):
        golden_model.embedder_of(config | {"hidden_act": "gelu"})


VOCABULARY = [*SPECIAL_TOKENS, *"abcdefghijklmnopqrstuvwxyz.&"]


def ict_case(sentences: list[list[int]], chosen: int, removed: bool) -> dict[str, Any]:
    """The pair made of one sentence, written down without the project's code: [CLS] is 2, [SEP] 3 and padding 0."""
    body = [piece for n, sentence in enumerate(sentences) for piece in sentence if not (removed and n == chosen)]
    query, document = [2, *sentences[chosen][:4], 3], [2, 7, 3, *body[:96], 3]
    segments = [0] * 3 + [1] * (len(document) - 3)
    rows = {"query_ids": (query, 6), "query_mask": ([1] * len(query), 6), "block_ids": (document, 100)}
    rows |= {"block_mask": ([1] * len(document), 100), "block_segment_ids": (segments, 100)}
    return {
        "mask_rate": float(removed),
        "query_seq_len": 6,
        "block_seq_len": 100,
        "title_ids": [7],
        "token_ids": [piece for sentence in sentences for piece in sentence],
        "sentence_starts": np.cumsum([0, *map(len, sentences)])[:-1].tolist(),
        "result": {
            "keep_example": len(sentences) > removed,
            "mask_query": removed,
            **{name: row + [0] * (length - len(row)) for name, (row, length) in rows.items()},
        },
    }


def test_ict_pairs_of_any_sentence_of_a_block_agree_even_if_sentences_begin_alike() -> None:
    many = [[5 + n % 20, 6 + n // 20, 8] for n in range(400)]
    alike = [[9, 9, 9, 9, 5], [10, 11], [9, 9, 9, 9, 6], [12]]
    cases = [ict_case(many, chosen, False) for chosen in (0, 199, 399)]
    cases += [ict_case(alike, chosen, removed) for chosen in range(4) for removed in (False, True)]
    cases += [ict_case([[5, 6]], 0, removed) for removed in (False, True)]
    results = run_section("ict_examples", cases, {"vocab": VOCABULARY})
    assert [result for result in results if not result.ok] == []
    cases[5]["result"]["block_ids"][4] += 1
    misses = [result.case for result in run_section("ict_examples", cases, {"vocab": VOCABULARY}) if not result.ok]
    assert misses == ["ict_examples: 5/block_ids"]


def test_entities_of_a_text_are_resolved_as_the_reader_of_such_texts_does() -> None:
    ids = Tokenizer(VOCABULARY).ids
    sentences = ["a & b.", "c."]
    block = {"block": "a & b. c.", "title_ids": ids("t"), "token_ids": ids("a & b. c."), "sentence_starts": [0, 4]}
    case = {
        "max_block_length": 40,
        "title": "t",
        "text": "a &amp; b&#46; c.",
        "sentences": sentences,
        "blocks": [block],
    }
    results = run_section("wiki_preprocessor", {"remove_doc": {}, "blocks": [case]}, {"vocab": VOCABULARY})
    assert [result.ok for result in results] == [True]


def test_a_whole_number_in_the_place_of_a_real_one_is_compared_as_one() -> None:
    record = {"x": [[1, 0]], "kernel": [[1, 0], [0, 1]], "bias": [0, 0], "epsilon": 0.25, "out": [[1, -1]]}
    misses = [result for result in run_section("ict_projection", record) if not result.ok]
    assert [result.precision for result in misses] == ["float32", "float64"]
    assert misses[0].error == pytest.approx(1 - 0.5**0.5)
