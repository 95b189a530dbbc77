"""Services on loopback: Dagster's daemon and webserver, MLflow's server. Started, watched, and always ended."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from orchestration import production
from orchestration.resources.mlflow_database import ensure_database
from orchestration.resources.tracking import default_artifacts, default_uri
from realm_core.artifacts.lease import Lease
from realm_core.artifacts.publish import write_durably
from realm_core.artifacts.store import Store
from realm_core.errors import ArtifactError, BusyError, ConfigError, RealmError

LOOPBACK = "127.0.0.1"
_TABLES_SECONDS = 120.0  # until another process has made Dagster's tables, which takes one or two
_DAGSTER_YAML = """\
# Written once by realm; edit it as you like. SQLite in this folder is the default storage.
telemetry: {enabled: false}
nux: {enabled: false}  # no invitation over every page
concurrency:
  runs: {max_concurrent_runs: 4}
  pools: {granularity: run, default_limit: 1}
run_coordinator:
  module: dagster.core.run_coordinator
  class: QueuedRunCoordinator
  config: {dequeue_interval_seconds: 1}  # waiting in the queue makes every index older
run_monitoring: {enabled: true, start_timeout_seconds: 180, poll_interval_seconds: 30}
run_retries: {enabled: true, max_retries: 1, retry_on_asset_or_op_failure: false}
retention: {sensor: {purge_after_days: {skipped: 2, success: -1}}}
"""
_POSTGRES_YAML = (
    _DAGSTER_YAML.replace("SQLite in this folder is the default storage.", "PostgreSQL is the storage.")
    + """\
storage:
  postgres: {postgres_url: {env: REALM_DAGSTER_DATABASE}}
"""
)


def dagster_home(home: Path) -> Path:
    return home.resolve() / "dagster"


def prepare(home: Path) -> None:
    """Create the Dagster instance of a home with its tables, and in the production profile the databases for them."""
    folder = dagster_home(home)
    profile = production.chosen()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_settings(folder / "dagster.yaml", _DAGSTER_YAML if profile is None else _POSTGRES_YAML)
        (home / "logs").mkdir(exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{home}: cannot be written ({error.strerror}); choose another --home") from None
    if profile is not None:
        production.create_databases(profile, Store(home))
        os.environ["REALM_DAGSTER_DATABASE"] = profile.dagster_uri(Store(home))  # dagster.yaml names it
    _create_tables(folder)


def _create_tables(folder: Path) -> None:
    """Dagster makes its tables when it is first opened. Two processes that do so at once, as daemon and web page would,
    note the version of the tables twice, and from then on nobody can open them."""
    import dagster as dg  # takes a second, which most commands need not wait
    import yaml
    from dagster._check import CheckError

    try:
        with FileLock(folder / ".tables.lock", timeout=_TABLES_SECONDS), dg.DagsterInstance.from_config(str(folder)):
            pass
    except Timeout:
        raise BusyError(
            f"{folder}: another process has been making Dagster's tables for {_TABLES_SECONDS:.0f} s; end it and try again"
        ) from None
    except (dg.DagsterInvalidConfigError, yaml.YAMLError, CheckError) as error:
        raise ConfigError(
            f"{folder / 'dagster.yaml'}: {' '.join(str(error).split())[:300]}; mend it, or remove it to have it written anew"
        ) from None


def _write_settings(path: Path, wanted: str) -> None:
    """Write Dagster's settings unless somebody has made them their own. Raises ConfigError if those contradict the profile."""
    found = path.read_text(encoding="utf-8") if path.exists() else None
    if found == wanted:
        return
    if found in (None, _DAGSTER_YAML, _POSTGRES_YAML):
        write_durably(path, wanted)
    elif ("postgres" in str(found)) != ("postgres:" in wanted):
        raise ConfigError(
            f"{path}: edited by hand and not of this profile; set its storage section as docs/production.md shows, "
            "or remove the file"
        )


def environment(home: Path) -> dict[str, str]:
    """Environment of every process that works on this home."""
    profile = production.chosen()
    return {
        "OMP_WAIT_POLICY": "PASSIVE",  # trainer and refresh share the processors: threads that wait must not spin
        **os.environ,
        "REALM_HOME": str(home.resolve()),
        "DAGSTER_HOME": str(dagster_home(home)),
        "DAGSTER_DISABLE_TELEMETRY": "1",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        **({"REALM_DAGSTER_DATABASE": profile.dagster_uri(Store(home))} if profile else {}),
    }


def require_free(port: int, what: str) -> None:
    """Raise BusyError if something listens on the loopback port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            raise BusyError(f"port {port} for {what} is in use; pass another one or stop what listens there") from None


def dagster(*arguments: str) -> list[str]:
    """Command line of a Dagster tool of this very environment."""
    return [sys.executable, "-m", *arguments, "-m", "orchestration.definitions"]


class Service:
    """A child in a process group of its own, so that ending it ends its children too."""

    def __init__(self, name: str, command: list[str], home: Path, keep: Sequence[int] = ()) -> None:
        self.name = name
        self.log = home / "logs" / f"{name}.log"
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                env=environment(home),
                pass_fds=keep,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def require_alive(self) -> None:
        """Raise RealmError with the place of the log if the service ended by itself."""
        if (code := self.process.poll()) is not None:
            raise RealmError(f"{self.name} ended with code {code}; see {self.log}")

    def stop(self, patience: float = 15.0) -> None:
        """End the service and its children; those that do not within `patience` seconds are killed."""
        end_group(self.process.pid, patience, collect=self.process.poll)


class OthersDaemon:
    """The daemon that another command runs for this home: watched, never ended."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.log = home / "logs" / "daemon.log"

    def require_alive(self) -> None:
        """Raise RealmError if it ended."""
        if daemon_process(self.home) is None:
            raise RealmError(f"{self.home}: the daemon that another command ran has ended")

    def stop(self) -> None:
        """It belongs to another command."""


class KeptDaemon:
    """The daemon of a home for as long as a command needs one: one that dies is replaced, a few times.

    The code server and the runs of a dead daemon live on and end by themselves, or with `stop`.
    """

    def __init__(self, home: Path, lives: int = 4) -> None:
        self.home, self.lives = home, lives
        self.generations = [daemon(home)]

    @property
    def log(self) -> Path:
        return self.generations[-1].log

    def keep(self) -> str | None:
        """Replace the daemon if it ended; says so. Raises RealmError when that happened too often."""
        try:
            self.generations[-1].require_alive()
            return None
        except RealmError as problem:
            if len(self.generations) == self.lives:
                raise
            self.generations.append(daemon(self.home))
            return f"{problem}; started it again"

    def stop(self) -> None:
        """End every generation that this command started."""
        for generation in reversed(self.generations):
            generation.stop()


@contextmanager
def running(*services: Service | OthersDaemon | KeptDaemon) -> Iterator[None]:
    """Keep services for the length of a block; an error or Ctrl-C ends them too."""
    try:
        yield
    finally:
        with undisturbed():
            for service in reversed(services):
                service.stop()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put off Ctrl-C while processes are being ended: an impatient second one would leave some behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def daemon(home: Path) -> Service | OthersDaemon:
    """Dagster's daemon: sensors, schedules, the run queue. Two would work against each other, so one found is shared;
    one whose command was killed is ended and replaced, since nobody else would ever end it."""
    lease = _daemon_lease(home)
    _end_orphan(lease)
    if daemon_process(home) is not None:
        return OthersDaemon(home)
    return _under_lease(lease, "daemon", dagster("dagster._daemon", "run"), home)


def job(home: Path, command: Sequence[str]) -> Service:
    """A run that a command waits for, in a process of its own; one at a time in a home."""
    return _under_lease(_job_lease(home), "jobs", dagster(*command), home)


def end_orphaned_job(home: Path) -> None:
    """End the job of a command that was killed: what it was to do is done again, and two at once get in each other's way."""
    _end_orphan(_job_lease(home))


def _under_lease(lease: Lease, name: str, command: list[str], home: Path) -> Service:
    held = lease.take(f"the {name} of {home}")
    try:
        service = Service(name, command, home, keep=[held])
        lease.sign(held, service.process.pid)
    finally:
        os.close(held)  # the service holds it now, and its own children do not inherit it
    return service


def _end_orphan(lease: Lease) -> None:
    if (orphan := lease.orphan()) is not None:
        end_group(orphan)


def daemon_process(home: Path) -> int | None:
    """Process id of the daemon that works on this home, or None."""
    return _daemon_lease(home).holder()


def _daemon_lease(home: Path) -> Lease:
    return Lease(dagster_home(home) / "daemon.json")


def _job_lease(home: Path) -> Lease:
    return Lease(dagster_home(home) / "job.json")


def webserver(home: Path, port: int) -> Service:
    """Dagster's web interface."""
    require_free(port, "Dagster")
    command = dagster("dagster_webserver", "--host", LOOPBACK, "--port", str(port))
    return Service("webserver", command, home)


def require_answering(page: Service, port: int, patience: float = 120.0) -> None:
    """Wait until a page accepts connections. Raises RealmError with the place of its log if it ends or takes too long."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        page.require_alive()
        with suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=1.0):
            return
        time.sleep(0.2)
    raise RealmError(f"{page.name} does not answer on port {port} after {patience:.0f} s; see {page.log}")


def mlflow_server(home: Path, port: int) -> Service:
    """MLflow's web interface on the home's database."""
    require_free(port, "MLflow")
    # The server would make it under the eyes of the trainer.
    ensure_database(default_uri(home), default_artifacts(home))
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(port), "--workers", "1",
        "--backend-store-uri", default_uri(home),
        "--artifacts-destination", default_artifacts(home),
    ]  # fmt: skip
    return Service("mlflow", command, home)


def end_group(group: int, patience: float = 15.0, collect: Callable[[], object] = lambda: None) -> None:
    """Ask a process group to end, then end it. `collect` reaps the leader, so that only living members keep the group."""
    for signum, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError):
            os.killpg(group, signum)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            collect()
            if not _group_alive(group):
                return
            time.sleep(0.1)


def _group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
