"""Retention of snapshots and indexes, and the mirror: what goes, what may not go, and what comes back."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from realm_core.answer import Answerer
from realm_core.artifacts import mirror, retention
from realm_core.artifacts.manifest import MANIFEST, PRUNED
from realm_core.artifacts.publish import append_durably
from realm_core.artifacts.store import Store, checkpoint_key
from realm_core.errors import ArtifactError, ConfigError
from realm_core.ports import NullSink
from realm_core.stages import pretrain, promote
from tests.unit.test_promote import flip_byte

NAMES = [f"r1-s{step:07d}" for step in (0, 4, 5, 6, 7, 8)]


@pytest.fixture
def grown(home: Store) -> Store:
    """A home that seems to have six versions: copies of one, under the names of later steps."""
    for name in NAMES[2:]:
        for kind in ("snapshots", "indexes", "verdicts", "evaluations"):
            shutil.copytree(home.path(kind, NAMES[1]), home.path(kind, name))
    return home


def live(store: Store, *names: str) -> None:
    """As if these versions had gone live one after another, an hour apart, the last one two hours ago."""
    (store.home / "live.history.jsonl").unlink(missing_ok=True)
    for place, name in enumerate(names):
        row = {
            "index": name, "index_digest": name, "checkpoint_digest": "c", "generation": place + 1, "schema": 1,
            "promoted_at": 3600.0 * place, "reason": "test", "dagster_run_id": None,
        }  # fmt: skip
        append_durably(store.home / "live.history.jsonl", row)
        (store.home / "live.json").write_text(json.dumps(row), encoding="utf-8")


def dropped(store: Store, keep: int = 2, **options: float) -> list[str]:
    found = retention.collect(store, keep=keep, now=3600.0 * 100, **options)
    return [row["index"] for row in found["dropped"]]


def test_old_versions_lose_their_bytes_and_keep_their_manifests(grown: Store) -> None:
    live(grown, *NAMES)
    assert dropped(grown) == NAMES[1:4]  # kept: the two newest, which are the live one and its rollback, and the first
    for name in NAMES[1:4]:
        for kind in ("snapshots", "indexes"):
            assert sorted(path.name for path in grown.path(kind, name).iterdir()) == [MANIFEST, PRUNED]
            assert grown.manifest(kind, name)
    assert dropped(grown) == []


def test_a_dry_run_changes_nothing(grown: Store) -> None:
    live(grown, *NAMES)
    before = sorted(grown.home.rglob("*"))
    found = retention.collect(grown, keep=2, dry_run=True, now=1e9)
    assert [row["index"] for row in found["dropped"]] == NAMES[1:4]
    assert all(row["bytes"] > 0 for row in found["dropped"])
    assert sorted(grown.home.rglob("*")) == before


def test_the_live_version_and_the_one_before_it_stay_however_old(grown: Store) -> None:
    live(grown, NAMES[5], NAMES[1], NAMES[2])
    assert dropped(grown) == [NAMES[3]]


def test_what_a_trainer_searches_or_would_on_resuming_stays(grown: Store) -> None:
    live(grown, *NAMES)
    folder = grown.trainer("r1")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "swaps.jsonl").unlink(missing_ok=True)
    for step, name in ((0, NAMES[0]), (2, NAMES[1]), (9, NAMES[3])):  # the newest checkpoint is that of step 4
        append_durably(folder / "swaps.jsonl", {"step": step, "index": name, "index_digest": "x"})
    assert dropped(grown) == [NAMES[2]]


def test_what_was_live_a_moment_ago_stays_for_readers_that_are_just_opening_it(grown: Store) -> None:
    live(grown, *NAMES)
    assert dropped(grown, grace_seconds=3600.0 * 97.5) == [NAMES[1]]


def test_a_version_whose_refresh_is_not_done_stays(grown: Store) -> None:
    live(grown, NAMES[0])
    shutil.rmtree(grown.path("verdicts", NAMES[2]))
    assert NAMES[2] not in dropped(grown)


def test_a_crash_after_the_mark_is_mended_by_the_next_call(grown: Store) -> None:
    live(grown, *NAMES)
    (grown.path("indexes", NAMES[1]) / PRUNED).touch()
    dropped(grown)
    assert sorted(path.name for path in grown.path("indexes", NAMES[1]).iterdir()) == [MANIFEST, PRUNED]


def test_a_dropped_version_is_refused_by_the_gate_in_words(grown: Store) -> None:
    live(grown, *NAMES)
    dropped(grown)
    with pytest.raises(ArtifactError, match="its files were dropped by retention"):
        promote.run(grown.config(), store=grown, name=NAMES[1], allow_older=True)


def test_nothing_goes_live_while_it_is_being_dropped(grown: Store) -> None:
    """Both take the pointer's lock: whoever comes second sees what the first one did."""
    live(grown, *NAMES)
    outcome: list[str] = []

    def move() -> None:
        other = Store.open(grown.home)
        try:
            promote.run(other.config(), store=other, name=NAMES[1], allow_older=True)
        except ArtifactError as problem:
            outcome.append(str(problem))

    with grown.pointer_lock():
        thread = threading.Thread(target=move)
        thread.start()
        dropped(grown)
    thread.join()
    assert "dropped by retention" in outcome[0]


def test_the_checkpoint_of_the_rollback_is_spared(grown: Store) -> None:
    live(grown, NAMES[0], NAMES[1])
    assert grown.prune_checkpoints("r1", keep=1, spare=set()) == []


@pytest.mark.slow
def test_every_index_that_is_still_there_can_be_asked(home: Store, refresh: Callable) -> None:
    config = home.config()
    for step in (4, 6, 8, 10, 12):
        key = checkpoint_key("r1", step)
        if step > 4:
            made = {"corpus": home.newest("corpus"), "start": home.newest("ict"), "until": step}
            pretrain.run(config, store=home, training_run="r1", sink=NullSink(), **made)
            refresh(home, key)
        home.prune_checkpoints("r1", keep=2, spare=set())
        promote.run(config, store=home, name=key)
    assert len(home.names("indexes")) == 6
    for name in home.names("indexes"):
        assert Answerer.open(home, as_of=name).live.index == name


def test_the_command_says_what_goes_and_what_stays(grown: Store, realm: Callable) -> None:
    live(grown, *NAMES)
    assert realm("settings", "--home", grown.home, "--set", "retention.keep_indexes=2")[0] == 0
    assert realm("settings", "--home", grown.home, "--set", "retention.grace_seconds=0")[0] == 0
    code, output, _ = realm("gc", "--home", grown.home, "--dry-run")
    assert code == 0 and f"would drop  {NAMES[1]}" in output and f"kept  {NAMES[0]}  trainer r1 searches it" in output
    assert len(json.loads(realm("gc", "--home", grown.home, "--json")[1])["dropped"]) == 3


# --- the mirror ------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "mirror")


def test_another_machine_can_answer_from_what_was_pushed(home: Store, place: str, tmp_path: Path) -> None:
    promote.run(home.config(), store=home, name=NAMES[1])
    sent = mirror.push(home, NAMES[1], place)
    got = mirror.pull(tmp_path / "elsewhere", place)
    assert (got.version, got.artifacts, got.kept) == (NAMES[1], sent.artifacts, sent.kept)
    there = Store.open(tmp_path / "elsewhere")
    assert there.live() == home.live() and there.live_history() == home.live_history()
    question = "Which animal is it?"
    answers = [Answerer.open(store).ask(question).to_dict() for store in (home, there)]
    assert answers[0] == answers[1]
    assert there.manifest("indexes", NAMES[1]).digest == home.manifest("indexes", NAMES[1]).digest
    assert there.is_pruned(NAMES[0]) or there.has("checkpoints", NAMES[0])  # lineage goes along, as manifests


def test_a_second_push_sends_only_what_is_new(home: Store, place: str) -> None:
    mirror.push(home, NAMES[0], place)
    assert mirror.push(home, NAMES[0], place).files == 0
    later = mirror.push(home, NAMES[1], place)
    assert 0 < later.files < len(list(Path(place, "objects").rglob("*")))


@pytest.mark.parametrize("what", ["object altered", "object missing", "manifest altered", "versions file missing"])
def test_what_is_damaged_on_the_mirror_never_becomes_an_artifact(
    home: Store, place: str, tmp_path: Path, what: str
) -> None:
    mirror.push(home, NAMES[0], place)
    digest = next(iter(home.manifest("indexes", NAMES[0]).files.values()))
    stored = Path(place, "objects", digest[:2], digest)
    base = Path(place, "homes", home.identity)
    if what == "object altered":
        flip_byte(stored)
    elif what == "object missing":
        stored.unlink()
    elif what == "manifest altered":
        path = base / "indexes" / f"{NAMES[0]}.json"
        path.write_text(path.read_text().replace('"step": 0', '"step": 1'))
    else:
        (base / "versions" / f"{NAMES[0]}.json").unlink()
    with pytest.raises(ArtifactError) as caught:
        mirror.pull(tmp_path / "elsewhere", place)
    assert "\n" not in str(caught.value)
    assert not Store(tmp_path / "elsewhere").names("indexes")
    assert not (tmp_path / "elsewhere" / "live.json").exists()


def test_an_altered_artifact_does_not_leave_its_home(home: Store, place: str) -> None:
    flip_byte(home.path("indexes", NAMES[0]) / "vectors.npy")
    with pytest.raises(ArtifactError, match="sha256"):
        mirror.push(home, NAMES[0], place)
    assert not Path(place, "homes", home.identity, "versions").exists()


def test_two_homes_share_a_mirror_and_its_objects_and_are_told_apart(
    home: Store, copy_home: Callable, place: str, tmp_path: Path
) -> None:
    other = copy_home("other")
    (other.home / "home.id").unlink(missing_ok=True)
    mirror.push(home, NAMES[0], place)
    assert mirror.push(other, NAMES[0], place).files == 0  # the same bytes, kept once
    with pytest.raises(ConfigError, match="name one with --identity"):
        mirror.pull(tmp_path / "elsewhere", place)
    mirror.pull(tmp_path / "elsewhere", place, identity=other.identity)
    assert Store.open(tmp_path / "elsewhere").identity == other.identity
    with pytest.raises(ConfigError, match="another home than the one mirrored"):
        mirror.pull(tmp_path / "elsewhere", place, identity=home.identity)


def test_dropped_bytes_come_back_from_the_mirror(grown: Store, place: str) -> None:
    mirror.push(grown, NAMES[1], place, pointer=False)
    live(grown, *NAMES)
    assert NAMES[1] in dropped(grown)
    mirror.pull(grown.home, place, NAMES[1])
    assert not (grown.path("indexes", NAMES[1]) / PRUNED).exists()
    assert Answerer.open(grown, NAMES[1]).live.index == NAMES[1]


def test_an_older_pointer_does_not_overwrite_a_newer_one(home: Store, copy_home: Callable, place: str) -> None:
    behind = copy_home("behind", of=home)
    (behind.home / "home.id").write_text(home.identity + "\n")
    promote.run(home.config(), store=home, name=NAMES[1])
    mirror.push(home, NAMES[1], place)
    with pytest.raises(ArtifactError, match=r"its live\.json is of generation 2, ours is older"):
        mirror.push(behind, NAMES[0], place)
    assert json.loads(Path(place, "homes", home.identity, "live.json").read_text())["index"] == NAMES[1]


@pytest.mark.parametrize("address", ["http://somewhere/x", "s3:///nothing", ""])
def test_a_place_that_is_no_object_store_is_refused(home: Store, address: str) -> None:
    with pytest.raises(ConfigError, match="not a place for artifacts"):
        mirror.push(home, NAMES[0], address)


def test_the_commands_push_and_pull(home: Store, place: str, tmp_path: Path, realm: Callable) -> None:
    assert realm("push", "--home", home.home)[0] == 2
    code, output, _ = realm("push", "--home", home.home, "--to", place)
    assert code == 0 and output.startswith(f"pushed {NAMES[0]}: ")
    assert json.loads(realm("pull", "--home", tmp_path / "new", "--from", place, "--json")[1])["version"] == NAMES[0]
    assert realm("ask", "Which animal?", "--home", tmp_path / "new")[0] == 0


def test_copies_that_somebody_laid_beside_the_versions_stop_nothing_and_are_left_alone(grown: Store) -> None:
    live(grown, *NAMES)
    for kind in ("snapshots", "indexes", "checkpoints"):
        shutil.copytree(grown.path(kind, NAMES[1]), grown.home / kind / f"{NAMES[1]}.backup")
    (grown.home / "trainer" / "r1.old").mkdir(parents=True)
    assert dropped(grown) == NAMES[1:4]
    assert not list((grown.home / "indexes" / f"{NAMES[1]}.backup").glob(PRUNED))
