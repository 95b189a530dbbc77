"""The store: names, versions, the live pointer, and what retention may drop."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from realm_core.artifacts.manifest import MANIFEST, PRUNED, Plan, file_sha256, read_manifest
from realm_core.artifacts.publish import building
from realm_core.artifacts.store import Store, checkpoint_key, parse_key
from realm_core.errors import ArtifactError, ConfigError
from realm_core.params import load_config

TINY = load_config(None, "tiny")
SOURCES = {"corpus": "/data/c.jsonl", "questions": "/data/q.jsonl"}


def create(home: Path) -> Store:
    return Store.create(home, TINY, SOURCES, "tiny")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return create(tmp_path / "home")


def plan(stage: str = "corpus", **sources: str) -> Plan:
    return Plan(stage=stage, code="1", config_digest="c", sources=sources)


def make(store: Store, kind: str, name: str, facts: dict | None = None, **sources: str) -> Path:
    with building(store.path(kind, name), plan(kind, **{"name": name, **sources})) as build:
        (build.folder / "weights").write_text(name)
        build.commit(facts or {})
    return store.path(kind, name)


def checkpoints(store: Store, *steps: int, run: str = "r1") -> list[str]:
    keys = [checkpoint_key(run, step) for step in steps]
    for key in keys:
        make(store, "checkpoints", key)
    return keys


# --- a home ----------------------------------------------------------------------------------------------------------


def test_a_home_opens_again_with_its_settings_and_sources(store: Store) -> None:
    assert Store.open(store.home).config() == TINY
    assert create(store.home).source("corpus") == Path("/data/c.jsonl")


def test_until_a_run_has_begun_other_settings_take_the_place_of_the_first(store: Store) -> None:
    Store.create(store.home, load_config(None, "tiny", ["seed=8"]), {**SOURCES, "corpus": "/else"}, "tiny")
    assert Store.open(store.home).config().seed == 8
    assert store.source("corpus") == Path("/else")


def test_how_the_loop_is_run_may_change_under_a_training_run(store: Store) -> None:
    make(store, "checkpoints", "r1-s0000000")
    changed = load_config(None, "tiny", ["gate.max_recall_drop=0.1", "refresh.backlog=all", "retention.keep_indexes=3"])
    Store.create(store.home, changed, SOURCES, "tiny")
    assert Store.open(store.home).config() == changed


def test_other_settings_for_a_home_with_a_training_run_are_refused_by_name(store: Store) -> None:
    make(store, "checkpoints", "r1-s0000000")
    with pytest.raises(ConfigError, match=r"config\.seed is 7 there, 8 now; pass them again or another --home"):
        Store.create(store.home, load_config(None, "tiny", ["seed=8"]), SOURCES, "tiny")
    with pytest.raises(ConfigError, match=r"sources\.corpus is '/data/c.jsonl' there, '/else' now"):
        Store.create(store.home, TINY, {**SOURCES, "corpus": "/else"}, "tiny")


def test_a_source_may_move_if_its_content_stays(store: Store, tmp_path: Path) -> None:
    (tmp_path / "moved.jsonl").write_text("documents")
    digest = file_sha256(tmp_path / "moved.jsonl")
    with building(store.path("corpus", "v0001"), replace(plan(), sources={"documents": digest})) as build:
        build.commit({})
    make(store, "checkpoints", "r1-s0000000")
    moved = {**SOURCES, "corpus": str(tmp_path / "moved.jsonl")}
    assert Store.create(store.home, TINY, moved, "tiny").source("corpus") == tmp_path / "moved.jsonl"
    (tmp_path / "other.jsonl").write_text("other documents")
    added = {
        "added": file_sha256(tmp_path / "other.jsonl")
    }  # to the corpus later, which makes it no source of the home
    with building(store.path("corpus", "v0002"), replace(plan("grow"), sources=added)) as build:
        build.commit({})
    with pytest.raises(ConfigError, match=r"sources\.corpus is .*moved.jsonl' there, .*other.jsonl' now"):
        Store.create(store.home, TINY, {**SOURCES, "corpus": str(tmp_path / "other.jsonl")}, "tiny")


def test_how_often_interim_states_are_saved_may_change(store: Store) -> None:
    make(store, "checkpoints", "r1-s0000000")
    changed = load_config(None, "tiny", ["ict.checkpoint_every=7", "reader.checkpoint_every=7"])
    assert Store.create(store.home, changed, SOURCES, "tiny").config() == changed


def test_a_folder_that_is_no_home_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(ArtifactError, match="not a realm home; make one with realm demo or realm run"):
            Store.open(place)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_home_is_refused(store: Store, text: str) -> None:
    (store.home / "home.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"home\.json: damaged; restore it or choose another --home"):
        Store.open(store.home)
    with pytest.raises(ArtifactError, match="damaged"):
        create(store.home)


def test_a_home_of_a_newer_schema_is_refused_with_the_next_move(store: Store) -> None:
    values = json.loads((store.home / "home.json").read_text())
    (store.home / "home.json").write_text(json.dumps({**values, "schema": 2, "new": 1}))
    with pytest.raises(ArtifactError, match="schema 2, this code reads 1; use the version that wrote it"):
        Store.open(store.home)


def test_a_home_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"cannot be created \(.*\); choose another --home"):
        create(tmp_path / "file" / "home")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_home_in_a_closed_folder_is_one_clear_error(tmp_path: Path, start_python: Callable) -> None:
    code = """
import os, sys
from pathlib import Path
from realm_core.artifacts.store import Store
from realm_core.params import load_config
from realm_core.errors import ArtifactError
config = load_config(None, "tiny")
os.setuid(65534)
for act in (lambda: Store.create(Path(sys.argv[1]), config, {}, "tiny"), lambda: Store.open(Path(sys.argv[1]))):
    try:
        act()
    except ArtifactError as error:
        print(error)
"""
    tmp_path.chmod(0o700)
    output, problem = start_python(code, tmp_path / "home").communicate()
    assert problem == ""
    assert output.count("Permission denied") == output.count("\n") == 2


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_key_names_run_and_step() -> None:
    assert checkpoint_key("r1", 500) == "r1-s0000500"
    assert parse_key("r1-s0000500") == ("r1", 500)


@pytest.mark.parametrize("key", ["", "r1", "r1-s5", "r1-s00005000", "R1-s0000500", "../r1-s0000500", "r1-s000050x"])
def test_what_is_no_key_is_refused_with_an_example(key: str) -> None:
    with pytest.raises(ConfigError, match="not a checkpoint key; they look like r1-s0000500"):
        parse_key(key)


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc", ".hidden", "A"])
def test_a_name_cannot_leave_its_folder(store: Store, name: str) -> None:
    with pytest.raises(ConfigError, match="not an artifact name"):
        store.path("indexes", name)


def test_half_built_and_foreign_folders_are_not_listed(store: Store) -> None:
    make(store, "corpus", "v0001")
    (store.home / "corpus" / ".v0002.partial").mkdir()
    (store.home / "corpus" / "notes").mkdir()
    (store.home / "corpus" / "file").touch()
    assert store.names("corpus") == ["v0001"]
    assert store.names("ict") == []
    assert store.has("corpus", "v0001") and not store.has("corpus", "notes")


# --- versions --------------------------------------------------------------------------------------------------------


def test_the_same_plan_always_gets_the_same_version(store: Store) -> None:
    first = store.version_for("corpus", plan(documents="a"))
    assert first.name == "v0001" == store.version_for("corpus", plan(documents="a")).name
    with building(first, plan(documents="a")) as build:
        build.commit({})
    assert store.version_for("corpus", plan(documents="a")) == first
    assert store.version_for("corpus", plan(documents="b")).name == "v0002"


def test_another_plan_gets_the_next_version_and_so_does_the_way_back(store: Store) -> None:
    for number, documents in enumerate("abc", start=1):
        with building(store.version_for("corpus", plan(documents=documents)), plan(documents=documents)) as build:
            build.commit({})
        assert store.newest("corpus").name == f"v{number:04d}"
    assert store.version_for("corpus", plan(documents="c")).name == "v0003"
    assert store.version_for("corpus", plan(documents="a")).name == "v0004"  # v0001 would not be the newest


def test_a_folder_somebody_named_otherwise_is_no_version(store: Store) -> None:
    for name in ("v0001", "vold", "v0002-backup", "zz"):
        make(store, "corpus", name)
    assert store.newest("corpus").name == "v0001"
    assert store.version_for("corpus", plan(documents="new")).name == "v0002"


def test_version_ten_thousand_comes_after_the_one_before(store: Store) -> None:
    for name in ("v9999", "v10000"):
        make(store, "corpus", name)
    assert store.newest("corpus").name == "v10000"
    assert store.version_for("corpus", plan(documents="new")).name == "v10001"


def test_without_any_version_the_kind_is_named(store: Store) -> None:
    with pytest.raises(ArtifactError, match="no ict yet; materialise it first"):
        store.newest("ict")


def test_an_artifact_is_found_by_the_beginning_of_its_digest(store: Store) -> None:
    folder = make(store, "corpus", "v0001")
    assert store.find(read_manifest(folder).digest[:8]) == folder
    assert store.find("no such digest") is None


def test_a_parent_that_is_gone_is_named(store: Store) -> None:
    folder = make(store, "corpus", "v0001")
    child = Plan(stage="ict", code="1", config_digest="c", parents={"corpus": read_manifest(folder)})
    with building(store.path("ict", "v0001"), child) as build:
        build.commit({})
    assert store.parent(store.path("ict", "v0001"), "corpus") == folder
    shutil.rmtree(folder)
    with pytest.raises(ArtifactError, match=r"its corpus \w{12} is not in this store; restore that folder"):
        store.parent(store.path("ict", "v0001"), "corpus")


def test_runs_are_those_with_a_checkpoint_or_a_trainer(store: Store) -> None:
    checkpoints(store, 0, run="r2")
    store.trainer("r1").mkdir(parents=True)
    assert store.runs() == ["r1", "r2"]


def move(store: Store, index: str, reason: str = "better") -> None:
    store.move_live(index, f"digest of {index}", f"checkpoint of {index}", reason, None)


# --- retention -------------------------------------------------------------------------------------------------------


def test_retention_spares_the_newest_the_named_and_the_live(store: Store) -> None:
    keys = checkpoints(store, 0, 5, 10, 15, 20, 25)
    move(store, keys[1])
    dropped = store.prune_checkpoints("r1", keep=2, spare={keys[0]})
    assert dropped == [keys[2], keys[3]]
    assert store.checkpoints("r1") == [keys[0], keys[1], keys[4], keys[5]]


def test_retention_leaves_other_runs_alone(store: Store) -> None:
    checkpoints(store, 0, 5, 10, run="r1")
    other = checkpoints(store, 0, 5, 10, run="r2")
    store.prune_checkpoints("r1", keep=1, spare=set())
    assert store.checkpoints("r2") == other


def test_retention_spares_what_an_index_or_a_reader_that_is_still_there_was_made_from(store: Store) -> None:
    keys = checkpoints(store, 0, 5, 10, 15, 20, 25)
    make(store, "indexes", keys[0])
    make(store, "indexes", f"{keys[1]}+v0002")
    make(store, "readers", keys[2])
    (make(store, "indexes", keys[3]) / PRUNED).touch()
    assert store.prune_checkpoints("r1", keep=1, spare=set()) == [keys[3], keys[4]]


def test_what_retention_drops_keeps_its_manifest_and_says_so(store: Store) -> None:
    keys = checkpoints(store, 0, 5, 10)
    digest = store.manifest("checkpoints", keys[0]).digest
    store.prune_checkpoints("r1", keep=1, spare=set())
    assert sorted(os.listdir(store.path("checkpoints", keys[0]))) == [MANIFEST, PRUNED]
    assert store.manifest("checkpoints", keys[0]).digest == digest
    assert store.names("checkpoints") == keys


def test_retention_finishes_what_a_crash_left_undone(store: Store) -> None:
    keys = checkpoints(store, 0, 5, 10)
    (store.path("checkpoints", keys[0]) / PRUNED).touch()  # marked, and killed before the files went
    store.prune_checkpoints("r1", keep=1, spare={keys[1]})
    assert not (store.path("checkpoints", keys[0]) / "weights").exists()
    assert (store.path("checkpoints", keys[1]) / "weights").exists()


def started(store: Store, key: str) -> None:
    (store.home / "snapshots" / f".{key}.partial").mkdir(parents=True)


@pytest.mark.parametrize(
    ("begun", "made", "verdict", "kept"),
    [
        (False, (), None, False),
        (True, (), None, True),
        (True, ("snapshots",), None, True),
        (True, ("snapshots", "verdicts"), True, True),
        (True, ("snapshots", "verdicts"), False, False),
        (True, ("snapshots", "verdicts", "evaluations"), True, False),
    ],
    ids=["never embedded", "being embedded", "embedded", "may go live", "refused", "scored"],
)
def test_retention_spares_a_checkpoint_while_it_is_refreshed(
    store: Store, begun: bool, made: tuple[str, ...], verdict: bool | None, kept: bool
) -> None:
    keys = checkpoints(store, 0, 5, 10)
    if begun:
        started(store, keys[0])
    for kind in made:
        make(store, kind, keys[0], {"passed": verdict})
    assert (keys[0] in store.prune_checkpoints("r1", keep=1, spare=set())) is not kept


def test_retention_does_not_wait_for_a_refresh_that_a_later_step_overtook(store: Store) -> None:
    keys = checkpoints(store, 0, 5, 10, 15)
    started(store, keys[0])
    started(store, keys[2])
    move(store, keys[1])
    assert store.prune_checkpoints("r1", keep=1, spare=set()) == [keys[0]]


def test_checkpoints_lose_nothing_while_the_pointer_cannot_be_read(store: Store) -> None:
    checkpoints(store, 0, 4, 8, 12)
    (store.home / "live.json").write_text("garbage")
    assert store.prune_checkpoints("r1", keep=2, spare=set()) == []
    assert not any(store.is_pruned(key) for key in store.names("checkpoints"))


# --- folders that somebody laid there --------------------------------------------------------------------------------


@pytest.fixture
def littered(store: Store) -> Store:
    """A home with copies and old folders beside what is its own."""
    checkpoints(store, 0, 4, 8, 12)
    store.trainer("r1").mkdir(parents=True)
    (store.home / "trainer" / "r1.old").mkdir()
    (store.home / "trainer" / ".DS_Store").write_text("")
    for copy in ("r1-s0000012.backup", "a-copy", "r1"):
        shutil.copytree(store.path("checkpoints", "r1-s0000012"), store.home / "checkpoints" / copy)
    return store


def test_foreign_folders_are_no_runs_and_no_checkpoints(littered: Store) -> None:
    assert littered.runs() == ["r1"]
    assert littered.checkpoints("r1") == [checkpoint_key("r1", step) for step in (0, 4, 8, 12)]
    assert littered.foreign() == [
        "checkpoints/a-copy",
        "checkpoints/r1",
        "checkpoints/r1-s0000012.backup",
        "trainer/r1.old",
    ]


def test_foreign_folders_do_not_stop_pruning_and_lose_nothing(littered: Store) -> None:
    assert littered.prune_checkpoints("r1", keep=2, spare=set()) == ["r1-s0000000", "r1-s0000004"]
    assert not (littered.home / "checkpoints" / "r1-s0000012.backup" / PRUNED).exists()


def test_a_digest_is_that_of_the_artifact_and_not_of_its_copy(littered: Store) -> None:
    digest = littered.manifest("checkpoints", "r1-s0000012").digest
    assert littered.find(digest) == littered.path("checkpoints", "r1-s0000012")
