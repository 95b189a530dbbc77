"""Publishing: a folder is there complete or not at all, is never overwritten, and has one builder at a time."""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from realm_core.artifacts.manifest import MANIFEST, Plan, read_manifest
from realm_core.artifacts.publish import (
    INTERIM,
    append_durably,
    building,
    finished,
    provenance,
    read_json_lines,
    scratch_of,
    storage_trouble,
    write_durably,
)
from realm_core.errors import ArtifactError, BusyError

PLAN = Plan(stage="index", code="1", config_digest="c" * 64)

# A builder in a process of its own: writes one part, says so, and then waits for a word before it commits.
BUILDER = """
import sys
from pathlib import Path
from realm_core.artifacts.manifest import Plan
from realm_core.artifacts.publish import building
with building(Path(sys.argv[1]), Plan(stage="index", code="1", config_digest="c" * 64), resume=sys.argv[2] == "resume") as build:
    (build.folder / "part").write_text("done")
    print("building", flush=True)
    sys.stdin.readline()
    build.commit({"rows": 1})
print("published", flush=True)
"""


def visible(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))


def hidden(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith(".") and entry.is_dir())


def stopped(final: Path, *files: str) -> None:
    """An attempt that writes files and is stopped."""
    with building(final, PLAN, interim=True) as build:
        for name in files:
            (build.folder / name).parent.mkdir(exist_ok=True)
            (build.folder / name).write_text("x")
        raise KeyboardInterrupt


def test_interim_states_outlive_an_attempt_and_are_never_published(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path / "a", f"{INTERIM}/state", "half")
    assert [entry.name for entry in scratch_of(tmp_path / "a").iterdir()] == [INTERIM]
    with building(tmp_path / "a", PLAN, interim=True) as build:
        assert (build.folder / INTERIM / "state").read_text() == "x"
        (build.folder / "file").write_text("x")
        made = build.commit({})
    assert list(made.files) == ["file"] and visible(tmp_path / "a") == ["file", MANIFEST]
    assert hidden(tmp_path / "a") == hidden(tmp_path) == []


def test_an_attempt_without_interim_states_leaves_nothing_and_takes_over_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path / "a", "half")
    assert hidden(tmp_path) == []
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path / "a", f"{INTERIM}/state")
    with building(tmp_path / "a", PLAN) as build:
        assert list(build.folder.iterdir()) == []


def test_a_committed_folder_appears_complete(tmp_path: Path) -> None:
    with building(tmp_path / "a", PLAN) as build:
        (build.folder / "deep").mkdir()
        (build.folder / "deep" / "file").write_text("x")
        assert visible(tmp_path) == []
        made = build.commit({"rows": 3}, record={"note": "n"})
    assert read_manifest(tmp_path / "a") == made
    assert list(made.files) == ["deep/file"]
    assert made.record["note"] == "n"
    assert hidden(tmp_path) == []


def fail(place: Path, *, after_the_commit: bool) -> None:
    with building(place, PLAN) as build:
        (build.folder / "file").write_text("x")
        if after_the_commit:
            build.commit({})
        raise ZeroDivisionError


def test_a_failure_publishes_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail(tmp_path / "a", after_the_commit=False)
    assert visible(tmp_path) == hidden(tmp_path) == []


def test_a_failure_after_the_commit_publishes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail(tmp_path / "a", after_the_commit=True)
    assert visible(tmp_path) == hidden(tmp_path) == []


def test_a_block_without_a_commit_publishes_nothing(tmp_path: Path) -> None:
    with building(tmp_path / "a", PLAN) as build:
        (build.folder / "file").write_text("x")
    assert visible(tmp_path) == []


def test_what_exists_is_never_overwritten(tmp_path: Path) -> None:
    with building(tmp_path / "a", PLAN) as build:
        build.commit({"rows": 1})
    message = "a: exists; artifacts are never overwritten, choose another name"
    with pytest.raises(ArtifactError, match=message), building(tmp_path / "a", PLAN):
        pytest.fail("the block must not be entered")
    assert read_manifest(tmp_path / "a").facts == {"rows": 1}


def test_what_appears_while_the_lock_is_taken_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other builder publishes and lets go between the first look and the lock."""
    from filelock import FileLock

    take = FileLock.acquire

    def late(lock: FileLock, *arguments: object, **options: object) -> object:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / MANIFEST).write_text("theirs")
        return take(lock, *arguments, **options)

    monkeypatch.setattr(FileLock, "acquire", late)
    with pytest.raises(ArtifactError, match="exists; artifacts are never overwritten"), building(tmp_path / "a", PLAN):
        pytest.fail("the block must not be entered")
    assert (tmp_path / "a" / MANIFEST).read_text() == "theirs"


def test_a_second_builder_is_told_that_the_first_is_at_work(tmp_path: Path, start_python: Callable) -> None:
    first = start_python(BUILDER, tmp_path / "a", "afresh")
    assert first.stdout.readline() == "building\n"
    second = start_python(BUILDER, tmp_path / "a", "afresh")
    _, problem = second.communicate()
    assert second.returncode != 0
    assert "BusyError" in problem and "another process is building it; wait for it or stop it" in problem
    with pytest.raises(BusyError), building(tmp_path / "a", PLAN):
        pytest.fail("the block must not be entered")
    first.stdin.write("go\n")
    first.stdin.flush()
    assert first.stdout.readline() == "published\n"
    assert read_manifest(tmp_path / "a").files.keys() == {"part"}


def test_a_killed_builder_leaves_nothing_visible_and_no_lease(tmp_path: Path, start_python: Callable) -> None:
    process = start_python(BUILDER, tmp_path / "a", "afresh")
    assert process.stdout.readline() == "building\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert visible(tmp_path) == []
    with building(tmp_path / "a", PLAN) as build:
        assert list(build.folder.iterdir()) == []
        build.commit({})
    assert visible(tmp_path) == ["a"]
    assert hidden(tmp_path) == []


def test_a_resuming_builder_gets_the_scratch_of_a_killed_one_back(tmp_path: Path, start_python: Callable) -> None:
    process = start_python(BUILDER, tmp_path / "a", "resume")
    assert process.stdout.readline() == "building\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with building(tmp_path / "a", PLAN, resume=True) as build:
        assert (build.folder / "part").read_text() == "done"
        build.commit({})
    assert read_manifest(tmp_path / "a").files.keys() == {"part"}
    assert hidden(tmp_path) == []


def test_finished_work_is_recognised_and_other_work_of_that_name_refused(tmp_path: Path) -> None:
    assert finished(tmp_path / "a", PLAN) is None
    with building(tmp_path / "a", PLAN) as build:
        made = build.commit({})
    assert finished(tmp_path / "a", PLAN) == made
    with pytest.raises(ArtifactError, match="holds a result of other inputs, settings or code; choose another name"):
        finished(tmp_path / "a", Plan(stage="index", code="2", config_digest="c" * 64))


def test_run_ids_of_the_caller_are_in_the_record_and_not_in_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = set()
    for name in ("a", "b"):
        monkeypatch.setenv("REALM_DAGSTER_RUN_ID", f"run-{name}")
        with building(tmp_path / name, PLAN) as build:
            made = build.commit({})
        assert made.record["dagster_run_id"] == f"run-{name}"
        digests.add(made.digest)
    assert len(digests) == 1
    monkeypatch.delenv("REALM_DAGSTER_RUN_ID")
    assert "dagster_run_id" not in provenance()


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = r"cannot be written .*; choose another --home or mend its permissions"
    with pytest.raises(ArtifactError, match=message), building(tmp_path / "file" / "a", PLAN):
        pytest.fail("the block must not be entered")


# --- small files -----------------------------------------------------------------------------------------------------


def test_a_small_file_is_replaced_whole_and_leaves_no_scratch(tmp_path: Path) -> None:
    write_durably(tmp_path / "live.json", "old")
    write_durably(tmp_path / "live.json", "new")
    assert (tmp_path / "live.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["live.json"]


def test_a_small_file_that_cannot_be_written_is_named_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_durably(tmp_path / "live.json", "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match=r"live\.json: disk full or quota reached, \d+ bytes free"):
        write_durably(tmp_path / "live.json", "new")
    with pytest.raises(ArtifactError, match=r"log\.jsonl: disk full"):
        append_durably(tmp_path / "log.jsonl", {"a": 1})
    assert (tmp_path / "live.json").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["live.json", "log.jsonl"]


def test_rows_come_back_in_order_whatever_line_breaks_they_hold(tmp_path: Path) -> None:
    rows = [{"reason": f"a{sep}b"} for sep in ("\n", "\u2028", "\u0085", "\x0b", "\r", "ü")]
    for row in rows:
        append_durably(tmp_path / "log.jsonl", row)
    assert read_json_lines(tmp_path / "log.jsonl") == rows
    # An older file may hold such characters unescaped.
    (tmp_path / "raw.jsonl").write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
    assert read_json_lines(tmp_path / "raw.jsonl") == rows


def test_a_row_after_a_torn_one_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_durably(path, {"a": 1})
    with path.open("ab") as file:
        file.write(b'{"b": 2, "tor')
    append_durably(path, {"c": 3})
    append_durably(path, {"d": 4})
    assert read_json_lines(path) == [{"a": 1}, {"c": 3}, {"d": 4}]


def test_a_log_that_is_not_there_has_no_rows(tmp_path: Path) -> None:
    assert read_json_lines(tmp_path / "log.jsonl") == []


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b: disk full or quota reached; free space"),
        (OSError(errno.EROFS, "Read-only file system", "/a/b"), "/a/b: cannot be written; choose another --home"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: cannot be written; choose another --home"),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), "a file of the home: disk full"),
        (RuntimeError("(sqlite3.OperationalError) attempt to write a readonly database"), "a file of the home: cannot"),
    ],
)
def test_trouble_with_the_disk_is_told_whoever_wraps_it(error: Exception, told: str) -> None:
    wrapped = ValueError("a tracker said so")
    wrapped.__cause__ = error
    assert str(storage_trouble(wrapped)).startswith(told)
    assert storage_trouble(ValueError("something else")) is None
