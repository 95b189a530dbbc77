"""Services are started, watched, shared, and always ended."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import dagster as dg
import psutil
import pytest

from orchestration import services
from realm_core.errors import ArtifactError, BusyError, ConfigError, RealmError

STUBBORN = "trap '' TERM; sleep 600 & sleep 600 & wait; wait"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    services.prepare(tmp_path)
    return tmp_path


@pytest.fixture
def sleeping_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that does nothing, for tests of how one is kept."""
    monkeypatch.setattr(services, "dagster", lambda *_: ["sleep", "600"])


def test_the_instance_has_the_settings_that_the_loop_relies_on(home: Path) -> None:
    with dg.DagsterInstance.from_config(str(home / "dagster")) as instance:
        assert instance.run_retries_enabled
        # A refused checkpoint is not tried again; a killed worker is, once.
        assert instance.get_settings("run_retries")["retry_on_asset_or_op_failure"] is False
        assert instance.run_retries_max_retries == 1
        pools = instance.get_concurrency_config().pool_config
        assert (pools.pool_granularity.value, pools.default_pool_limit) == ("run", 1)
        assert instance.run_monitoring_enabled
        assert not instance.telemetry_enabled


def test_settings_that_a_person_edited_are_kept(home: Path) -> None:
    settings = home / "dagster" / "dagster.yaml"
    settings.write_text("telemetry: {enabled: false}\n")
    services.prepare(home)
    assert settings.read_text() == "telemetry: {enabled: false}\n"


@pytest.mark.parametrize(
    ("edited", "said"),
    [
        ("telemetry: {enabled: fal", "while parsing a flow mapping"),
        ("nonsense: 3", 'unexpected config entry "nonsense"'),
        ("- a\n- list", "to parse to dictionary"),
    ],
)
def test_settings_that_dagster_does_not_take_are_one_line(home: Path, edited: str, said: str) -> None:
    settings = home / "dagster" / "dagster.yaml"
    settings.write_text(edited)
    with pytest.raises(ConfigError) as refusal:
        services.prepare(home)
    message = str(refusal.value)
    assert message.startswith(f"{settings}: ") and said in message and "mend it, or remove it" in message
    assert "\n" not in message


PREPARER = """
import sys
from pathlib import Path
import dagster as dg
from orchestration import services
home = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
services.prepare(home)
with dg.DagsterInstance.from_config(str(home / "dagster")) as instance:
    print(len(instance.get_runs()))
"""


@pytest.mark.slow
def test_processes_that_open_a_new_instance_at_once_leave_one_that_opens(tmp_path: Path) -> None:
    # Tables made by two of them carry two version marks, and Dagster opens them never again.
    openers = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for opener in openers:
        assert opener.stdout is not None and opener.stdout.readline() == "ready\n"
    for opener in openers:
        assert opener.stdin is not None
        opener.stdin.write("go\n")
        opener.stdin.flush()
    assert [opener.communicate(timeout=120)[0] for opener in openers] == ["0\n"] * 4


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "dagster").write_text("a file where the folder should be")
    with pytest.raises(ArtifactError, match=f"{tmp_path}: cannot be written"):
        services.prepare(tmp_path)


def test_a_port_in_use_is_named() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BusyError, match=f"port {port} for MLflow is in use"):
            services.require_free(port, "MLflow")
    services.require_free(port, "MLflow")


@pytest.mark.slow
def test_ending_a_service_ends_its_children_even_the_deaf_ones(home: Path) -> None:
    service = services.Service("stubborn", ["bash", "-c", STUBBORN], home)
    group = [service.process.pid]
    while len(group) < 3:
        group = [service.process.pid, *(child.pid for child in psutil.Process(service.process.pid).children())]
    service.stop(patience=0.5)
    living = [pid for pid in group if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    assert living == []


def test_a_service_that_ends_by_itself_names_its_log(home: Path) -> None:
    service = services.Service("brief", ["bash", "-c", "echo goodbye; exit 3"], home)
    service.process.wait()
    with pytest.raises(RealmError, match=rf"brief ended with code 3; see {service.log}"):
        service.require_alive()
    assert service.log.read_text() == "goodbye\n"


def test_an_error_inside_the_block_ends_the_services(home: Path) -> None:
    service = services.Service("sleeper", ["sleep", "600"], home)
    with pytest.raises(KeyboardInterrupt), services.running(service):
        raise KeyboardInterrupt
    assert service.process.poll() is not None


def test_an_impatient_second_ctrl_c_waits_until_processes_are_ended() -> None:
    before = signal.getsignal(signal.SIGINT)
    with services.undisturbed():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("sleeping_daemon")
def test_a_daemon_that_dies_is_replaced_a_few_times(home: Path) -> None:
    daemon = services.KeptDaemon(home, lives=2)
    first = services.daemon_process(home)
    assert first is not None
    assert daemon.keep() is None
    os.kill(first, signal.SIGKILL)
    daemon.generations[0].process.wait()
    news = daemon.keep()
    assert news is not None
    assert "daemon ended with code -9" in news
    second = services.daemon_process(home)
    assert second not in (None, first)
    os.kill(second, signal.SIGKILL)
    daemon.generations[1].process.wait()
    with pytest.raises(RealmError, match="daemon ended with code -9; see"):
        daemon.keep()
    daemon.stop()
    assert services.daemon_process(home) is None


@pytest.mark.usefixtures("sleeping_daemon")
def test_a_daemon_of_another_command_is_shared_watched_and_left_alone(home: Path) -> None:
    theirs = services.daemon(home)
    ours = services.KeptDaemon(home)
    assert isinstance(ours.generations[0], services.OthersDaemon)
    ours.stop()
    assert services.daemon_process(home) == theirs.process.pid
    theirs.stop()
    assert "has ended" in (ours.keep() or "")  # and from now on it is ours
    assert services.daemon_process(home) is not None
    ours.stop()
    assert services.daemon_process(home) is None


@pytest.mark.usefixtures("sleeping_daemon")
def test_children_of_a_daemon_do_not_keep_its_lease(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As Dagster starts its code server: it outlives a killed daemon, and must not look like one.
    code = "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"
    monkeypatch.setattr(services, "dagster", lambda *_: [sys.executable, "-c", code])
    daemon = services.daemon(home)
    leader = psutil.Process(daemon.process.pid)
    while not (children := [child for child in leader.children() if child.name() == "sleep"]):
        time.sleep(0.02)  # before it has become another program it holds what its parent holds
    (child,) = children
    leader.kill()
    daemon.process.wait()
    assert services.daemon_process(home) is None
    assert child.is_running()
    daemon.stop()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_every_process_of_a_home_knows_it_and_sends_no_telemetry(home: Path) -> None:
    names = ("REALM_HOME", "DAGSTER_HOME", "DAGSTER_DISABLE_TELEMETRY", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION")
    service = services.Service("printer", ["bash", "-c", f"printenv {' '.join(names)}"], home)
    assert service.process.wait() == 0
    assert service.log.read_text().splitlines() == [str(home), str(home / "dagster"), "1", "false"]
    assert isinstance(service.process, subprocess.Popen)
