"""MLflow behind the tracker port: a real SQLite store, a server that is not there, two processes at once."""

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout
from mlflow import MlflowClient

from orchestration.resources import spool, tracking
from orchestration.resources.tracking import EXPERIMENT, RUN_TAG, MlflowTracker, tracker_for
from realm_core.artifacts.publish import read_json_lines
from realm_core.ports import Tracker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # MLflow takes seconds to import


@pytest.fixture
def home(new_database: Path, tmp_path: Path) -> Path:
    (tmp_path / "mlflow").mkdir()
    shutil.copy(new_database, tmp_path / "mlflow" / "mlflow.db")
    return tmp_path


@pytest.fixture
def tracker(home: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowTracker:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tracker_for(home)


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def unreachable(home: Path, port: int) -> MlflowTracker:
    return MlflowTracker(f"http://127.0.0.1:{port}", home / "mlflow" / "spool")


def runs(tracker: MlflowTracker) -> list[Any]:
    tracker.drain(60)
    client = MlflowClient(tracker.uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def history(tracker: MlflowTracker, name: str, run: str = "r1") -> list[tuple[int, float]]:
    """(step, value) in the order in which MLflow keeps them."""
    (found,) = [candidate for candidate in runs(tracker) if candidate.data.tags[RUN_TAG] == run]
    return [(row.step, row.value) for row in MlflowClient(tracker.uri).get_metric_history(found.info.run_id, name)]


def test_it_is_a_tracker(tracker: MlflowTracker) -> None:
    assert isinstance(tracker, Tracker)


def test_metrics_go_by_step_into_one_run_per_training_run(tracker: MlflowTracker, home: Path) -> None:
    for step in (1, 2, 3):
        tracker.sink("r1").log(step, {"loss": 7.0 - step, "utility": 0.1 * step})
    tracker.drain(60)
    another = tracker_for(home)  # as another process would make its own
    another.sink("r1").log(4, {"loss": 3.0})
    another.close(60)
    tracker.sink("r2").log(1, {"loss": 9.0})
    assert sorted(run.data.tags[RUN_TAG] for run in runs(tracker)) == ["r1", "r2"]
    assert history(tracker, "loss") == [(1, 6.0), (2, 5.0), (3, 4.0), (4, 3.0)]
    assert history(tracker, "loss", "r2") == [(1, 9.0)]
    assert not list(tracker.spool.glob("*.jsonl"))


def test_tags_tie_the_run_to_digests(tracker: MlflowTracker) -> None:
    tracker.tag("r1", {"live_index": "r1-s0000004", "dagster_run_id": "d1"})
    tracker.tag("r1", {"live_index": "r1-s0000008"})
    (run,) = runs(tracker)
    assert run.data.tags["live_index"] == "r1-s0000008"
    assert run.data.tags["dagster_run_id"] == "d1"
    assert run.info.run_id == tracker.run_id("r1")


def test_a_value_that_is_missing_or_not_finite_does_no_harm(tracker: MlflowTracker) -> None:
    tracker.sink("r1").log(1, {"loss": float("nan"), "recall": None, "utility": 0.5})  # type: ignore[dict-item]
    assert history(tracker, "utility") == [(1, 0.5)]
    assert not list(tracker.spool.glob("*.jsonl"))


def test_a_run_that_ended_and_goes_on_is_shown_as_running(tracker: MlflowTracker) -> None:
    states = []
    for end in ("KILLED", "FINISHED"):
        assert tracker.start("r1") == tracker.run_id("r1")
        states += [run.info.status for run in runs(tracker)]
        tracker.finish("r1", end)
        states += [run.info.status for run in runs(tracker)]
    assert states == ["RUNNING", "KILLED", "RUNNING", "FINISHED"]


@pytest.mark.parametrize("uri", ["nonsense://nowhere", "http://127.0.0.1:{port}", "sqlite:////proc/none/mlflow.db"])
def test_a_tracker_that_cannot_be_reached_raises_nothing_and_keeps_every_row(
    uri: str, tmp_path: Path, closed_port: int
) -> None:
    tracker = MlflowTracker(uri.format(port=closed_port), tmp_path / "spool")
    for step in range(5):
        tracker.sink("r1").log(step, {"loss": float(step)})
    tracker.tag("r1", {"live_index": "r1-s0000004"})
    assert tracker.url("r1") is None
    assert tracker.run_id("r1") is None
    assert tracker.start("r1") is None
    tracker.finish("r1")
    tracker.flush()
    rows = read_json_lines(tracker.spool / "r1.jsonl")
    assert [row["step"] for row in rows if "step" in row] == list(range(5))
    assert [row["tags"] for row in rows if "tags" in row] == [{"live_index": "r1-s0000004"}]
    assert [row["status"] for row in rows if "status" in row] == ["RUNNING", "FINISHED"]


def test_while_it_is_down_it_is_asked_only_now_and_then(
    tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = unreachable(tmp_path, closed_port)
    attempts = []
    monkeypatch.setattr(tracker, "_send", lambda *_: attempts.append(1) or 1 / 0)
    for step in range(100):
        tracker.sink("r1").log(step, {"loss": 1.0})
        time.sleep(0.01)
    assert tracker.run_id("r1") is None
    assert len(attempts) == 1


def test_spooled_rows_go_out_later_in_order_and_once(tracker: MlflowTracker, home: Path, closed_port: int) -> None:
    down = unreachable(home, closed_port)
    for step in range(1, 4):
        down.sink("r1").log(step, {"loss": float(step)})
    down.tag("r1", {"live_index": "r1-s0000000"})
    down.tag("r1", {"live_index": "r1-s0000004"})
    down.close()
    tracker.sink("r1").log(4, {"loss": 4.0})  # the next row finds MLflow up again
    assert history(tracker, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert runs(tracker)[0].data.tags["live_index"] == "r1-s0000004"
    assert not list(tracker.spool.glob("*.jsonl"))
    tracker.flush()
    assert len(history(tracker, "loss")) == 4


def test_the_end_of_a_run_sends_what_is_left(tracker: MlflowTracker, home: Path, closed_port: int) -> None:
    down = unreachable(home, closed_port)
    down.sink("r1").log(1, {"loss": 1.0})
    down.close()
    tracker.finish("r1")
    assert history(tracker, "loss") == [(1, 1.0)]


def test_a_crash_between_sending_and_forgetting_sends_nothing_twice(
    tracker: MlflowTracker, home: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = unreachable(home, closed_port)
    for step in range(1, 4):
        down.sink("r1").log(step, {"loss": float(step)})
    down.close()
    spool = tracker.spool / "r1.jsonl"
    before = spool.read_text()
    tracker.flush()
    spool.write_text(before)  # as if the process had died before the file was removed
    tracker.flush()
    assert history(tracker, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_more_rows_than_a_batch_holds_go_out(tracker: MlflowTracker, home: Path, closed_port: int) -> None:
    down = unreachable(home, closed_port)
    for step in range(700):
        down.sink("r1").log(step, {"loss": float(step), "utility": 1.0})
    down.close()
    tracker.flush()
    assert history(tracker, "loss") == [(step, float(step)) for step in range(700)]
    assert not list(tracker.spool.glob("*.jsonl"))


def test_a_run_deleted_in_mlflow_is_made_anew(tracker: MlflowTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_RETRY_SECONDS", 0.0)
    tracker.sink("r1").log(1, {"loss": 1.0})
    first = tracker.run_id("r1")
    assert first is not None
    MlflowClient(tracker.uri).delete_run(first)
    tracker.sink("r1").log(2, {"loss": 2.0})
    tracker.drain(60)
    tracker.sink("r1").log(3, {"loss": 3.0})
    assert tracker.run_id("r1") != first
    assert history(tracker, "loss") == [(2, 2.0), (3, 3.0)]


def test_a_full_disk_costs_rows_and_not_the_training(
    tmp_path: Path, closed_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "spool").write_text("a file where the folder should be")
    unreachable(tmp_path, closed_port).sink("r1").log(1, {"loss": 1.0})
    assert "1 rows of metrics are lost" in caplog.text


def test_two_that_look_for_a_run_at_once_make_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both_looked = threading.Barrier(2)
    search = MlflowClient.search_runs

    def slow_search(self: MlflowClient, *arguments: Any, **named: Any) -> Any:
        found = search(self, *arguments, **named)
        with contextlib.suppress(threading.BrokenBarrierError):
            both_looked.wait(timeout=1)
        return found

    monkeypatch.setattr(MlflowClient, "search_runs", slow_search)
    trackers = [tracker_for(home) for _ in range(2)]
    threads = [threading.Thread(target=tracker.run_id, args=("r1",)) for tracker in trackers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trackers[0].run_id("r1") == trackers[1].run_id("r1")


WRITER = """
import sys
from pathlib import Path
from mlflow import MlflowClient
from orchestration.resources.tracking import tracker_for
home, name, rows = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
tracker = tracker_for(home)
print("ready", flush=True)
sys.stdin.readline()  # both begin at the same moment
for step in range(rows):
    tracker.sink("r1").log(step, {name: float(step)})
tracker.finish("r1")
"""


def test_two_processes_write_into_one_run_and_a_new_database(tmp_path: Path) -> None:
    # Nothing exists yet: both find no database, no experiment and no run, as trainer and first refresh do.
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), name, "40"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("trainer", "refresh")
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert [writer.wait(timeout=280) for writer in writers] == [0, 0]
    tracker = tracker_for(tmp_path)
    deadline = time.monotonic() + 120  # a writer that ended before the database was made left its rows to others
    while list(tracker.spool.glob("*.jsonl")) and time.monotonic() < deadline:
        tracker.flush()
    assert len(runs(tracker)) == 1
    for name in ("trainer", "refresh"):
        assert history(tracker, name) == [(step, float(step)) for step in range(40)]


MAKER = """
import sys
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from orchestration.resources.mlflow_database import ensure_database
print("ready", flush=True)
ensure_database(sys.argv[1], None)
"""


@pytest.mark.parametrize("bytes_written", [1, 50_000, 400_000])
def test_a_database_whose_making_is_cut_off_is_made_anew(tmp_path: Path, bytes_written: int) -> None:
    # MLflow cannot go on with a migration that was cut off: SQLite keeps what the first half of it did.
    made = tracker_for(tmp_path)
    half_made = tmp_path / "mlflow" / ".mlflow.db.new"
    with subprocess.Popen([sys.executable, "-c", MAKER, made.uri], stdout=subprocess.PIPE, text=True) as maker:
        while maker.poll() is None and not (half_made.exists() and half_made.stat().st_size >= bytes_written):
            time.sleep(0.001)
        maker.kill()
    assert half_made.exists() and not (tmp_path / "mlflow" / "mlflow.db").exists()
    made.sink("r1").log(1, {"loss": 0.5})
    assert history(made, "loss") == [(1, 0.5)]
    assert not list(half_made.parent.glob(f"{half_made.name}*"))


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Port of a server that accepts every connection and never answers."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "4")  # of a try, of which there are two
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(128)
        yield int(server.getsockname()[1])


def test_a_server_that_never_answers_slows_down_nobody_and_gets_every_row_once_it_does(
    tracker: MlflowTracker, home: Path, silent: int
) -> None:
    hung = unreachable(home, silent)
    hung.start("r1")
    longest, began = 0.0, time.monotonic()
    for step in range(1, 101):
        before = time.monotonic()
        hung.sink("r1").log(step, {"loss": float(step)})
        longest = max(longest, time.monotonic() - before)
        time.sleep(0.02)  # the step itself
    assert longest < 0.5, "a step waited for MLflow"
    assert time.monotonic() - began < 2.0 + 10.0
    before = time.monotonic()
    assert hung.url("r1") is None
    hung.finish("r1", "KILLED")
    assert time.monotonic() - before < tracking._END_SECONDS + 5.0
    tracker.flush()
    wait_until_sent(tracker)
    assert history(tracker, "loss") == [(step, float(step)) for step in range(1, 101)]
    assert [run.info.status for run in runs(tracker)] == ["KILLED"]


def test_what_was_asked_of_a_silent_server_is_waited_for_once_and_not_again(home: Path, silent: int) -> None:
    hung = unreachable(home, silent)
    assert hung.run_id("r1") is None
    before = time.monotonic()
    assert [hung.run_id("r1"), hung.url("r1"), hung.start("r1")] == [None, None, None]
    assert time.monotonic() - before < 1.0
    hung.close(0)


def test_the_run_id_is_told_when_mlflow_answers_at_last(
    tracker: MlflowTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_RETRY_SECONDS", 0.2)
    find, tries, told = tracker._find_or_create, [], []

    def fails_twice(run: str) -> str:
        tries.append(run)
        if len(tries) < 3:
            raise ConnectionError("not yet")
        return find(run)

    monkeypatch.setattr(tracker, "_find_or_create", fails_twice)
    assert tracker.start("r1", known=told.append) is None
    deadline = time.monotonic() + 60
    while not told and time.monotonic() < deadline:
        time.sleep(0.05)
    assert told == [tracker.run_id("r1")]


KILLED = """
import os, signal, sys
from pathlib import Path
from orchestration.resources.tracking import MlflowTracker
tracker = MlflowTracker(sys.argv[1], Path(sys.argv[2]))
for step in range(1, 51):
    tracker.sink("r1").log(step, {"loss": float(step)})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_killed_while_it_sends_loses_nothing(
    tracker: MlflowTracker, silent: int, start_python: Callable
) -> None:
    killed = start_python(KILLED, f"http://127.0.0.1:{silent}", tracker.spool)
    assert killed.wait(timeout=120) == -signal.SIGKILL
    tracker.flush()
    wait_until_sent(tracker)
    assert history(tracker, "loss") == [(step, float(step)) for step in range(1, 51)]


def wait_until_sent(tracker: MlflowTracker) -> None:
    deadline = time.monotonic() + 60
    while list(tracker.spool.glob("*.jsonl")):
        assert time.monotonic() < deadline, "rows stay in the spool"
        tracker.flush()


def test_rows_that_come_while_others_are_on_their_way_keep_their_place(tmp_path: Path) -> None:
    rows, delivered = spool.Spool(tmp_path), []
    rows.append("r1", {"n": 0})

    def deliver(found: list[dict[str, Any]]) -> None:
        if not delivered:
            spool.Spool(tmp_path).append("r1", {"n": 1}, {"n": 2})  # another process
        delivered.append([row["n"] for row in found])

    rows.send("r1", deliver)
    assert delivered == [[0], [1, 2]]
    assert not rows.path("r1").exists()


def test_rows_that_cannot_be_delivered_stay_and_a_torn_line_spoils_no_other(tmp_path: Path) -> None:
    rows, delivered = spool.Spool(tmp_path), []
    rows.append("r1", {"n": 0})
    with rows.path("r1").open("a") as file:
        file.write('{"n": 1')  # its writer was killed
    rows.append("r1", {"n": 2})
    with pytest.raises(ZeroDivisionError):
        rows.send("r1", lambda found: 1 / 0)
    rows.send("r1", delivered.extend)
    assert [row["n"] for row in delivered] == [0, 2]


def test_somebody_who_sleeps_over_the_lock_costs_one_row_a_moment_and_no_row_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_APPEND_SECONDS", 0.2)
    rows, delivered = spool.Spool(tmp_path), []
    with FileLock(tmp_path / ".r1.lock"):
        before = time.monotonic()
        for n in range(20):
            rows.append("r1", {"n": n})
        assert time.monotonic() - before < 2.0
        with pytest.raises(Timeout):
            rows.send("r1", delivered.extend)
    rows.send("r1", delivered.extend)
    assert [row["n"] for row in delivered] == list(range(20))
