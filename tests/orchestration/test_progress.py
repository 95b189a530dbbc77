"""Progress that other processes write to their logs reaches the terminal of the main job."""

from pathlib import Path

from orchestration.progress import LogProgress
from realm_core.ports import Progress


def test_the_newest_progress_is_told_once_and_nothing_else_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "jobs.log"
    log.write_text("ict: 1/9 steps, 0.5/s, 16 s left of an earlier run\n")
    told: list[str] = []
    progress = LogProgress(log, told.append)
    progress.tell()
    assert told == []
    with log.open("a") as file:
        bar = Progress("inverse cloze task", 18, stream=file, every_seconds=0.0, clock=iter(range(9)).__next__)
        file.write("2026-11-24 17:00:00 dagster - DEBUG - ict: STEP_START: 1/2 things\n")
        bar.update(3, "loss 2.1")
        bar.update(6, "loss 1.9")
        file.write("a line that is not com")
        file.flush()
        progress.tell()
        progress.tell()
        assert told == ["inverse cloze task: 6/18 steps, 3.0/s, 4 s left loss 1.9"]
        file.write("plete\n")
        bar.update(9)
        progress.tell()
    assert told[1:] == ["inverse cloze task: 9/18 steps, 3.0/s, 3 s left"]


def test_a_log_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    told: list[str] = []
    progress = LogProgress(tmp_path / "trainer.log", told.append)
    progress.tell()
    (tmp_path / "trainer.log").write_bytes(b"\xff\xfe\npretrain r1: 1/60 steps, 0.0/s, 2358 s left loss 9.213 age 0\n")
    progress.tell()
    assert told == ["pretrain r1: 1/60 steps, 0.0/s, 2358 s left loss 9.213 age 0"]
