"""The live pointer: what it names, what its history keeps, and what a rollback goes back to."""

import json
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from realm_core.artifacts.keys import checkpoint_key, parse_key
from realm_core.artifacts.pointer import Pointer
from realm_core.artifacts.publish import append_durably
from realm_core.errors import ArtifactError


@pytest.fixture
def pointer(tmp_path: Path) -> Pointer:
    return Pointer(tmp_path)


def move(pointer: Pointer, index: str, reason: str = "better") -> None:
    pointer.move_live(index, f"digest of {index}", f"checkpoint of {index}", reason, None)


def test_nothing_is_live_at_first(pointer: Pointer) -> None:
    assert pointer.live() is None
    with pytest.raises(ArtifactError, match="no index is live yet; run realm demo, realm run, or promote one"):
        pointer.require_live()


def test_generations_count_and_the_history_keeps_every_move(pointer: Pointer) -> None:
    for step in (0, 4, 2):
        move(pointer, checkpoint_key("r1", step), f"step {step}")
    history = pointer.live_history()
    assert [(live.generation, live.reason) for live in history] == [(1, "step 0"), (2, "step 4"), (3, "step 2")]
    assert history[-1] == pointer.live()


def test_the_history_only_grows(pointer: Pointer) -> None:
    path = pointer.home / "live.history.jsonl"
    before = b""
    for step in range(4):
        move(pointer, checkpoint_key("r1", step))
        now = path.read_bytes()
        assert now.startswith(before) and len(now) > len(before)
        before = now


def test_a_move_that_a_crash_cut_short_costs_no_generation_number(pointer: Pointer) -> None:
    move(pointer, "r1-s0000000")
    lost = {**asdict(pointer.require_live()), "generation": 2, "index": "r1-s0000004"}
    append_durably(pointer.home / "live.history.jsonl", lost)  # the crash came before live.json
    move(pointer, "r1-s0000008")
    assert [live.generation for live in pointer.live_history()] == [1, 2, 3]
    assert pointer.require_live().generation == 3


@pytest.mark.parametrize("text", ["", '{"index": "r1', "[]", '{"schema": 1}'])
def test_a_damaged_pointer_is_refused_and_the_named_remedy_works(pointer: Pointer, text: str) -> None:
    move(pointer, "r1-s0000004")
    (pointer.home / "live.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"damaged; put the last line of live\.history\.jsonl in its place"):
        pointer.live()
    (pointer.home / "live.json").write_text((pointer.home / "live.history.jsonl").read_text().splitlines()[-1])
    assert pointer.require_live().index == "r1-s0000004"


def test_a_pointer_of_a_newer_schema_is_refused(pointer: Pointer) -> None:
    move(pointer, "r1-s0000004")
    values = json.loads((pointer.home / "live.json").read_text())
    (pointer.home / "live.json").write_text(json.dumps({**values, "schema": 2, "new": 1}))
    with pytest.raises(ArtifactError, match="schema 2, this code reads 1; use the version that wrote it"):
        pointer.live()


def test_readers_never_see_half_a_move(pointer: Pointer, start_python: Callable) -> None:
    code = """
import sys
from pathlib import Path
from realm_core.artifacts.keys import checkpoint_key
from realm_core.artifacts.pointer import Pointer
pointer = Pointer(Path(sys.argv[1]))
for step in range(int(sys.argv[2])):
    key = checkpoint_key("r1", step)
    pointer.move_live(key, f"digest of {key}", f"checkpoint of {key}", "x" * 3000, None)
"""
    moves = 60
    seen: set[int] = set()
    stop = threading.Event()
    problems: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                if (live := pointer.live()) is not None:
                    assert live.index_digest == f"digest of {live.index}"
                    assert live.generation == parse_key(live.index)[1] + 1
                    seen.add(live.generation)
        except BaseException as problem:
            problems.append(problem)

    readers = [threading.Thread(target=read) for _ in range(2)]
    writer = start_python(code, pointer.home, moves)
    for reader in readers:
        reader.start()
    _, problem = writer.communicate()
    stop.set()
    for reader in readers:
        reader.join()
    assert (problem, problems) == ("", [])
    assert len(seen) > 1
    assert [live.generation for live in pointer.live_history()] == list(range(1, moves + 1))


def test_two_writers_give_every_generation_once(pointer: Pointer, start_python: Callable) -> None:
    code = """
import sys
from pathlib import Path
from realm_core.artifacts.pointer import Pointer
pointer = Pointer(Path(sys.argv[1]))
for step in range(20):
    pointer.move_live("r1-s0000000", "digest", "checkpoint", "better", None)
"""
    writers = [start_python(code, pointer.home) for _ in range(2)]
    for writer in writers:
        assert writer.communicate()[1] == ""
    assert sorted(live.generation for live in pointer.live_history()) == list(range(1, 41))


@pytest.mark.parametrize(
    ("moves", "target"),
    [
        ("0", None),
        ("0 4", "0"),
        ("0 4 8", "4"),
        ("0 4 8 4", "0"),  # gone back once: the bad one is not gone back to
        ("0 4 8 4 0", None),
        ("0 4 8 4 12", "4"),
        ("0 4 8 4 8", "4"),  # made live again after all
        ("0 4 8 6", "4"),  # gone back to one that was never live
        ("0 4 8 2", "0"),
    ],
)
def test_a_rollback_goes_back_to_what_nobody_went_back_from(pointer: Pointer, moves: str, target: str | None) -> None:
    for step in moves.split():
        move(pointer, checkpoint_key("r1", int(step)))
    found = pointer.rollback_target()
    assert (found.index if found else None) == (checkpoint_key("r1", int(target)) if target else None)


def test_a_rollback_of_an_edited_pointer_goes_to_what_the_last_promotion_made_live(pointer: Pointer) -> None:
    for step in (0, 4, 8):
        move(pointer, checkpoint_key("r1", step))
    values = json.loads((pointer.home / "live.json").read_text())
    (pointer.home / "live.json").write_text(json.dumps({**values, "index": "r1-s0000004"}))
    found = pointer.rollback_target()
    assert found is not None and found.index == "r1-s0000008"


def test_a_move_that_a_crash_cut_short_is_not_gone_back_to(pointer: Pointer) -> None:
    for step in (0, 4):
        move(pointer, checkpoint_key("r1", step))
    lost = {**asdict(pointer.require_live()), "generation": 3, "index": "r1-s0000008"}
    append_durably(pointer.home / "live.history.jsonl", lost)
    found = pointer.rollback_target()
    assert found is not None and found.index == "r1-s0000000"
