"""The command line: results on standard output, one line and exit code 2 for whatever an operator can mend."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from realm_core.artifacts.manifest import read_manifest
from realm_core.artifacts.publish import read_json_lines
from realm_core.artifacts.store import Store
from realm_core.model.weight_files import CONFIG, VOCABULARY, WEIGHTS
from realm_core.params import DEFAULT_PARAMS

FIRST, LATER = "r1-s0000000", "r1-s0000004"
TINY = ("--profile", "tiny")
QUESTION = "Which ship carried the 1918 flu to Western Samoa?"


def refused(outcome: tuple[int, str, str]) -> str:
    """The message of a refusal: exit code 2, nothing on standard output, one line on standard error."""
    code, output, problem = outcome
    assert code == 2, problem
    assert output == ""
    assert problem.startswith("error: ") and problem.endswith("\n") and problem.count("\n") == 1
    assert "Traceback" not in problem
    return problem.removeprefix("error: ").strip()


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "documents.jsonl"
    rows = [{"title": "Snow", "text": "Snow fell on Mount Elbert in July 1969. Nobody was there. It melted by noon."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def params(tmp_path: Path, **changes: Any) -> Path:
    """A settings file whose profile tiny has other values."""
    values = yaml.safe_load(DEFAULT_PARAMS.read_text("utf-8"))["profiles"]["tiny"]
    for section, keys in changes.items():
        values[section] = {**values.get(section, {}), **keys} if isinstance(keys, dict) else keys
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump({"profiles": {"tiny": values}}))
    return path


# --- what works ------------------------------------------------------------------------------------------------------


def test_every_command_explains_itself(realm: Callable) -> None:
    code, output, _ = realm("--help")
    assert code == 0
    for command in ("corpus", "questions", "ict", "pretrain", "reembed", "index", "qualify", "promote", "finetune"):
        assert command in output
        assert realm(command, "--help")[0] == 0


@pytest.mark.slow
def test_the_stages_can_be_run_one_by_one_by_hand(realm: Callable, tiny_home: Store, tmp_path: Path) -> None:
    """The same folders as in a home, made with nothing but commands: the digests are those of the home."""
    out = {name: tmp_path / name for name in ("corpus", "questions", "ict", "snapshot", "index", "verdict", "reader")}
    made = {
        "corpus": realm("corpus", "build", "--input", tiny_home.source("corpus"), "--out", out["corpus"], *TINY),
        "questions": realm("questions", "--input", tiny_home.source("questions"), "--out", out["questions"], *TINY),
        "ict": realm(
            *("ict", "--corpus", out["corpus"], "--out", out["ict"], "--metrics", tmp_path / "m.jsonl", *TINY)
        ),
        "snapshot": realm(
            *("reembed", "--checkpoint", out["ict"], "--corpus", out["corpus"], "--out", out["snapshot"], *TINY)
        ),
    }
    inputs = ("--checkpoint", out["ict"], "--corpus", out["corpus"])
    made["index"] = realm("index", "--snapshot", out["snapshot"], *inputs, "--out", out["index"], *TINY)
    made["verdict"] = realm(
        *("qualify", "--index", out["index"], "--snapshot", out["snapshot"], *inputs, "--out", out["verdict"], *TINY)
    )
    made["reader"] = realm("finetune", *inputs, "--questions", out["questions"], "--out", out["reader"], *TINY)
    assert {name: outcome[0] for name, outcome in made.items()} == dict.fromkeys(made, 0)
    for name, kind in (("corpus", "corpus"), ("questions", "questions"), ("ict", "ict"), ("reader", "sparse_readers")):
        assert read_manifest(out[name]).digest == tiny_home.manifest(kind, "v0001").digest
    assert f"digest: {read_manifest(out['index']).digest}" in made["index"][1]
    assert read_json_lines(tmp_path / "m.jsonl")
    scored = realm(
        *("evaluate", "--reader", out["reader"], "--reader-start", out["ict"], "--corpus", out["corpus"]),
        *("--questions", out["questions"], "--index", out["index"], "--checkpoint", out["ict"]),
        *("--out", tmp_path / "scores", *TINY, "--json"),
    )
    assert json.loads(scored[1])["metrics"].keys() >= {"exact_match", "recall_at_5"}


def test_a_version_that_fails_its_checks_gives_exit_code_1(realm: Callable, tiny_home: Store, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    poor = ("--set", "index.backend=faiss_hnsw", *TINY)
    poor += ("--set", "index.params={m: 2, ef_construction: 2, ef_search: 1}")
    inputs = (
        *("--snapshot", tiny_home.path("snapshots", LATER), "--checkpoint", tiny_home.path("checkpoints", LATER)),
        *("--corpus", tiny_home.path("corpus", "v0001")),
    )
    assert realm("index", *inputs, "--out", tmp_path / "index", *poor)[0] == 0
    code, output, _ = realm(
        *("qualify", "--index", tmp_path / "index", *inputs, "--out", tmp_path / "verdict", *poor, "--json")
    )
    assert code == 1
    assert json.loads(output)["findings"]["recall_vs_bruteforce"]["passed"] is False


def test_promote_says_what_is_live_now(realm: Callable, home: Store) -> None:
    code, output, _ = realm("promote", LATER, "--home", home.home)
    assert (code, output) == (0, f"live: {LATER} {home.manifest('indexes', LATER).digest[:12]}, generation 2\n")
    assert realm("promote", FIRST, "--home", home.home, "--allow-older", "--reason", "back")[0] == 0
    assert home.require_live().reason == "back"


def test_pretrain_continues_a_run(realm: Callable, home: Store) -> None:
    code, output, _ = realm("pretrain", "--home", home.home, "--until", 8, "--json")
    assert code == 0 and json.loads(output)["step"] == 8


def test_ask_prints_answer_evidence_and_index_version(realm: Callable, tiny_home: Store) -> None:
    code, output, _ = realm("ask", QUESTION, "--home", tiny_home.home)
    assert code == 0
    assert f"index {FIRST} {tiny_home.manifest('indexes', FIRST).digest[:12]}, reader sparse_readers/v0001" in output
    told = json.loads(realm("ask", QUESTION, "--home", tiny_home.home, "--json", "--k", 2)[1])
    assert told["answer"] == output.splitlines()[0]
    assert len(told["passages"]) == 2


def test_asking_for_more_passages_than_there_are_is_refused(realm: Callable, tiny_home: Store) -> None:
    blocks = tiny_home.manifest("corpus", "v0001").facts["blocks"]
    message = refused(realm("ask", QUESTION, "--home", tiny_home.home, "--json", "--k", 10**6))
    assert message == f"k=1000000: more than the {blocks} blocks of the corpus; ask for fewer"


def test_a_question_of_bytes_that_are_no_text_is_refused(realm: Callable, tiny_home: Store) -> None:
    assert "holds bytes that are no text here" in refused(
        realm("ask", "\udcff\udcfe", "--home", tiny_home.home, "--json")
    )


def test_lineage_speaks_text_and_json(realm: Callable, tiny_home: Store) -> None:
    code, output, _ = realm("lineage", "--home", tiny_home.home)
    assert code == 0 and output.startswith(f"indexes/{FIRST}")
    told = json.loads(realm("lineage", LATER, "--home", tiny_home.home, "--json")[1])
    assert told["version"] == LATER and len(told["nodes"]) == 8


def test_corpus_show_prints_the_blocks_of_a_document(realm: Callable, tiny_home: Store) -> None:
    folder = tiny_home.path("corpus", "v0001")
    code, output, _ = realm("corpus", "show", folder, "--title", "A Doll's House")
    assert code == 0 and "Nora" in output and "wordpieces" in output
    blocks = json.loads(realm("corpus", "show", folder, "--title", "A Doll's House", "--json")[1])
    assert all(block["block_id"] in output for block in blocks)


def test_the_home_may_come_from_the_environment(
    realm: Callable, tiny_home: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REALM_HOME", str(tiny_home.home))
    assert realm("lineage")[0] == 0


# --- what an operator can mend ---------------------------------------------------------------------------------------


def test_an_unknown_settings_key_lists_the_known_ones(realm: Callable, documents: Path, tmp_path: Path) -> None:
    wrong = params(tmp_path, corpus={"shardz": 2})
    message = refused(realm("corpus", "build", "--input", documents, "--out", tmp_path / "c", "--params", wrong, *TINY))
    assert message.startswith(f"{wrong}: tiny: unknown key corpus.shardz; known keys here: block_wordpieces, on_error,")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("corpus.shards=0", "corpus.shards: Input should be greater than or equal to 1 (found 0)"),
        ("corpus.shards=few", "(found 'few')"),
        ("corpus.block_wordpieces=128", "blocks would be cut; lower the first or raise the second"),
        ("corpus.shards", "no '='; write --set section.key=value"),
        ("seed.x=1", "seed is a value, not a section"),
        ("corpus.tagger=magic", "magic"),
    ],
)
def test_an_impossible_value_is_refused(
    realm: Callable, documents: Path, tmp_path: Path, override: str, message: str
) -> None:
    outcome = realm("corpus", "build", "--input", documents, "--out", tmp_path / "c", "--set", override, *TINY)
    assert message in refused(outcome)


def test_an_unknown_profile_lists_those_there_are(realm: Callable, documents: Path, tmp_path: Path) -> None:
    outcome = realm("corpus", "build", "--input", documents, "--out", tmp_path / "c", "--profile", "huge")
    assert "no profile 'huge'; it has base, demo, tiny" in refused(outcome)


def test_a_place_that_cannot_be_written_is_named(realm: Callable, documents: Path, tmp_path: Path) -> None:
    outcome = realm("corpus", "build", "--input", documents, "--out", documents / "c", *TINY)
    assert "cannot be written" in refused(outcome)
    outcome = realm("ict", "--corpus", tmp_path, "--out", tmp_path / "i", "--metrics", documents / "m.jsonl", *TINY)
    assert "m.jsonl: cannot be written" in refused(outcome)


def test_a_home_that_is_none_says_how_to_make_one(realm: Callable, documents: Path, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent", documents):
        for command in (("ask", "Who?"), ("lineage",), ("promote", FIRST), ("pretrain",)):
            message = refused(realm(*command, "--home", place))
            assert message == f"{place}: not a realm home; make one with realm demo or realm run"


def test_a_home_of_a_newer_schema_is_refused_with_the_next_move(realm: Callable, home: Store) -> None:
    values = json.loads((home.home / "home.json").read_text("utf-8"))
    (home.home / "home.json").write_text(json.dumps({**values, "schema": 99}))
    for command in (("ask", "Who?"), ("lineage",), ("promote", LATER), ("pretrain",)):
        message = refused(realm(*command, "--home", home.home))
        assert "home.json: schema 99, this code reads 1; use the version that wrote it" in message


def test_an_artifact_of_a_newer_schema_is_refused_with_the_next_move(realm: Callable, home: Store) -> None:
    path = home.path("indexes", LATER) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "schema": 99}))
    message = refused(realm("promote", LATER, "--home", home.home))
    assert "manifest.json: schema 99, written by realm-ops" in message


def test_missing_weights_are_named_with_what_the_folder_must_hold(
    realm: Callable, documents: Path, tmp_path: Path
) -> None:
    weights = ("--set", f"model.weights=folder:{tmp_path / 'absent'}")
    outcome = realm("corpus", "build", "--input", documents, "--out", tmp_path / "c", *weights, *TINY)
    assert "vocab.txt: missing; model.weights must name a folder with config.json, model.safetensors and" in refused(
        outcome
    )
    corpus_of(realm, documents, tmp_path)
    outcome = realm("ict", "--corpus", tmp_path / "c", "--out", tmp_path / "i", *weights, *TINY)
    assert "model.safetensors: missing; model.weights must name a folder" in refused(outcome)


def test_weights_of_another_digest_are_refused(realm: Callable, documents: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    corpus_of(realm, documents, tmp_path)
    shutil.copy(tmp_path / "c" / "vocab.txt", folder / VOCABULARY)
    (folder / WEIGHTS).write_bytes(b"somebody else's weights")
    (folder / CONFIG).write_text("{}")
    outcome = realm(
        *("ict", "--corpus", tmp_path / "c", "--out", tmp_path / "i", *TINY),
        *("--set", f"model.weights=folder:{folder}", "--set", f"model.weights_sha256={'ab' * 32}"),
    )
    message = refused(outcome)
    assert "model.safetensors: sha256 " in message and "model.weights_sha256 says abab" in message
    assert message.endswith("do not use this file")


def corpus_of(realm: Callable, documents: Path, tmp_path: Path) -> None:
    assert realm("corpus", "build", "--input", documents, "--out", tmp_path / "c", *TINY)[0] == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "documents.jsonl:2: not JSON"),
        ("[1]", "documents.jsonl:2: a JSON list, expected an object"),
        ('{"title": "B"}', "documents.jsonl:2: the field 'text' is missing; found title"),
        ('{"title": "B", "text": 3}', "documents.jsonl:2: the field 'text' is int, expected text"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(
    realm: Callable, documents: Path, tmp_path: Path, line: str, message: str
) -> None:
    with documents.open("a") as file:
        file.write(line + "\n")
    outcome = realm("corpus", "build", "--input", documents, "--out", tmp_path / "c", *TINY)
    assert message in refused(outcome)
    assert not (tmp_path / "c").exists()


def test_an_empty_corpus_is_refused(realm: Callable, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    outcome = realm("corpus", "build", "--input", tmp_path / "empty.jsonl", "--out", tmp_path / "c", *TINY)
    assert "empty.jsonl: no documents among 0 lines; expected one JSON object with title and text a line" in refused(
        outcome
    )


def test_a_corpus_of_one_block_is_too_small_to_learn_from(realm: Callable, documents: Path, tmp_path: Path) -> None:
    corpus_of(realm, documents, tmp_path)
    outcome = realm("ict", "--corpus", tmp_path / "c", "--out", tmp_path / "i", *TINY)
    assert "1 block; the inverse cloze task needs two to choose from" in refused(outcome)


def test_ask_before_anything_is_live_says_how_to_get_there(realm: Callable, home: Store) -> None:
    (home.home / "live.json").unlink()
    for command in (("ask", "Who?"), ("lineage",)):
        message = refused(realm(*command, "--home", home.home))
        assert message == f"{home.home}: no index is live yet; run realm demo, realm run, or promote one"


def test_an_empty_question_and_no_passages_are_refused(realm: Callable, tiny_home: Store) -> None:
    assert "the question is empty" in refused(realm("ask", " ", "--home", tiny_home.home))
    assert "'--k'" in refused(realm("ask", "Who?", "--home", tiny_home.home, "--k", 0))


def test_a_refused_promotion_says_why(realm: Callable, home: Store) -> None:
    shutil.rmtree(home.path("verdicts", LATER))
    assert f"{LATER}: not qualified" in refused(realm("promote", LATER, "--home", home.home))


def test_pretrain_before_its_inputs_names_what_is_missing(realm: Callable, home: Store) -> None:
    shutil.rmtree(home.home / "ict")
    assert "no ict yet; materialise it first" in refused(realm("pretrain", "--home", home.home))


def test_an_existing_folder_of_something_else_is_not_overwritten(
    realm: Callable, documents: Path, tmp_path: Path
) -> None:
    corpus_of(realm, documents, tmp_path)
    again = ("corpus", "build", "--input", documents, "--out", tmp_path / "c", *TINY)
    assert realm(*again)[0] == 0
    assert "choose another name" in refused(realm(*again, "--set", "corpus.shards=3"))
    (tmp_path / "mine").mkdir()
    outcome = realm("corpus", "build", "--input", documents, "--out", tmp_path / "mine", *TINY)
    assert "exists; artifacts are never overwritten" in refused(outcome)


def test_a_file_where_an_artifact_is_expected_is_named(realm: Callable, documents: Path, tmp_path: Path) -> None:
    assert "no manifest.json" in refused(realm("ict", "--corpus", documents, "--out", tmp_path / "i", *TINY))
    assert "no manifest.json" in refused(realm("corpus", "show", documents, "--title", "x"))


@pytest.mark.parametrize("swapped", ["corpus", "questions", "checkpoint", "reader"])
def test_a_folder_of_another_stage_is_refused(realm: Callable, tiny_home: Store, tmp_path: Path, swapped: str) -> None:
    places = {
        "corpus": tiny_home.path("corpus", "v0001"),
        "questions": tiny_home.path("questions", "v0001"),
        "checkpoint": tiny_home.path("ict", "v0001"),
        "reader": tiny_home.path("sparse_readers", "v0001"),
    }
    wrong = {**places, swapped: places["corpus" if swapped != "corpus" else "questions"]}
    if swapped != "reader":
        inputs = ("--corpus", wrong["corpus"], "--questions", wrong["questions"], "--checkpoint", wrong["checkpoint"])
        refused(realm("finetune", *inputs, "--out", tmp_path / "r", *TINY))
    refused(
        realm(
            *("evaluate", "--reader", wrong["reader"], "--reader-start", wrong["checkpoint"], "--corpus"),
            *(wrong["corpus"], "--questions", wrong["questions"], "--out", tmp_path / "e", *TINY),
        )
    )


@pytest.mark.parametrize("group", [(), ("corpus",), ("verify",)])
def test_a_command_alone_shows_its_help_as_it_is_laid_out(realm: Callable, group: tuple[str, ...]) -> None:
    code, output, errors = realm(*group)
    assert (code, output) == (2, "")
    assert errors == realm(*group, "--help")[1]


def test_the_version_is_told(realm: Callable) -> None:
    assert realm("--version") == (0, f"realm-ops {metadata.version('realm-ops')}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("corpus", "build", "--input", "x", "--out", "y", "--source", "xml"), "--source xml: unknown; choose one of"),
        (("corpus", "build", "--input", "absent.jsonl", "--out", "y"), "absent.jsonl: no such corpus file"),
        (("questions", "--input", "absent.jsonl", "--out", "y"), "absent.jsonl: no such question file"),
        (("ask",), "Missing argument"),
        (("dance",), "No such command 'dance'"),
        (("ask", "Who?", "--colour", "blue"), "No such option: --colour"),
        (
            ("evaluate", "--reader", "a", "--reader-start", "b", "--corpus", "c", "--questions", "d", "--out", "e")
            + ("--split", "all"),
            "--split all: unknown; choose one of train, dev, test",
        ),
        (
            ("evaluate", "--reader", "a", "--reader-start", "b", "--corpus", "c", "--questions", "d", "--out", "e")
            + ("--index", "i"),
            "--index and --checkpoint come together",
        ),
        (
            ("finetune", "--checkpoint", "a", "--corpus", "b", "--questions", "c", "--out", "d", "--index", "i"),
            "--index needs --snapshot",
        ),
    ],
)
def test_a_wrong_command_is_one_line(
    realm: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(realm(*arguments))


def test_a_title_that_is_not_there_is_refused(realm: Callable, tiny_home: Store) -> None:
    outcome = realm("corpus", "show", tiny_home.path("corpus", "v0001"), "--title", "a doll's house")
    assert 'no document titled "a doll\'s house"; titles are compared letter by letter' in refused(outcome)


@pytest.mark.slow
def test_a_real_process_ends_with_code_2_and_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "realm_core.cli", "ask", "Who?", "--home", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused((done.returncode, done.stdout, done.stderr)).endswith("make one with realm demo or realm run")


def test_a_line_break_in_an_argument_does_not_break_the_line(realm: Callable, documents: Path, tmp_path: Path) -> None:
    outcome = realm("corpus", "build", "--input", documents, "--out", tmp_path / "c", "--set", "a\nb", *TINY)
    assert refused(outcome) == "--set a b: no '='; write --set section.key=value"


@pytest.mark.slow
def test_the_main_job_in_a_home_that_cannot_be_made_ends_with_code_2_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "orchestration.cli", "demo", "--home", str(tmp_path / "file" / "home"), *TINY]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    message = refused((done.returncode, done.stdout, done.stderr))
    assert message.startswith(f"{tmp_path}/file/home: cannot be written") and "choose another --home" in message
