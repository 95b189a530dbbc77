"""How old a promotion may be: the home's setting as Dagster judges it, in the words of its own freshness daemon."""

import json
from collections.abc import Callable

import pytest

from realm_core.artifacts.store import Store

# In a process of its own: the definitions take the setting from the home when they are loaded.
LOOK = """
import asyncio, json, sys, time
import dagster as dg
from dagster._core.definitions import freshness_evaluator
from dagster._core.loader import LoadingContextForTest
from dagster._daemon.freshness import FreshnessDaemon
from orchestration.definitions import defs

node = defs.resolve_asset_graph().get(dg.AssetKey("promoted_index"))

def state(instance, hours):
    freshness_evaluator.get_current_timestamp = lambda: time.time() + 3600 * hours
    context = LoadingContextForTest(instance)
    return asyncio.run(FreshnessDaemon()._compute_asset_freshness_state(context, node)).value

with dg.DagsterInstance.ephemeral() as instance:
    found = [state(instance, 0)]
    instance.add_dynamic_partitions("realm_ckpt", ["r1-s0000000", "r1-s0000004"])
    for key in ("r1-s0000000", "r1-s0000004"):
        instance.report_runless_asset_event(dg.AssetMaterialization("promoted_index", partition=key))
    found += [state(instance, hours) for hours in map(float, sys.argv[1:])]
print(json.dumps(found))
"""


def states(store: Store, start_python: Callable, monkeypatch: pytest.MonkeyPatch, max_age: float | None) -> list[str]:
    """What Dagster says before the first promotion, and 0, 1.9 and 2.1 hours after the last one."""
    values = store.settings()
    values["config"]["refresh"]["max_age_hours"] = max_age
    (store.home / "home.json").write_text(json.dumps(values))
    monkeypatch.setenv("REALM_HOME", str(store.home))
    said, error = start_python(LOOK, 0, 1.9, 2.1).communicate(timeout=120)
    assert said, error
    return list(json.loads(said))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("max_age", "expected"),
    [
        (2.0, ["UNKNOWN", "PASS", "PASS", "FAIL"]),
        (3.0, ["UNKNOWN", "PASS", "PASS", "PASS"]),
        (None, ["NOT_APPLICABLE"] * 4),
    ],
)
def test_a_promotion_is_fresh_for_as_long_as_the_home_says_and_no_longer(
    empty_store: Store,
    start_python: Callable,
    monkeypatch: pytest.MonkeyPatch,
    max_age: float | None,
    expected: list[str],
) -> None:
    assert states(empty_store, start_python, monkeypatch, max_age) == expected
