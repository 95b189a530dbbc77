"""A run that collapses onto the null document ends, says from where to go on, and what it set aside stays aside."""

from collections.abc import Callable

import pytest

from realm_core.artifacts.manifest import read_manifest
from realm_core.artifacts.store import COLLAPSED, Store, checkpoint_key
from realm_core.errors import GateError, RealmError
from realm_core.stages import promote
from realm_core.train.loop import RealmTrainer
from tests.unit.test_pretrain import LATER, set_config, train


@pytest.fixture
def collapsed(home: Store) -> tuple[Store, str]:
    """A home whose run ended because every p(null) is above a limit that nothing can keep to; and what was said."""
    set_config(home, ("pretrain", "max_null_probability", 0.01), ("pretrain", "guard_window", 6))
    with pytest.raises(RealmError) as caught:
        train(home, run="r2")
    return home, str(caught.value)


def test_a_collapse_ends_the_run_and_names_the_last_good_checkpoint(collapsed: tuple[Store, str]) -> None:
    home, told = collapsed
    assert told.startswith("step 6: the retriever has collapsed onto the null document, p(null) 0.")
    assert "the last good checkpoint is r2-s0000000, later ones are set aside; warm the encoder up longer" in told
    assert told.endswith(f"realm pretrain --run NEW --start {home.path('checkpoints', checkpoint_key('r2', 0))}")
    assert home.checkpoints("r2") == [checkpoint_key("r2", 0)]
    assert home.is_quarantined(checkpoint_key("r2", 4)) and not home.is_quarantined(checkpoint_key("r2", 0))
    assert home.has("checkpoints", checkpoint_key("r2", 4))  # kept for whoever asks why


def test_a_collapsed_run_is_not_taken_up_again(collapsed: tuple[Store, str]) -> None:
    home, _ = collapsed
    with pytest.raises(
        RealmError,
        match=r"trainer/r2: the run has collapsed .*; the last good checkpoint is r2-s0000000; lower the rate",
    ):
        train(home, run="r2")


def test_a_run_that_collapsed_before_it_left_a_checkpoint_is_not_taken_up_again_either(home: Store) -> None:
    set_config(home, ("pretrain", "max_null_probability", 0.01), ("pretrain", "guard_window", 2))
    for told in ("step 2: the retriever has collapsed", "trainer/r2: the run has collapsed"):
        with pytest.raises(RealmError, match=told):
            train(home, run="r2")
    assert home.names("checkpoints")[-1] == checkpoint_key("r2", 0)


def test_a_checkpoint_that_an_earlier_version_set_aside_ends_its_run_too(collapsed: tuple[Store, str]) -> None:
    home, _ = collapsed
    (home.trainer("r2") / COLLAPSED).unlink()
    assert str(home.collapse("r2")).startswith("step 6: the retriever has collapsed")
    assert home.collapse("r1") is None


@pytest.mark.slow
def test_another_run_goes_on_in_the_same_home_with_other_settings(home: Store, realm: Callable) -> None:
    train(home)  # r1 has come to its end
    set_config(home, ("pretrain", "max_null_probability", 0.01), ("pretrain", "guard_window", 6))
    place, remedy = ("--home", home.home), ("--set", "pretrain.max_null_probability=1")
    assert "pretrain.max_null_probability is fixed since training began" in realm("settings", *place, *remedy)[2]
    with pytest.raises(RealmError, match="step 6: the retriever has collapsed"):
        train(home, run="r2")
    assert "model.dropout is fixed since training" in realm("settings", *place, "--set", "model.dropout=0.2")[2]
    assert realm("settings", *place, *remedy)[0] == 0
    good = home.path("checkpoints", checkpoint_key("r2", 0))
    assert realm("pretrain", *place, "--run", "r3", "--start", good)[0] == 0
    assert home.checkpoints("r3")[-1] == checkpoint_key("r3", 12)
    assert home.manifest("checkpoints", checkpoint_key("r3", 0)).parents["start"] == read_manifest(good).digest
    assert "may change, else another --home" in realm("settings", *place, "--set", "seed=3")[2]


def test_settings_of_joint_training_stay_while_another_run_may_go_on(
    collapsed: tuple[Store, str], realm: Callable
) -> None:
    home, _ = collapsed  # r1 stands at step 4 of 12
    told = realm("settings", "--home", home.home, "--set", "pretrain.lr=1e-4")[2]
    assert "pretrain.lr is fixed since training began" in told


def test_a_run_whose_documents_add_nothing_for_long_ends_too(home: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    set_config(home, ("pretrain", "guard_utility_steps", 7))
    step = RealmTrainer.step
    useless = {"utility": -0.1}
    monkeypatch.setattr(RealmTrainer, "step", lambda self, *arguments: {**step(self, *arguments), **useless})
    told = (
        "step 7: documents add nothing, retrieval utility -0.100 over 7 steps; the last good checkpoint is r2-s0000000"
    )
    with pytest.raises(RealmError, match=told):
        train(home, run="r2")
    assert home.is_quarantined(checkpoint_key("r2", 4))


def test_an_index_of_a_quarantined_checkpoint_cannot_go_live(home: Store) -> None:
    home.quarantine(LATER, "collapsed")
    with pytest.raises(GateError, match="its checkpoint r1-s0000004 is quarantined; promote an earlier version"):
        promote.run(home.config(), store=home, name=LATER)
