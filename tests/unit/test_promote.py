"""The gate: which index versions may go live, and in which words the others are refused."""

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from realm_core.artifacts.manifest import MANIFEST, file_sha256, read_manifest
from realm_core.artifacts.store import Store
from realm_core.errors import ArtifactError, ConfigError, GateError, RealmError
from realm_core.index.snapshot import read_matrix, write_matrix
from realm_core.model.bundle import EMBEDDER
from realm_core.params import load_config
from realm_core.stages import promote, qualify

FIRST, LATER = "r1-s0000000", "r1-s0000004"


def rewrite(folder: Path, facts: dict[str, Any] | None = None, **changes: Any) -> None:
    """Replace parts of a manifest and seal it again: what an honest but different run would have left."""
    made = read_manifest(folder)
    made = replace(made, facts={**made.facts, **(facts or {})}, **changes)
    (folder / MANIFEST).write_text(made.to_json(), encoding="utf-8")


def flip_byte(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def gate(store: Store, *overrides: str, name: str = LATER, **options: Any) -> Any:
    config = store.config()
    if overrides:
        config = config.model_copy(update={"gate": load_config(None, "tiny", overrides).gate})
        reseal_verdicts(store, config)
    return promote.run(config, store=store, name=name, **options)


def reseal_verdicts(store: Store, config: Any) -> None:
    """As if the verdicts had been given under these settings."""
    for key in store.names("verdicts"):
        rewrite(store.path("verdicts", key), config_digest=config.digest(*qualify.SECTIONS))


def test_a_qualified_version_goes_live_and_the_history_tells_why(home: Store) -> None:
    live = gate(home, reason="the refresh job")
    assert live == home.live()
    assert (live.index, live.generation, live.reason) == (LATER, 2, "the refresh job")
    assert live.index_digest == home.manifest("indexes", LATER).digest
    assert live.checkpoint_digest == home.manifest("checkpoints", LATER).digest


def test_promoting_what_is_live_changes_nothing(home: Store) -> None:
    before = home.live()
    assert gate(home, name=FIRST) == before == home.live()
    assert len(home.live_history()) == 1


def test_the_run_that_promoted_is_remembered(home: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALM_DAGSTER_RUN_ID", "dagster-7")
    assert gate(home).dagster_run_id == "dagster-7"


@pytest.mark.parametrize("reason", ["", "  "])
def test_a_move_without_a_reason_is_refused(home: Store, reason: str) -> None:
    with pytest.raises(ConfigError, match="--reason is empty; say why"):
        gate(home, reason=reason)
    assert len(home.live_history()) == 1


def unqualified(store: Store) -> None:
    shutil.rmtree(store.path("verdicts", LATER))


def failed(store: Store) -> None:
    folder = store.path("verdicts", LATER)
    findings = {**read_manifest(folder).facts["findings"], "recall_vs_bruteforce": {"passed": False, "found": 0.3}}
    rewrite(folder, {"passed": False, "findings": findings})


def verdict_of_another(store: Store) -> None:
    folder = store.path("verdicts", LATER)
    rewrite(folder, parents={**read_manifest(folder).parents, "index": "f" * 64})


def verdict_edited(store: Store) -> None:
    failed(store)
    path = store.path("verdicts", LATER) / MANIFEST
    path.write_text(path.read_text("utf-8").replace('"passed": false', '"passed": true'), encoding="utf-8")


def verdict_of_laxer_settings(store: Store) -> None:
    config = load_config(None, "tiny", ["gate.min_recall_vs_exact=0"])
    rewrite(store.path("verdicts", LATER), config_digest=config.digest(*qualify.SECTIONS))


def something_else_in_place_of_the_verdict(store: Store) -> None:
    shutil.rmtree(store.path("verdicts", LATER))
    shutil.copytree(store.path("evaluations", LATER), store.path("verdicts", LATER))


def index_byte(store: Store) -> None:
    flip_byte(store.path("indexes", LATER) / "vectors.npy")


def index_file_gone(store: Store) -> None:
    (store.path("indexes", LATER) / "vectors.npy").unlink()


def checkpoint_pruned(store: Store) -> None:
    (store.path("checkpoints", LATER) / "pruned.json").touch()
    for name in (EMBEDDER, "encoder.safetensors"):
        (store.path("checkpoints", LATER) / name).unlink()


def checkpoint_byte(store: Store) -> None:
    flip_byte(store.path("checkpoints", LATER) / EMBEDDER)


def checkpoint_gone(store: Store) -> None:
    shutil.rmtree(store.path("checkpoints", LATER))


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (unqualified, GateError, "not qualified; run the refresh_index job for it, or realm qualify"),
        (failed, GateError, r"refused by its verdict \(recall_vs_bruteforce: 0\.3\); the live index stays"),
        (verdict_of_another, GateError, "its verdict is about index ffffffffffff; qualify it again"),
        (verdict_edited, ArtifactError, r"verdicts/.*it was edited"),
        (verdict_of_laxer_settings, GateError, "its verdict was given under other settings; qualify it with those of"),
        (something_else_in_place_of_the_verdict, ArtifactError, "written by stage evaluate, expected qualify"),
        (index_byte, ArtifactError, r"vectors\.npy: sha256 .*; remove r1-s0000004 and run stage index again"),
        (index_file_gone, ArtifactError, r"vectors\.npy: missing"),
        (checkpoint_pruned, ArtifactError, "checkpoints/r1-s0000004: its files were dropped by retention"),
        (checkpoint_byte, ArtifactError, r"checkpoints/r1-s0000004/embedder\.safetensors: sha256"),
        (checkpoint_gone, ArtifactError, r"its checkpoint \w{12} is not in this store; restore that folder"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_has_not_earned_it_is_refused_and_the_live_index_stays(
    home: Store, break_it: Callable, error: type[RealmError], message: str
) -> None:
    break_it(home)
    before = home.live()
    with pytest.raises(error, match=message) as caught:
        gate(home, allow_older=True)
    assert "\n" not in str(caught.value)
    assert home.live() == before
    assert len(home.live_history()) == 1


def test_an_unknown_version_is_refused(home: Store) -> None:
    with pytest.raises(ArtifactError, match=r"indexes/r1-s0000099: no manifest\.json"):
        gate(home, name="r1-s0000099")
    with pytest.raises(ConfigError, match="not an artifact name"):
        gate(home, name="../indexes/r1-s0000004")


def test_an_older_step_of_the_same_run_is_refused_without_the_word(home: Store) -> None:
    gate(home)
    with pytest.raises(
        GateError, match="r1-s0000000: older than the live r1-s0000004; to roll back, realm rollback --to"
    ):
        gate(home, name=FIRST)
    assert home.require_live().index == LATER


def test_a_rollback_with_the_word_passes_the_same_gate_and_is_remembered(home: Store) -> None:
    gate(home)
    live = gate(home, name=FIRST, allow_older=True, reason="regression seen by users")
    assert (live.index, live.generation, live.reason) == (FIRST, 3, "regression seen by users")
    assert [move.index for move in home.live_history()] == [FIRST, LATER, FIRST]


def test_a_rollback_to_an_altered_version_is_refused(home: Store) -> None:
    gate(home)
    flip_byte(home.path("indexes", FIRST) / "vectors.npy")
    with pytest.raises(ArtifactError, match="sha256"):
        gate(home, name=FIRST, allow_older=True)


def scored(store: Store, key: str, **metrics: float) -> None:
    folder = store.path("evaluations", key)
    rewrite(folder, {"metrics": metrics})


@pytest.mark.parametrize(("metric", "setting"), [("recall_at_5", "max_recall_drop"), ("exact_match", "max_em_drop")])
@pytest.mark.parametrize(
    ("old", "new", "tolerance", "goes_live"),
    [
        (0.5, 0.5, 0.0, True),
        (0.5, 0.6, 0.0, True),
        (0.5, 0.49, 0.0, False),
        (0.5, 0.46, 0.05, True),
        (0.5, 0.44, 0.05, False),
    ],
)
def test_a_metric_may_not_fall_by_more_than_the_settings_allow(
    home: Store, metric: str, setting: str, old: float, new: float, tolerance: float, goes_live: bool
) -> None:
    scored(home, FIRST, **{metric: old})
    scored(home, LATER, **{metric: new})
    if goes_live:
        assert gate(home, f"gate.{setting}={tolerance}").index == LATER
        return
    with pytest.raises(GateError, match=f"{metric} {new:.3f} against {old:.3f} of the live {FIRST}; it stays live"):
        gate(home, f"gate.{setting}={tolerance}")
    assert home.require_live().index == FIRST


@pytest.mark.parametrize("key", [FIRST, LATER])
@pytest.mark.parametrize("how", ["not scored", "metric missing"])
def test_a_metric_that_is_asked_for_must_be_there_on_both_sides(home: Store, key: str, how: str) -> None:
    if how == "not scored":
        shutil.rmtree(home.path("evaluations", key))
    else:
        scored(home, key, something_else=1.0)
    found = f"{key} has no scores" if how == "not scored" else f"the scores of {key} lack recall_at_5"
    with pytest.raises(GateError, match=f"{LATER}: cannot be compared with the live {FIRST}: {found}") as caught:
        gate(home, "gate.max_recall_drop=1.0")
    assert f"realm promote {LATER} --allow-drop has it live without that" in str(caught.value)
    assert home.require_live().index == FIRST
    assert gate(home, "gate.max_recall_drop=1.0", allow_drop=True).index == LATER


@pytest.mark.parametrize("key", [FIRST, LATER])
@pytest.mark.parametrize("other", ["questions", "number of questions", "k", "index"])
def test_scores_that_say_nothing_about_each_other_are_refused(home: Store, key: str, other: str) -> None:
    folder = home.path("evaluations", key)
    made = read_manifest(folder)
    match other:
        case "questions":
            rewrite(folder, sources={**made.sources, "dev": "f" * 64})
            text = "scored on other questions: .*ffffffffffff"
        case "number of questions":
            rewrite(folder, {"questions": 3})
            text = "scored on other questions: .*3 of dev"
        case "k":
            rewrite(folder, {"metrics": {**made.facts["metrics"], "recall_at_7": 1.0}})
            text = "scored on other k: .*7"
        case _:
            rewrite(folder, parents={**made.parents, "index": "f" * 64})
            text = f"the scores of {key} are about index ffffffffffff, it is "
    with pytest.raises(GateError, match=text):
        gate(home, "gate.max_em_drop=1.0")
    assert home.require_live().index == FIRST
    assert gate(home, "gate.max_em_drop=null").index == LATER


def test_scores_are_asked_for_by_default_and_not_of_random_weights() -> None:
    policies = {
        profile: load_config(None, profile).gate.model_dump(include={"max_recall_drop", "max_em_drop"}).values()
        for profile in ("base", "demo", "tiny")
    }
    assert {profile: list(values) for profile, values in policies.items()} == {
        "base": [0.03, 0.03],
        "demo": [0.08, 0.05],
        "tiny": [None, None],
    }


def test_a_metric_nobody_asks_for_may_be_missing(home: Store) -> None:
    shutil.rmtree(home.path("evaluations", LATER))
    assert gate(home).index == LATER


def test_of_two_promotions_at_once_the_older_never_wins(home: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refresh of an older step is overtaken between its look at the live version and its move."""
    (home.home / "live.json").unlink(missing_ok=True)
    look, overtaken = promote._require_verdict, threading.Event()
    other: list[threading.Thread] = []

    def slow(config: Any, store: Store, name: str, index: Any) -> None:
        if name == FIRST and not other:
            other.append(threading.Thread(target=lambda: (gate(Store.open(home.home)), overtaken.set())))
            other[0].start()
            assert not overtaken.wait(0.3), "the second promotion did not wait for the first"
        look(config, store, name, index)

    monkeypatch.setattr(promote, "_require_verdict", slow)
    gate(home, name=FIRST)
    other[0].join()
    assert home.require_live().index == LATER


def test_the_vectors_of_a_live_index_are_those_that_were_qualified(home: Store) -> None:
    """A rebuilt index of other content under the same name has another digest, so the old verdict does not cover it."""
    folder = home.path("indexes", LATER)
    vectors = read_matrix(folder / "vectors.npy").copy()
    vectors[0] += 1
    write_matrix(folder / "vectors.npy", vectors)
    files = {**read_manifest(folder).files, "vectors.npy": file_sha256(folder / "vectors.npy")}
    rewrite(folder, files=files)
    with pytest.raises(GateError, match="its verdict is about index"):
        gate(home)


# --- a pointer that somebody edited ----------------------------------------------------------------------------------


def edit(store: Store, **values: Any) -> None:
    path = store.home / "live.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), encoding="utf-8")


def edited_to_the_first(store: Store) -> None:
    edit(store, index=FIRST, index_digest=store.manifest("indexes", FIRST).digest)


HANDS: dict[str, Callable[[Store], None]] = {
    "the name of one and the digest of another": lambda store: edit(store, index=FIRST),
    "the digest of another": lambda store: edit(store, index_digest=store.manifest("indexes", FIRST).digest),
    "another version, consistently": edited_to_the_first,
    "a version that is gone": lambda store: edit(store, index="r1-s0000099"),
    "a name that is none": lambda store: edit(store, index="../Somewhere"),
    "another reason": lambda store: edit(store, reason="because I can"),
}


@pytest.mark.parametrize("hand", HANDS)
def test_promoting_a_version_mends_a_pointer_that_was_edited(home: Store, hand: str) -> None:
    gate(home)
    HANDS[hand](home)
    live = gate(home, reason="mended")
    assert (live.index, live.index_digest) == (LATER, home.manifest("indexes", LATER).digest)
    assert (live.generation, live.reason) == (3, "mended")
    assert home.live() == live == home.live_history()[-1]


def test_what_an_edit_made_live_can_be_made_live_in_earnest(home: Store) -> None:
    gate(home)
    edited_to_the_first(home)
    live = gate(home, name=FIRST, reason="it shall be the first")
    assert (live.index, live.generation) == (FIRST, 3)
    assert home.live() == home.live_history()[-1] == live


@pytest.mark.parametrize("text", ["", "garbage", "[]", '{"schema": 1}', '{"schema": 1, "index": 5}', "\udcff"])
def test_a_damaged_pointer_is_mended_from_the_history_by_the_next_promotion(
    home: Store, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    before = home.live()
    (home.home / "live.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert gate(home, name=FIRST) == before == home.live()
    assert "live.json: was damaged; r1-s0000000 of the last line of live.history.jsonl" in capsys.readouterr().err
    assert (home.home / "live.json.damaged").read_bytes() == text.encode("utf-8", "surrogateescape")
    assert gate(home).generation == 2
    assert capsys.readouterr().err == ""


def test_a_damaged_pointer_without_a_history_does_not_stop_a_promotion(home: Store) -> None:
    (home.home / "live.json").write_text("garbage")
    (home.home / "live.history.jsonl").unlink()
    assert gate(home).index == LATER
    assert home.live() == home.live_history()[-1]


def test_an_edit_does_not_let_an_older_step_in_where_it_names_nothing(home: Store) -> None:
    gate(home)
    edit(home, index="r1-s0000099")
    with pytest.raises(GateError, match=f"older than the live {LATER}"):
        gate(home, name=FIRST)
