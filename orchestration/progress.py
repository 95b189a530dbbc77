"""Progress of the stages that run in other processes, told to the person who waits for the main job."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from realm_core.ports import Progress


class LogProgress:
    """Tells the newest line of progress that a log took in since the last look."""

    def __init__(self, log: Path, say: Callable[[str], None]) -> None:
        self.log, self.say = log, say
        self.told = log.stat().st_size if log.exists() else 0  # bytes

    def tell(self) -> None:
        with suppress(OSError):  # nobody has written to it yet
            with self.log.open("rb") as file:
                file.seek(self.told)
                news = file.read()
            complete = news[: news.rfind(b"\n") + 1]
            self.told += len(complete)
            lines = [line for line in complete.decode(errors="replace").splitlines() if Progress.LINE.fullmatch(line)]
            if lines:
                self.say(lines[-1])
