"""The production profile against real servers: PostgreSQL from the system, an S3-protocol server from moto."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from orchestration import pointer, production, services
from orchestration.report import SENSOR_TAG
from orchestration.resources.tracking import tracker_for
from realm_core.artifacts import mirror
from realm_core.artifacts.store import Store
from realm_core.errors import ConfigError, RealmError
from tests.e2e.homes import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

FIRST, LATER = "r1-s0000000", "r1-s0000004"
BUCKET = "realm-test"


def wait_for_port(port: int, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process is None or process.poll() is None, "the server ended at once"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"nothing listens on port {port}")


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """Address of a PostgreSQL server of its own; it is gone after the tests."""
    pytest.importorskip("dagster_postgres")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = shutil.which("initdb") or (str(found[-1]) if found else None)
    if initdb is None:
        pytest.skip("no PostgreSQL server on this machine")
    programs = Path(initdb).resolve().parent
    # Not below pytest's folder: that is closed to the user the server must run as.
    folder = Path(tempfile.mkdtemp(prefix="realm-postgres-"))
    other: list[str] = []
    if os.getuid() == 0:  # the server refuses to run as root
        if shutil.which("runuser") is None:
            pytest.skip("PostgreSQL refuses to run as root, and there is no runuser")
        other = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
    port = free_port()
    run = {"check": True, "capture_output": True, "cwd": folder}
    subprocess.run([*other, programs / "initdb", "-D", folder / "data", "-A", "trust", "-U", "realm", "-N"], **run)
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    control = [*other, programs / "pg_ctl", "-D", folder / "data", "-w", "-t", "120"]
    subprocess.run([*control, "-l", folder / "log", "-o", options, "start"], check=True, cwd=folder)
    yield f"postgresql://realm@127.0.0.1:{port}"
    subprocess.run([*control, "-m", "immediate", "stop"], **run)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of an S3-protocol server with one empty bucket."""
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("moto.server")
    port = free_port()
    with (tmp_path_factory.mktemp("s3") / "log").open("wb") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        wait_for_port(port, server)
        key = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=endpoint, **key).create_bucket(Bucket=BUCKET)
        yield endpoint
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def environment(postgres: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operator sets, and nothing else."""
    for name in (
        "MLFLOW_TRACKING_URI",
        "REALM_HOME",
        "DAGSTER_HOME",
        "REALM_DAGSTER_DATABASE",
        "MLFLOW_S3_ENDPOINT_URL",
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in {
        "REALM_PROFILE": "production",
        "REALM_POSTGRES": postgres,
        "REALM_S3": f"s3://{BUCKET}/ops",
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("environment")
def test_a_promotion_is_on_record_in_postgres_and_its_bytes_are_in_the_bucket(home: Store, tmp_path: Path) -> None:
    services.prepare(home.home)
    live, told = pointer.promote(home.home, LATER, "new")
    assert (told["dagster"], told["mlflow"]) == ("recorded", "champion")
    assert told["mirror"].endswith(f"(s3://{BUCKET}/ops)")
    assert not list(home.home.rglob("*.db")), "nothing may be left in SQLite"

    with dg.DagsterInstance.from_config(str(home.home / "dagster")) as instance:
        assert type(instance.event_log_storage).__name__ == "PostgresEventLogStorage"
        (event,) = instance.fetch_materializations(dg.AssetKey("promoted_index"), limit=5).records
    assert event.partition_key == LATER

    tracker = tracker_for(home.home)
    assert tracker.uri.startswith("postgresql+psycopg2://")
    from mlflow import MlflowClient

    version = MlflowClient(tracker.uri).get_model_version_by_alias("realm", "champion")
    assert version.source.startswith(f"s3://{BUCKET}/ops/mlflow/")

    elsewhere = tmp_path / "elsewhere"
    command = [sys.executable, "-m", "orchestration.cli"]
    repository = Path(__file__).resolve().parents[2]
    for words in (["pull", "--home", elsewhere], ["ask", "Which animal is it?", "--home", elsewhere, "--json"]):
        done = subprocess.run([*command, *map(str, words)], capture_output=True, text=True, check=True, cwd=repository)
    assert json.loads(done.stdout)["index_digest"] == live.index_digest


@pytest.mark.usefixtures("environment")
def test_a_checkpoint_goes_live_through_the_sensor_with_everything_on_the_servers(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One turn of the loop with a real daemon; nobody promotes by hand."""
    services.prepare(store.home)
    for name, value in services.environment(store.home).items():
        monkeypatch.setenv(name, value)
    with dg.DagsterInstance.get() as instance:
        daemon = services.KeptDaemon(store.home)
        with services.running(daemon):
            deadline = time.monotonic() + 400
            while not (runs := instance.get_runs(dg.RunsFilter(job_name="refresh_index"))) or not runs[0].is_finished:
                daemon.keep()
                assert time.monotonic() < deadline, daemon.log.read_text()[-3000:]
                time.sleep(0.5)
        (run,) = runs
        assert run.is_success and run.tags[SENSOR_TAG] == "checkpoint_sensor"
        (event,) = instance.fetch_materializations(dg.AssetKey("promoted_index"), limit=5).records
    live = store.require_live()
    assert (live.index, live.dagster_run_id) == (FIRST, run.run_id)
    assert (event.partition_key, event.run_id) == (FIRST, run.run_id)
    assert "not mirrored" not in str(event.asset_materialization.metadata["mirror"].value)
    tracker = tracker_for(store.home)
    tracker.flush(60)
    from mlflow import MlflowClient

    versions = MlflowClient(tracker.uri).search_model_versions(f"tags.`realm.index_digest` = '{live.index_digest}'")
    assert [version.run_id for version in versions] == [tracker.run_id("r1")]
    tracker.close(0)
    assert not list(store.home.rglob("*.db")), "nothing may be left in SQLite"


@pytest.mark.usefixtures("environment")
def test_two_homes_on_one_server_are_two_dagster_instances(home: Store, copy_home, monkeypatch) -> None:
    other = copy_home("other")
    for store in (home, other):
        services.prepare(store.home)
    names = [production.dagster_database(store) for store in (home, other)]
    assert len(set(names)) == 2
    for store in (home, other):
        monkeypatch.setenv("REALM_DAGSTER_DATABASE", services.environment(store.home)["REALM_DAGSTER_DATABASE"])
        with dg.DagsterInstance.from_config(str(store.home / "dagster")) as instance:
            assert instance.get_dynamic_partitions("realm_ckpt") == []
            instance.add_dynamic_partitions("realm_ckpt", [FIRST])


@pytest.mark.usefixtures("environment")
def test_a_bucket_that_cannot_be_reached_does_not_hold_up_a_promotion(home: Store, monkeypatch) -> None:
    monkeypatch.setenv("REALM_S3", "s3://no-such-bucket/ops")
    live, told = pointer.promote(home.home, LATER, "new")
    assert live.index == home.require_live().index == LATER
    assert told["mirror"].startswith("not mirrored: s3://no-such-bucket/ops: ") and "\n" not in told["mirror"]
    monkeypatch.setenv("REALM_S3", f"s3://{BUCKET}/again")
    assert mirror.push(home, LATER, f"s3://{BUCKET}/again").files > 0


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("REALM_S3", "", r"needs REALM_S3=s3://BUCKET/PREFIX \(found ''\)"),
        ("REALM_POSTGRES", "sqlite:///x", "needs REALM_POSTGRES=postgresql://USER:PASSWORD@HOST:PORT"),
        ("REALM_PROFILE", "prod", "REALM_PROFILE=prod: unknown"),
    ],
)
def test_a_profile_that_is_not_complete_is_one_line(
    home: Store, monkeypatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        services.prepare(home.home)


@pytest.mark.usefixtures("environment")
def test_a_server_that_is_not_there_is_one_line_without_its_password(home: Store, monkeypatch) -> None:
    monkeypatch.setenv("REALM_POSTGRES", "postgresql://realm:hunter2@127.0.0.1:9")
    with pytest.raises(RealmError, match=r"REALM_POSTGRES: .*Connection refused") as caught:
        services.prepare(home.home)
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("environment")
def test_settings_of_dagster_that_somebody_edited_are_not_overwritten(home: Store) -> None:
    path = home.home / "dagster" / "dagster.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("telemetry: {enabled: false}\n# mine\n")
    with pytest.raises(ConfigError, match=r"dagster\.yaml: edited by hand and not of this profile"):
        services.prepare(home.home)
    assert path.read_text().endswith("# mine\n")
