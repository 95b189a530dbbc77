"""REALM pre-training as a series of checkpoints: the same whatever interrupts it, and honest about what served it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from realm_core.artifacts.manifest import MANIFEST, Manifest, file_sha256, read_manifest
from realm_core.artifacts.publish import read_json_lines
from realm_core.artifacts.store import Store, checkpoint_key
from realm_core.errors import ArtifactError, BusyError, ConfigError, RealmError
from realm_core.model.bundle import EMBEDDER, ENCODER
from realm_core.ports import MemorySink, MetricSink, NullSink
from realm_core.stages import pretrain, promote
from realm_core.train import follower
from realm_core.train.loop import optimizer_file

FIRST, LATER, LAST = (checkpoint_key("r1", step) for step in (0, 4, 12))


def train(store: Store, sink: MetricSink | None = None, run: str = "r1", **options: Any) -> Manifest:
    return pretrain.run(
        options.pop("config", store.config()),
        store=store,
        training_run=run,
        corpus=store.newest("corpus"),
        start=options.pop("start", store.newest("ict")),
        sink=sink or NullSink(),
        **options,
    )


def digests(store: Store, run: str = "r1") -> dict[str, str]:
    keys = [key for key in store.names("checkpoints") if key.startswith(f"{run}-")]
    return {key: store.manifest("checkpoints", key).digest for key in keys}


def set_config(store: Store, *changes: tuple[str, str, Any]) -> None:
    """Change settings of a home, as nobody should."""
    path = store.home / "home.json"
    values = json.loads(path.read_text("utf-8"))
    for section, key, value in changes:
        values["config"][section][key] = value
    path.write_text(json.dumps(values), encoding="utf-8")


@pytest.fixture(scope="module")
def uninterrupted(tiny_home: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The tiny home, trained to its last step in one go."""
    store = Store.open(Path(shutil.copytree(tiny_home.home, tmp_path_factory.mktemp("whole") / "home")))
    train(store)
    return store


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version is ready at the very step at which it is noticed: swaps do not depend on the speed of a thread."""
    monkeypatch.setattr(follower._Loading, "done", lambda self: (self._thread.join(), True)[1])


class Promote(MemorySink):
    """Lets the later index go live after so many steps."""

    def __init__(self, store: Store, after: int) -> None:
        super().__init__()
        self.store, self.after = store, after

    def log(self, step: int, values: Any) -> None:
        super().log(step, values)
        if step == self.after:
            promote.run(self.store.config(), store=self.store, name=LATER)


# --- what a checkpoint is --------------------------------------------------------------------------------------------


def test_step_zero_is_the_warm_start(tiny_home: Store) -> None:
    first, start = tiny_home.manifest("checkpoints", FIRST), tiny_home.manifest("ict", "v0001")
    assert first.files == start.files
    assert first.parents == {"ict": start.digest, "corpus": tiny_home.manifest("corpus", "v0001").digest}


def test_a_checkpoint_names_its_parent_the_live_index_and_what_served_it(tiny_home: Store) -> None:
    made = tiny_home.manifest("checkpoints", LATER)
    live = tiny_home.manifest("indexes", FIRST).digest
    assert made.parents["parent"] == tiny_home.manifest("checkpoints", FIRST).digest
    assert made.parents["live_index"] == live
    assert made.facts["index_timeline"] == [{"step": 0, "index": FIRST, "index_digest": live}]
    assert (made.facts["run"], made.facts["step"]) == ("r1", 4)
    assert {"loss", "utility", "null_probability", "index_age"} <= made.facts["metrics"].keys()


def test_training_changes_retriever_and_encoder_and_keeps_the_optimiser(tiny_home: Store) -> None:
    for name in (EMBEDDER, ENCODER):
        files = [tiny_home.manifest("checkpoints", key).files[name] for key in (FIRST, LATER)]
        assert files[0] != files[1]
    state = load_file(optimizer_file(tiny_home.path("checkpoints", LATER)))
    assert any(name.startswith("retriever/") for name in state) and any(name.startswith("encoder/") for name in state)


def test_every_step_leaves_a_row_with_the_age_of_its_index(uninterrupted: Store) -> None:
    rows = read_json_lines(uninterrupted.trainer("r1") / pretrain.STEPS)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["index_age"] for row in rows] == list(range(12))


# --- the same, whatever interrupts it --------------------------------------------------------------------------------


def test_a_run_in_parts_is_the_run_in_one_go_to_the_last_bit(home: Store, uninterrupted: Store) -> None:
    for until in (8, 12):
        train(home, until=until)
    assert digests(home) == digests(uninterrupted)


def test_a_part_that_ends_between_checkpoints_leaves_one_there_and_changes_no_weight(
    home: Store, uninterrupted: Store
) -> None:
    between = checkpoint_key("r1", 9)
    assert train(home, until=9).facts["step"] == 9
    assert home.names("checkpoints")[-1] == between
    train(home)
    for step in (8, 12):
        key = checkpoint_key("r1", step)
        assert home.manifest("checkpoints", key).files == uninterrupted.manifest("checkpoints", key).files
    assert home.manifest("checkpoints", LAST).parents["parent"] == home.manifest("checkpoints", between).digest


def test_a_step_beyond_the_last_one_is_refused(home: Store) -> None:
    with pytest.raises(ConfigError, match=r"r1: no step 13; the run ends at pretrain\.steps=12"):
        train(home, until=13)


def test_a_run_that_somebody_trains_is_refused_and_left_alone(home: Store) -> None:
    before = digests(home)
    with (
        home.training_lease("r1").hold("a trainer of r1"),
        pytest.raises(BusyError, match="a trainer of r1 already runs"),
    ):
        train(home)
    assert digests(home) == before
    train(home, until=8)
    assert home.training_lease("r1").token() == 4  # two of the fixture, the one above, and this one
    assert home.training_lease("r1").state() is None


def test_a_trainer_that_was_given_up_for_dead_publishes_nothing_more(home: Store) -> None:
    """Its successor on another machine has the next token; the one that slept wakes up in the middle of a segment."""
    before = digests(home)

    class Successor(MemorySink):
        def log(self, step: int, values: Any) -> None:
            super().log(step, values)
            if step == 6:
                lease.token_path.write_text(f"{lease.token() + 1}\n")

    lease, sink = home.training_lease("r1"), Successor()
    with pytest.raises(BusyError, match="had token 3 and token 4 was given to another, which has taken over"):
        train(home, sink)
    assert digests(home) == before
    assert sink.rows[-1][0] == 6  # not one step more
    assert [row["step"] for row in read_json_lines(home.trainer("r1") / pretrain.STEPS)] == [1, 2, 3, 4, 5, 6]


def test_a_second_run_of_another_name_is_the_same_run(home: Store, uninterrupted: Store) -> None:
    train(home, run="r2")
    for step in (4, 8, 12):
        one, other = (
            store.manifest("checkpoints", checkpoint_key(run, step))
            for store, run in ((uninterrupted, "r1"), (home, "r2"))
        )
        assert one.files == other.files


@pytest.mark.parametrize("stop", [5, 8, 11])
def test_a_run_that_was_asked_to_stop_ends_where_it_would_have_ended(
    home: Store, uninterrupted: Store, stop: int
) -> None:
    sink = MemorySink()
    made = train(home, sink, should_stop=lambda: bool(sink.rows) and sink.rows[-1][0] >= stop)
    assert made.facts["step"] == stop // 4 * 4
    assert sink.rows[-1][0] == stop
    train(home)
    assert digests(home) == digests(uninterrupted)


@pytest.mark.usefixtures("at_once")
def test_swaps_are_in_the_manifest_and_a_crash_does_not_move_them(copy_home: Callable) -> None:
    whole = copy_home("whole")
    train(whole, Promote(whole, after=6))
    timeline = whole.manifest("checkpoints", checkpoint_key("r1", 8)).facts["index_timeline"]
    assert [(swap["step"], swap["index"]) for swap in timeline] == [(6, LATER)]
    assert whole.manifest("checkpoints", LAST).facts["index_timeline"] == []
    assert whole.manifest("checkpoints", LAST).parents["live_index"] == whole.manifest("indexes", LATER).digest
    for lost in ((12,), (8, 12)):  # the power failed before these checkpoints were on disk
        torn = copy_home(f"lost{lost[0]}", of=whole)
        for step in lost:
            shutil.rmtree(torn.path("checkpoints", checkpoint_key("r1", step)))
        train(torn)
        assert digests(torn) == digests(whole)


@pytest.mark.usefixtures("at_once")
def test_another_index_makes_another_run(home: Store, uninterrupted: Store) -> None:
    """The candidates come from the index: the timeline is part of what a run is a function of."""
    train(home, Promote(home, after=6))
    assert digests(home)[LAST] != digests(uninterrupted)[LAST]


def test_random_numbers_drawn_elsewhere_in_the_process_change_nothing(home: Store, uninterrupted: Store) -> None:
    class Disturb(MemorySink):
        def log(self, step: int, values: Any) -> None:
            torch.rand(step)

    train(home, Disturb())
    assert digests(home) == digests(uninterrupted)


def test_a_finished_run_is_left_as_it_is(uninterrupted: Store) -> None:
    before = digests(uninterrupted)
    sink = MemorySink()
    assert train(uninterrupted, sink).facts["step"] == 12
    assert sink.rows == [] and digests(uninterrupted) == before


# --- retention while training ----------------------------------------------------------------------------------------


def test_a_run_keeps_start_best_newest_live_and_what_serves_it(home: Store) -> None:
    set_config(home, ("pretrain", "checkpoint_every", 1), ("pretrain", "keep", 2))
    train(home, run="r2")
    keys = home.names("checkpoints")
    utility = {
        key: home.manifest("checkpoints", key).facts["metrics"].get("utility", float("-inf"))
        for key in keys
        if key.startswith("r2-")
    }
    kept = set(home.checkpoints("r2"))
    assert {checkpoint_key("r2", step) for step in (0, 11, 12)} <= kept
    assert max(utility, key=lambda key: utility[key]) in kept
    assert len(kept) <= 5  # the best of an earlier moment may have been kept beside it
    assert len(utility) == 13
    assert {FIRST, LATER} <= set(home.checkpoints("r1"))


@pytest.mark.slow
def test_the_checkpoint_of_the_index_in_use_outlives_its_time_as_live(
    build_home: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is resumed must be able to open it again, although the pointer has moved on meanwhile."""
    monkeypatch.setattr(pretrain, "_mean", lambda window: {})  # no checkpoint is the best one
    home = build_home(tmp_path / "home", "pretrain.checkpoint_every=1", "pretrain.keep=2")
    monkeypatch.setattr(follower._Loading, "done", lambda self: self.live.index == LATER and not self._thread.join())

    class BackAndForth(MemorySink):
        def log(self, step: int, values: Any) -> None:
            if step in (6, 8):
                name = LATER if step == 6 else FIRST
                promote.run(home.config(), store=home, name=name, allow_older=True)

    train(home, BackAndForth())
    assert home.require_live().index == FIRST
    assert home.checkpoints("r1") == [checkpoint_key("r1", step) for step in (0, 4, 11, 12)]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_other_settings_for_a_run_that_began_are_refused(home: Store) -> None:
    set_config(home, ("pretrain", "lr", 0.5))
    with pytest.raises(ArtifactError, match=r"trained with other settings .*restore them, or start a new training run"):
        train(home)


def test_settings_that_do_not_concern_training_may_change(home: Store, uninterrupted: Store) -> None:
    set_config(home, ("gate", "min_recall_vs_exact", 0.5))
    train(home)
    assert digests(home) == digests(uninterrupted)


def test_an_altered_checkpoint_is_not_resumed_from(home: Store) -> None:
    path = optimizer_file(home.path("checkpoints", LATER))
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ArtifactError, match=r"optimizer\.safetensors: sha256"):
        train(home)


def test_without_a_live_index_the_wait_ends_with_the_next_move(home: Store) -> None:
    (home.home / "live.json").unlink()
    set_config(home, ("pretrain", "index_wait_seconds", 0.01))
    with pytest.raises(RealmError, match="no index went live within 0 s; start the daemon with realm up"):
        train(home, run="r2")
    assert home.names("checkpoints")[-1] == checkpoint_key("r2", 0)  # which is what the first index is made from


def test_a_run_with_a_limit_of_age_stops_while_it_waits_without_another_step(home: Store) -> None:
    set_config(home, ("pretrain", "max_index_age", 4))
    for key in home.names("evaluations"):
        (home.path("evaluations", key) / MANIFEST).unlink()  # its refresh goes on for ever
    asked: list[int] = []

    def stop_once_it_waits() -> bool:
        done = len(read_json_lines(home.trainer("r2") / pretrain.STEPS))
        asked.append(done)
        return asked.count(5) > 3

    # Checkpoint 4 is on disk and not live, so step 5 would be the first with an index of age 5.
    train(home, run="r2", should_stop=stop_once_it_waits)
    assert [row["index_age"] for row in read_json_lines(home.trainer("r2") / pretrain.STEPS)] == [0, 1, 2, 3, 4]


def test_weights_that_are_not_finite_end_the_run_with_the_next_move(home: Store) -> None:
    path = home.path("ict", "v0001") / ENCODER
    tensors = load_file(path)
    tensors["cls.predictions.bias"][0] = float("nan")
    save_file(tensors, path)
    made = read_manifest(home.path("ict", "v0001"))
    made = replace(made, files={**made.files, ENCODER: file_sha256(path)})
    (home.path("ict", "v0001") / MANIFEST).write_text(made.to_json(), encoding="utf-8")
    told = (
        "step 2: loss or gradient not finite 3 times in a row; the last good checkpoint is r2-s0000000, lower the rates"
    )
    with pytest.raises(RealmError, match=told):
        train(home, run="r2")
    assert home.checkpoints("r2") == [checkpoint_key("r2", 0)]


def test_a_resumed_run_goes_on_counting_steps_without_update(home: Store) -> None:
    rows = [{"step": 1, "null_probability": 0.2}, {"step": 2, "skipped": 1.0}, {"step": 3, "skipped": 1.0}]
    rows += [{"step": 4, "skipped": 1.0}, {"step": 5, "null_probability": 0.3}]  # 5 comes after the checkpoint
    (home.trainer("r1") / pretrain.STEPS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = pretrain._Run(home.config(), home, "r1", home.newest("corpus"), home.path("checkpoints", LATER), NullSink())
    run.train(4, 12, should_stop=lambda: True)
    assert run.trainer.updater.nan_steps == 3


# --- readiness -------------------------------------------------------------------------------------------------------

NEVER = 99.0  # nats that no document adds


def test_a_new_run_may_start_from_a_checkpoint_of_another_one(home: Store) -> None:
    good = home.path("checkpoints", LATER)
    made = train(home, run="r2", start=good, until=0)
    assert made.parents["start"] == read_manifest(good).digest
    assert {name: made.files[name] for name in (EMBEDDER, ENCODER)} == {
        name: read_manifest(good).files[name] for name in (EMBEDDER, ENCODER)
    }
    assert made.facts["step"] == 0 and not optimizer_file(home.path("checkpoints", checkpoint_key("r2", 0))).exists()
    with pytest.raises(ArtifactError, match="written by stage corpus; start from an ICT or a REALM checkpoint"):
        train(home, run="r3", start=home.newest("corpus"))
    home.quarantine(LATER, "collapsed")
    with pytest.raises(
        ArtifactError, match="r1-s0000004: set aside after a collapse; start from an earlier checkpoint"
    ):
        train(home, run="r3", start=good)


def test_what_the_warm_up_measured_is_in_the_first_checkpoint(home: Store) -> None:
    measured = home.manifest("ict", "v0001").facts["metrics"]
    names = {"warmup/gain_over_null", "warmup/gain_over_random", "warmup/gain_error"}
    assert home.manifest("checkpoints", FIRST).facts["readiness"] == {name: measured[name] for name in names}


def test_a_start_without_a_warm_up_is_measured_before_the_first_step(
    home: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = MemorySink()
    train(home, sink, run="r2", start=home.path("checkpoints", LATER), until=0)
    found = home.manifest("checkpoints", checkpoint_key("r2", 0)).facts["readiness"]
    assert sink.rows == [(0, found)] and found["warmup/gain_error"] > 0
    told = f"adds {found['warmup/gain_over_null']:.2f} +- {found['warmup/gain_error']:.2f} nats a masked wordpiece"
    assert f"before joint training the right document {told}, wanted 0.00" in capsys.readouterr().err


@pytest.mark.parametrize("measured", [True, False], ids=["by the warm-up", "here"])
def test_an_encoder_that_is_not_ready_is_refused_where_that_is_asked_for(home: Store, measured: bool) -> None:
    set_config(home, ("pretrain", "require_ready", True), ("warmup", "ready_gain", NEVER))
    start = home.newest("ict") if measured else home.path("checkpoints", LATER)
    told = r"nats a masked wordpiece, wanted 99\.00; raise warmup\.steps, or set pretrain\.require_ready=false"
    with pytest.raises(ConfigError, match=told):
        train(home, run="r2", start=start, until=0)
    assert "r2-s0000000" not in home.names("checkpoints")  # so that other settings are still possible
    set_config(home, ("warmup", "ready_gain", -NEVER))
    train(home, run="r2", start=start, until=0)
