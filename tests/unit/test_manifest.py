"""The manifest: what its digest covers, and which manifests are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from realm_core.artifacts.manifest import (
    MANIFEST,
    PRUNED,
    SCHEMA,
    Manifest,
    Plan,
    file_sha256,
    open_artifact,
    read_manifest,
    verify_files,
)
from realm_core.errors import ArtifactError


def made(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "stage": "index",
        "code": "1",
        "config_digest": "c" * 64,
        "parents": {"snapshot": "5" * 64},
        "sources": {"documents": "d" * 64},
        "files": {},
        "facts": {"step": 4, "recall": 0.5},
        "record": {"host": "here", "seconds": 1.5},
    }
    return Manifest(**{**values, **changes})


def written(folder: Path, manifest: Manifest) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return folder


def edit(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), encoding="utf-8")


def test_the_digest_leaves_the_record_out() -> None:
    assert made().digest == made(record={"host": "elsewhere", "dagster_run_id": "x"}).digest


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "ict"},
        {"code": "2"},
        {"config_digest": "0"},
        {"parents": {"snapshot": "6" * 64}},
        {"parents": {"corpus": "5" * 64}},
        {"sources": {}},
        {"files": {"a": "b"}},
        {"facts": {"step": 5, "recall": 0.5}},
        {"schema": SCHEMA + 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_digest_covers_everything_else(change: dict[str, Any]) -> None:
    assert made().digest != made(**change).digest


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert made(facts={"a": 1, "b": 2}).digest == made(facts={"b": 2, "a": 1}).digest


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    assert read_manifest(written(tmp_path / "a", made())) == made()


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", made())
    edit(folder, facts={"step": 4, "recall": 0.99})
    with pytest.raises(ArtifactError, match=r"manifest\.json: content gives \w{12}, it says \w{12}; it was edited"):
        read_manifest(folder)


def test_an_edited_record_is_no_reason_to_refuse(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", made())
    edit(folder, record={"note": "moved to another disk"})
    assert read_manifest(folder).digest == made().digest


def test_a_newer_schema_is_refused_with_the_next_move(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", made())
    edit(folder, schema=SCHEMA + 1, a_new_field=True, digest=None)
    with pytest.raises(
        ArtifactError,
        match=f"schema {SCHEMA + 1}, written by realm-ops .*, this code reads {SCHEMA}; use the version that",
    ):
        read_manifest(folder)


def test_a_manifest_without_its_digest_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", made())
    values = json.loads((folder / MANIFEST).read_text("utf-8"))
    del values["digest"]
    (folder / MANIFEST).write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ArtifactError, match="it says nothing; it was edited"):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"stage": "ict"}', "\x00\x00"])
def test_what_is_no_manifest_is_refused_with_the_next_move(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match="not a manifest; remove the folder and run its stage again"):
        read_manifest(tmp_path)


def test_a_manifest_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", made())
    edit(folder, colour="blue")
    with pytest.raises(ArtifactError, match="'colour'; remove the folder"):
        read_manifest(folder)


def test_a_folder_without_a_manifest_and_a_file_in_place_of_the_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(ArtifactError, match=rf"{place}: no manifest\.json"):
            read_manifest(place)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "deep").mkdir(parents=True)
    names = ("a.bin", "deep/b.bin")
    for name in names:
        (folder / name).write_bytes(name.encode() * 100)
    return written(folder, made(files={name: file_sha256(folder / name) for name in names}))


def test_an_unaltered_artifact_opens(artifact: Path) -> None:
    assert open_artifact(artifact, "index").stage == "index"


def test_one_flipped_bit_is_found_and_the_file_named(artifact: Path) -> None:
    data = bytearray((artifact / "deep/b.bin").read_bytes())
    data[500] ^= 1
    (artifact / "deep/b.bin").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"deep/b\.bin: sha256 .* remove artifact and run stage index again"):
        open_artifact(artifact)


def test_a_missing_file_is_named(artifact: Path) -> None:
    (artifact / "a.bin").unlink()
    with pytest.raises(ArtifactError, match=r"a\.bin: missing; remove artifact and run stage index again"):
        open_artifact(artifact)


def test_a_file_that_retention_dropped_is_not_called_missing(artifact: Path) -> None:
    (artifact / "a.bin").unlink()
    (artifact / PRUNED).touch()
    with pytest.raises(ArtifactError, match="dropped by retention; use a newer one"):
        open_artifact(artifact)


def test_only_the_files_asked_for_are_hashed(artifact: Path) -> None:
    (artifact / "a.bin").write_bytes(b"changed")
    verify_files(artifact, read_manifest(artifact), only="deep/")


def test_an_artifact_of_another_stage_is_refused(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="written by stage index, expected ict; pass the right folder"):
        open_artifact(artifact, "ict")


def test_a_plan_describes_the_result_of_equal_inputs_settings_and_code_only() -> None:
    parent = made(stage="reembed")
    plan = Plan(stage="index", code="1", config_digest="c" * 64, parents={"snapshot": parent}, sources={"x": "1"})
    result = made(parents={"snapshot": parent.digest}, sources={"x": "1"}, facts={"anything": 1})
    assert plan.describes(result)
    for change in ({"code": "2"}, {"config_digest": "0"}, {"parents": {}}, {"sources": {}}, {"stage": "ict"}):
        assert not plan.describes(made(**{"parents": result.parents, "sources": {"x": "1"}, **change}))
