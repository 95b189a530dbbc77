"""The project's own code against the reference vectors, and the runner that compares them against broken ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from realm_core.compat.golden import FAMILIES, GoldenResult, find_cases, run_case, run_golden, summarise
from realm_core.errors import DataError


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
