"""The index follower: which index serves which step, over swaps, crashes and damaged versions."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from realm_core.artifacts.manifest import MANIFEST
from realm_core.artifacts.publish import append_durably, read_json_lines
from realm_core.artifacts.store import Store
from realm_core.errors import ArtifactError, RealmError
from realm_core.index.version import IndexVersion
from realm_core.model.device import resolve
from realm_core.stages import promote
from realm_core.train import follower as module
from realm_core.train.follower import SWAPS, IndexFollower

FIRST, LATER = "r1-s0000000", "r1-s0000004"


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def follow(home: Store, warnings: list[str], tmp_path: Path) -> Callable[[], IndexFollower]:
    """A follower of the home; called again, the follower of the next process."""
    folder = tmp_path / "trainer"
    folder.mkdir()
    return lambda: IndexFollower(home, folder, resolve(home.config().runtime), warnings.append)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version is ready at the very step at which it is noticed."""
    monkeypatch.setattr(module._Loading, "done", lambda self: (self._thread.join(), True)[1])


def go_live(store: Store, key: str = LATER) -> None:
    promote.run(store.config(), store=store, name=key, allow_older=True)


def served(follower: IndexFollower, steps: range) -> list[str]:
    return [follower.at(step).name for step in steps]


def swaps(follower: IndexFollower) -> list[tuple[int, str]]:
    return [(row["step"], row["index"]) for row in read_json_lines(follower.folder / SWAPS)]


def test_the_first_step_takes_what_is_live_and_writes_it_down(follow: Callable, home: Store) -> None:
    follower = follow()
    follower.resume(0, 0)
    assert follower.wait_for_first(1.0, lambda: False)
    assert served(follower, range(3)) == [FIRST] * 3
    assert follower.timeline(0) == [{"step": 0, "index": FIRST, "index_digest": home.manifest("indexes", FIRST).digest}]
    assert swaps(follower) == [(0, FIRST)]


@pytest.mark.usefixtures("at_once")
def test_a_promotion_takes_effect_at_the_next_step_border(follow: Callable, home: Store) -> None:
    follower = follow()
    assert served(follower, range(3)) == [FIRST] * 3
    go_live(home)
    assert served(follower, range(3, 5)) == [LATER] * 2
    go_live(home, FIRST)
    assert served(follower, range(5, 7)) == [FIRST] * 2
    assert swaps(follower) == [(0, FIRST), (3, LATER), (5, FIRST)]
    assert [swap["step"] for swap in follower.timeline(3)] == [3, 5]


def test_the_trainer_goes_on_with_the_old_version_while_the_new_one_is_read(
    follow: Callable, home: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    gate = threading.Event()
    follower = follow()
    assert served(follower, range(2)) == [FIRST] * 2
    read = follower._open

    def slow(name: str) -> IndexVersion:
        gate.wait(30)
        return read(name)

    monkeypatch.setattr(follower, "_open", slow)
    go_live(home)
    assert served(follower, range(2, 6)) == [FIRST] * 4
    assert follower.in_use == {FIRST, LATER}
    gate.set()
    follower._loading._thread.join()
    assert follower.at(6).name == LATER
    assert follower.in_use == {LATER}
    assert swaps(follower) == [(0, FIRST), (6, LATER)]


@pytest.mark.usefixtures("at_once")
def test_an_altered_version_is_refused_once_and_the_old_one_stays(
    follow: Callable, home: Store, warnings: list[str]
) -> None:
    follower = follow()
    assert served(follower, range(2)) == [FIRST] * 2
    go_live(home)
    path = home.path("indexes", LATER) / "vectors.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    assert served(follower, range(2, 6)) == [FIRST] * 4
    assert len(warnings) == 1
    assert (
        "step 2: index r1-s0000004 refused, the old one stays" in warnings[0] and "vectors.npy: sha256" in warnings[0]
    )
    assert swaps(follower) == [(0, FIRST)]


@pytest.mark.usefixtures("at_once")
def test_a_version_of_a_lost_checkpoint_is_refused_and_the_old_one_stays(
    follow: Callable, home: Store, warnings: list[str]
) -> None:
    follower = follow()
    follower.at(0)
    go_live(home)
    (home.path("checkpoints", LATER) / "embedder.safetensors").unlink()
    assert served(follower, range(1, 3)) == [FIRST] * 2
    assert len(warnings) == 1


def test_a_first_version_that_is_altered_ends_the_start_in_one_line(follow: Callable, home: Store) -> None:
    path = home.path("indexes", FIRST) / "vectors.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ArtifactError, match=r"vectors\.npy: sha256"):
        follow().at(0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(module, "_DECISION_SECONDS", 1e9)  # the scores in the home may be older than any test


def wait_for_young(follower: IndexFollower, step: int, stop: Callable[[], bool] = lambda: False, **other: Any) -> bool:
    return follower.wait_for_young(step, **{"max_age": 4, "of": "r1", "seconds": 60.0, "should_stop": stop, **other})


@pytest.mark.usefixtures("at_once", "impatient")
def test_a_run_with_a_limit_waits_at_the_border_for_an_index_that_is_young_enough(
    follow: Callable, home: Store
) -> None:
    follower, looks = follow(), iter(range(100))

    def live_at_the_third_look() -> bool:
        if next(looks) == 2:
            go_live(home)
        return False

    for step in range(5):
        assert wait_for_young(follower, step)
        assert follower.at(step).name == FIRST
    assert wait_for_young(follower, 5, live_at_the_third_look)
    assert next(looks) > 2
    assert follower.at(5).name == LATER
    assert swaps(follower) == [(0, FIRST), (5, LATER)]


@pytest.mark.usefixtures("impatient")
def test_who_waits_for_a_young_index_can_be_stopped_and_the_time_ends(follow: Callable, warnings: list[str]) -> None:
    follower = follow()
    follower.at(0)
    assert not wait_for_young(follower, 5, lambda: True)
    assert wait_for_young(follower, 5, seconds=0.0)
    assert [LATER in warning for warning in warnings] == [True]
    assert wait_for_young(follower, 6), "nobody waits twice for the same checkpoint"


@pytest.mark.usefixtures("at_once", "impatient")
def test_who_loses_the_lease_while_it_waits_writes_no_other_swap(follow: Callable, home: Store) -> None:
    follower, looks = follow(), iter(range(100))
    follower.at(0)

    def superseded() -> bool:
        if next(looks) == 1:  # between the sleep and the next look at the pointer
            go_live(home)
            raise RealmError("another process trains this run")
        return False

    with pytest.raises(RealmError, match="another process"):
        wait_for_young(follower, 5, superseded)
    assert swaps(follower) == [(0, FIRST)]


@pytest.mark.usefixtures("impatient")
def test_a_pointer_that_cannot_be_read_ends_no_wait(follow: Callable, home: Store) -> None:
    follower, looks = follow(), iter(range(100))
    follower.at(0)
    (home.home / "live.json").write_text("{}")
    assert not wait_for_young(follower, 5, lambda: next(looks) > 3)


@pytest.mark.usefixtures("impatient")
def test_the_age_of_an_index_of_another_run_counts_from_the_start(
    follow: Callable, home: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_live(home)  # of r1, step 4
    follower = follow()
    follower.at(0)
    monkeypatch.setattr(follower.store, "checkpoints", lambda run: [f"{run}-s0000004"])
    assert wait_for_young(follower, 4, of="r2")
    assert not wait_for_young(follower, 5, lambda: True, of="r2")
    asked = iter(range(100))
    assert not wait_for_young(follower, 5, lambda: next(asked) > 3, of="r2")


@pytest.mark.usefixtures("at_once", "impatient")
@pytest.mark.parametrize("why", ["its verdict", "the metric policy", "a damaged file"])
def test_nobody_waits_for_an_index_that_will_not_come(
    follow: Callable, home: Store, warnings: list[str], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    follower = follow()
    follower.at(0)
    if why == "its verdict":
        made = home.manifest("verdicts", LATER)
        refused = replace(made, facts={**made.facts, "passed": False})
        (home.path("verdicts", LATER) / MANIFEST).write_text(refused.to_json(), encoding="utf-8")
    elif why == "the metric policy":
        monkeypatch.setattr(module, "_DECISION_SECONDS", 0.0)
    else:
        go_live(home)
        path = home.path("indexes", LATER) / "vectors.npy"
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    assert all(wait_for_young(follower, step) for step in (5, 6))
    assert follower.at(6).name == FIRST
    told = f"no index of {LATER} serves; training goes on with one older than pretrain.max_index_age"
    assert warnings.count(told) == 1


@pytest.mark.usefixtures("crashed")
def test_repeated_steps_wait_for_no_younger_index(follow: Callable) -> None:
    follower = follow()
    follower.resume(0, 9)
    assert wait_for_young(follower, 5, lambda: pytest.fail("a repeated step waits"), max_age=1)


@pytest.fixture
def crashed(follow: Callable, home: Store, at_once: None) -> Iterator[IndexFollower]:
    """A run whose process died in step 9: the first version served steps 0 to 5, the later one from 6 on."""
    follower = follow()
    follower.resume(0, 0)
    served(follower, range(6))
    go_live(home)
    served(follower, range(6, 9))
    return follower


def test_repeated_steps_use_the_version_they_used_before(crashed: IndexFollower, follow: Callable) -> None:
    again = follow()
    again.resume(4, 9)
    assert served(again, range(4, 12)) == [FIRST] * 2 + [LATER] * 6
    assert swaps(again) == [(0, FIRST), (6, LATER)]
    assert again.timeline(4) == crashed.timeline(4)


def test_repeated_steps_do_not_look_at_the_pointer(crashed: IndexFollower, follow: Callable, home: Store) -> None:
    go_live(home, FIRST)  # a rollback between crash and resume
    again = follow()
    again.resume(4, 9)
    assert served(again, range(4, 9)) == [FIRST] * 2 + [LATER] * 3
    assert again.at(9).name == FIRST
    assert swaps(again)[-1] == (9, FIRST)


def test_a_run_that_stopped_at_a_checkpoint_goes_on_without_a_new_swap(
    crashed: IndexFollower, follow: Callable
) -> None:
    again = follow()
    again.resume(9, 9)
    assert served(again, range(9, 11)) == [LATER] * 2
    assert again.timeline(9) == []
    assert swaps(again) == swaps(crashed)


def test_a_swap_for_a_step_that_was_never_finished_holds_for_it(crashed: IndexFollower, follow: Callable) -> None:
    """The swap is on disk before the step runs: what is written is what served."""
    index = crashed.current
    assert index is not None
    swap = {"step": 11, "index": FIRST, "index_digest": "of the first", "time": 0.0}
    append_durably(crashed.folder / SWAPS, swap)
    again = follow()
    again.resume(8, 9)
    assert served(again, range(8, 12)) == [LATER] * 3 + [FIRST]


def test_a_torn_record_of_a_swap_is_passed_over(crashed: IndexFollower, follow: Callable) -> None:
    with (crashed.folder / SWAPS).open("a") as file:
        file.write('{"step": 8, "ind')
    again = follow()
    again.resume(4, 9)
    assert served(again, range(4, 8)) == [FIRST] * 2 + [LATER] * 2


def test_steps_without_a_record_take_what_is_live(follow: Callable, home: Store) -> None:
    follower = follow()
    follower.resume(4, 9)  # the record of swaps was lost
    assert follower.at(4).name == FIRST
    assert swaps(follower) == [(4, FIRST)]


def test_waiting_for_a_first_index_ends_with_the_next_move(follow: Callable, home: Store) -> None:
    (home.home / "live.json").unlink()
    with pytest.raises(RealmError, match="no index went live within 0 s; start the daemon with realm up, or look at"):
        follow().wait_for_first(0.0, lambda: False)
    assert follow().wait_for_first(60.0, lambda: True) is False


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("name", [FIRST, LATER])
def test_a_pointer_that_says_another_digest_than_the_index_has_is_refused_once_until_it_is_mended(
    follow: Callable, home: Store, warnings: list[str], name: str
) -> None:
    follower = follow()
    follower.at(0)
    go_live(home)
    good = json.loads((home.home / "live.json").read_text("utf-8"))
    other = home.manifest("indexes", LATER if name == FIRST else FIRST).digest
    digest = other if name == FIRST else "f" * 64
    (home.home / "live.json").write_text(json.dumps({**good, "index": name, "index_digest": digest}), "utf-8")
    assert served(follower, range(1, 5)) == [FIRST] * 4
    assert swaps(follower) == [(0, FIRST)]
    (warning,) = warnings
    assert f"says {name} has digest {digest[:12]}" in warning and "realm promote" in warning
    go_live(home)
    assert served(follower, range(5, 7)) == [LATER] * 2


@pytest.mark.usefixtures("at_once")
def test_a_pointer_that_cannot_be_read_is_told_once_and_the_old_index_stays(
    follow: Callable, home: Store, warnings: list[str]
) -> None:
    follower = follow()
    follower.at(0)
    (home.home / "live.json").write_text("garbage")
    assert served(follower, range(1, 5)) == [FIRST] * 4
    (warning,) = warnings
    assert "live.json: damaged" in warning
    again = follow()
    again.resume(3, 5)
    assert again.wait_for_first(0.0, lambda: False)  # it has the version that served it
    go_live(home)
    assert follower.at(5).name == LATER


def test_a_trainer_that_has_no_index_yet_refuses_a_pointer_that_was_edited(follow: Callable, home: Store) -> None:
    live = json.loads((home.home / "live.json").read_text("utf-8"))
    (home.home / "live.json").write_text(json.dumps({**live, "index_digest": "f" * 64}), "utf-8")
    with pytest.raises(ArtifactError, match="says r1-s0000000 has digest ffffffffffff"):
        follow().at(0)
