"""The commands `realm import`, `realm export` and `realm verify`: output, exit codes and errors, through the real entry."""

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realm_core import cli
from realm_core.artifacts.manifest import read_manifest
from realm_core.text.blocks import document_uid
from tests.published import SHAPE, VOCABULARY, port_folder, tf_embedder, tf_encoder, write_bundle


def realm(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of a command line."""
    monkeypatch.setattr(sys, "argv", ["realm", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_import_export_import_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [port_folder(tmp_path / name, name) for name in ("RealmEmbedder", "RealmKnowledgeAugEncoder")]
    start, out, again = tmp_path / "start", tmp_path / "export", tmp_path / "again"
    assert realm(monkeypatch, "import", "hf", *folders, "--out", start, "--profile", "tiny") == 0
    assert f"{start}\n  stage: import\n  digest: {read_manifest(start).digest}\n" in capsys.readouterr().out
    assert realm(monkeypatch, "export", "hf", start, "--out", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)[str(out)]["classes"]["encoder"] == "RealmKnowledgeAugEncoder"
    parts = [out / "realm" / name for name in ("retriever", "encoder")]
    assert realm(monkeypatch, "import", "hf", *parts, "--out", again, "--profile", "tiny", "--json") == 0
    assert json.loads(capsys.readouterr().out)[str(again)]["stands_for"] == "ict"
    assert read_manifest(again).files == read_manifest(start).files


def test_hub_modules_are_imported_with_the_vocabulary_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modules = [write_bundle(tmp_path / "e", tf_embedder()), write_bundle(tmp_path / "b", tf_encoder())]
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    options = ["--heads", SHAPE.heads, "--out", tmp_path / "out", "--profile", "tiny"]
    assert realm(monkeypatch, "import", "tf", *modules, *options) == 2
    assert "pass --vocab FILE" in capsys.readouterr().err
    assert realm(monkeypatch, "import", "tf", *modules, *options, "--vocab", tmp_path / "vocab.txt") == 0
    assert "origin: TensorFlow embedder + TensorFlow encoder" in capsys.readouterr().out


class Payload:
    """Its pickle creates a folder when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "block_records.npy"])
def test_a_hostile_folder_gives_one_line_and_exit_code_2_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    folder, canary = port_folder(tmp_path / "hf", "RealmForOpenQA"), tmp_path / "canary"
    if file == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        (folder / file).write_bytes(pickle.dumps(Payload(canary)))
    else:
        records = np.empty(4, dtype=object)
        records[:] = [b"one", b"two", b"three", Payload(canary)]
        np.save(folder / file, records, allow_pickle=True)
    assert realm(monkeypatch, "import", "hf", folder, "--out", tmp_path / "out", "--profile", "tiny") == 2
    error = capsys.readouterr().err
    assert file in error and error.startswith("error: ") and error.count("\n") == 1
    assert not canary.exists()


def uid_case(folder: Path, wrong: bool) -> Path:
    """The smallest reference case: the identity of one document."""
    folder.mkdir()
    case = {"title": "T", "body": "b", "uid_hex": "0" * 40 if wrong else document_uid("T", "b")}
    (folder / "tf_original_x.json").write_text(json.dumps({"document_uid": [case]}))
    return folder


def test_verify_golden_prints_a_line_a_case_and_exits_1_on_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert realm(monkeypatch, "verify", "golden", uid_case(tmp_path / "right", wrong=False)) == 0
    assert capsys.readouterr().out.split() == "ok tf_original_x/document_uid exact 0.00e+00 1 of 1 agree".split()
    assert realm(monkeypatch, "verify", "golden", uid_case(tmp_path / "wrong", wrong=True)) == 1
    assert capsys.readouterr().out.startswith("MISS tf_original_x/document_uid exact")


def test_verify_golden_fails_on_a_case_it_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = uid_case(tmp_path / "right", wrong=False)
    (folder / "Unknown_x.json").write_text('{"part": [1]}')
    assert realm(monkeypatch, "verify", "golden", folder, "--json") == 1
    verdict = json.loads(capsys.readouterr().out)
    assert not verdict["passed"]
    unknown = next(case for case in verdict["cases"] if case["case"].startswith("Unknown_x"))
    assert not unknown["ok"] and unknown["largest_error"] is None and "cannot run" in unknown["message"]
    assert realm(monkeypatch, "verify", "golden", tmp_path / "nowhere") == 2
