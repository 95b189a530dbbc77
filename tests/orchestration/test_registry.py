"""The model registry and the pointer: what is live, what MLflow calls champion, and what Dagster has on record."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from mlflow import MlflowClient

from assets.reporting import version_card
from orchestration import pointer
from orchestration.resources.tracking import HOME_TAG, MlflowTracker, tracker_for
from realm_core.artifacts.store import Store
from realm_core.errors import ConfigError, GateError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # MLflow takes seconds to import

FIRST, LATER = "r1-s0000000", "r1-s0000004"
PREDICT = """
import json, sys, mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
print(json.dumps(model.predict(["Which animal is it?"])))
"""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "REALM_PROFILE", "REALM_MODEL", "REALM_HOME", "DAGSTER_HOME"):
        monkeypatch.setenv(name, "")  # so that what a command sets is taken back
        monkeypatch.delenv(name)


@pytest.fixture
def tracked(home: Store, new_database: Path) -> Store:
    (home.home / "mlflow").mkdir()
    shutil.copy(new_database, home.home / "mlflow" / "mlflow.db")
    return home


def aliases(tracker: MlflowTracker, name: str = "realm") -> dict[str, str]:
    """Alias -> index version it stands for."""
    client = MlflowClient(tracker.uri)
    model = client.get_registered_model(name)
    return {
        alias: client.get_model_version(name, version).tags["realm.index"] for alias, version in model.aliases.items()
    }


def down(store: Store) -> MlflowTracker:
    """One that never gets round to sending."""
    tracker = MlflowTracker("http://127.0.0.1:9", store.home / "mlflow" / "spool")
    tracker._not_before = time.monotonic() + 3600
    return tracker


def recorded(store: Store) -> list[str]:
    """Index versions that Dagster saw go live, newest first; pointer and promoted index must agree."""
    with dg.DagsterInstance.from_config(str(store.home / "dagster")) as instance:
        seen = instance.fetch_observations(dg.AssetKey("live_index_pointer"), limit=9).records
        made = instance.fetch_materializations(dg.AssetKey("promoted_index"), limit=9).records
    names = [record.asset_observation.metadata["index"].value for record in seen if record.asset_observation]
    assert names == [record.partition_key for record in made]
    return [str(name) for name in names]


def predict(uri: str, model: str, **environment: str) -> subprocess.CompletedProcess[str]:
    repository = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-c", PREDICT, uri, model],
        capture_output=True,
        text=True,
        check=False,
        cwd=repository,
        env={**os.environ, **environment},
    )


def test_a_rollback_moves_pointer_alias_and_dagsters_record_together(tracked: Store) -> None:
    pointer.promote(tracked.home, LATER, "new")
    tracker = tracker_for(tracked.home)
    assert aliases(tracker) == {"champion": LATER}
    live, told = pointer.rollback(tracked.home, None, "answers got worse")
    assert (live.index, live.generation, live.reason) == (FIRST, 3, "answers got worse")
    assert told == {"dagster": "recorded", "mlflow": "champion"}
    assert aliases(tracker) == {"champion": FIRST}
    assert recorded(tracked) == [FIRST, LATER]
    assert [move.index for move in tracked.live_history()] == [FIRST, LATER, FIRST]
    with pytest.raises(GateError, match=f"all that was live before {FIRST} was gone back from; name another one"):
        pointer.rollback(tracked.home, None, "worse still")  # the bad one is not gone back to
    assert pointer.promote(tracked.home, LATER, "no, they did not")[0].index == LATER


def test_a_rollback_mends_a_damaged_pointer_first(tracked: Store, capsys: pytest.CaptureFixture[str]) -> None:
    pointer.gate.run(tracked.config(), store=tracked, name=LATER)
    (tracked.home / "live.json").write_text("garbage")
    assert pointer.rollback(tracked.home, None, "back")[0].index == FIRST
    assert "was damaged; r1-s0000004 of the last line" in capsys.readouterr().err


def test_a_rollback_without_anything_to_go_back_to_says_so(tracked: Store) -> None:
    with pytest.raises(GateError, match=f"only {FIRST} was ever live"):
        pointer.rollback(tracked.home, None, "why not")
    assert len(tracked.live_history()) == 1


def test_a_rollback_is_not_held_up_by_a_gate_that_was_changed_meanwhile(tracked: Store) -> None:
    from realm_core.artifacts import settings

    pointer.gate.run(tracked.config(), store=tracked, name=LATER)
    settings.change(tracked, ["gate.min_recall_vs_exact=0.9", "gate.max_recall_drop=0.0"])
    assert pointer.rollback(tracked.home, None, "back")[0].index == FIRST
    settings.change(tracked, ["gate.max_null_probability=0.0001"])
    with pytest.raises(GateError, match="refused by its verdict"):  # what the gate of today refuses stays refused
        pointer.rollback(tracked.home, LATER, "forth")


def test_an_environment_that_is_not_complete_is_told_before_the_pointer_moves(
    tracked: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REALM_PROFILE", "production")
    with pytest.raises(ConfigError, match="needs REALM_S3"):
        pointer.promote(tracked.home, LATER, "new")
    assert tracked.require_live().index == FIRST


def test_the_champion_answers_in_a_fresh_process_without_a_pickle(tracked: Store, tmp_path: Path) -> None:
    pointer.promote(tracked.home, LATER, "new")
    tracker = tracker_for(tracked.home)
    done = predict(tracker.uri, "models:/realm@champion")
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)
    assert (answer["index"], answer["index_digest"]) == (LATER, tracked.manifest("indexes", LATER).digest)
    assert answer["passages"]
    files = [path.name for path in (tracked.home / "mlflow" / "artifacts").rglob("*") if path.is_file()]
    assert "registered_model.py" in files
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".joblib", ".pt"))]


def test_the_champion_refuses_a_home_that_holds_another_index_of_that_name(tracked: Store) -> None:
    pointer.promote(tracked.home, LATER, "new")
    from tests.unit.test_promote import rewrite

    rewrite(tracked.path("indexes", LATER), {"step": 5})
    done = predict(tracker_for(tracked.home).uri, "models:/realm@champion")
    assert done.returncode != 0 and "this model answers from" in done.stderr


def test_what_could_not_be_registered_is_registered_later_and_the_champion_is_what_is_live_by_then(
    tracked: Store,
) -> None:
    """Two moves while MLflow is down: the alias must not stop at the first of them."""
    for name in (FIRST, LATER):
        down(tracked).register("r1", version_card(tracked, name))
    pointer.gate.run(tracked.config(), store=tracked, name=LATER)
    down(tracked).champion("r1", version_card(tracked, LATER))
    pointer.gate.run(tracked.config(), store=tracked, name=FIRST, allow_older=True)
    down(tracked).champion("r1", version_card(tracked, FIRST))
    tracker = tracker_for(tracked.home)
    assert tracker.waiting
    tracker.flush()
    assert not tracker.waiting
    assert aliases(tracker) == {"candidate": LATER, "champion": FIRST}
    versions = MlflowClient(tracker.uri).search_model_versions("name = 'realm'")
    assert sorted(version.tags["realm.index"] for version in versions) == [FIRST, LATER]


def test_registering_twice_makes_one_version(tracked: Store) -> None:
    tracker = tracker_for(tracked.home)
    for _ in range(2):
        tracker.register("r1", version_card(tracked, LATER))
        tracker.close(60)
    assert len(MlflowClient(tracker.uri).search_model_versions("name = 'realm'")) == 1


def test_two_homes_on_one_server_share_neither_runs_nor_models(
    tracked: Store, copy_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked.identity  # noqa: B018  (made on first use)
    other = copy_home("other")
    assert other.identity != tracked.identity
    uri = tracker_for(tracked.home).uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for store in (tracked, other):
        tracker = tracker_for(store.home)
        tracker.sink("r1").log(1, {"loss": 1.0})
        tracker.champion("r1", version_card(store, FIRST))
        tracker.close(60)
    client = MlflowClient(uri)
    (experiment,) = [each for each in client.search_experiments() if each.name == "realm"]
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.tags[HOME_TAG] for run in runs} == {tracked.identity, other.identity}
    assert len(runs) == 2
    names = {model.name for model in client.search_registered_models()}
    assert names == {"realm", f"realm-{other.identity[:8]}"}
