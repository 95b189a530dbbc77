"""The guard against collapse onto the null document."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_core.train.guard import CollapseError, CollapseGuard

P = st.integers(0, 64).map(lambda n: n / 64)  # sums of these are exact


@given(st.lists(P, max_size=30), st.integers(1, 10), st.floats(0.05, 1))
def test_it_stops_at_the_first_full_window_whose_mean_is_above_the_limit(
    values: list[float], window: int, limit: float
) -> None:
    guard = CollapseGuard(window, limit)
    means = [sum(values[end - window : end]) / window for end in range(window, len(values) + 1)]
    first = next((place for place, mean in enumerate(means) if mean > limit), None)
    stopped = None
    for step, value in enumerate(values, start=1):
        try:
            guard.observe(step, {"null_probability": value})
        except CollapseError:
            stopped = step
            break
    assert stopped == (None if first is None else first + window)


def test_steps_without_a_query_or_an_update_say_nothing() -> None:
    guard = CollapseGuard(2, 0.5)
    for step, metrics in enumerate(({"null_probability": 0.9}, {}, {"skipped": 1.0})):
        guard.observe(step, metrics)
    with pytest.raises(CollapseError, match=r"step 3: .*p\(null\) 0\.900 over 2 steps"):
        guard.observe(3, {"null_probability": 0.9})


def test_a_checkpoint_is_trusted_up_to_half_the_limit_and_the_start_always() -> None:
    guard = CollapseGuard(5, 0.9)
    assert guard.trusts({})
    assert guard.trusts({"null_probability": 0.45})
    assert not guard.trusts({"null_probability": 0.46})
    assert not guard.trusts({"skipped": 1.0})


@given(st.lists(st.floats(-2, 2), max_size=30), st.integers(1, 10))
def test_utility_ends_a_run_at_the_first_full_window_in_which_documents_add_nothing(
    values: list[float], steps: int
) -> None:
    guard = CollapseGuard(50, 1.0, utility_steps=steps)
    sums = [sum(values[end - steps : end]) for end in range(steps, len(values) + 1)]
    first = next((place for place, total in enumerate(sums) if total <= 0.0), None)
    stopped = None
    for step, value in enumerate(values, start=1):
        try:
            guard.observe(step, {"null_probability": 0.1, "utility": value})
        except CollapseError:
            stopped = step
            break
    assert stopped == (None if first is None else first + steps)


def test_utility_is_not_watched_unless_asked_for() -> None:
    unasked, asked = CollapseGuard(2, 0.9), CollapseGuard(2, 0.9, utility_steps=3)
    for step in range(10):
        unasked.observe(step, {"null_probability": 0.1, "utility": -1.0})
    assert unasked.trusts({"null_probability": 0.1, "utility": -1.0})
    assert not asked.trusts({"null_probability": 0.1, "utility": -1.0})
    asked.observe(0, {"null_probability": 0.1, "utility": -1.0})
    asked.observe(1, {"null_probability": 0.1, "utility": -1.0})
    with pytest.raises(CollapseError, match=r"step 2: documents add nothing, retrieval utility -1\.000 over 3 steps"):
        asked.observe(2, {"null_probability": 0.1, "utility": -1.0})
    assert asked.trusts({"null_probability": 0.1, "utility": 0.2}) and asked.trusts({})
