"""Fixtures shared by all tests. Large reference data is optional: tests that need it are skipped where it is absent."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

# Tests run side by side in several processes: more threads than processors only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
ARTICLES = 40  # of the bundled encyclopedia; enough questions for all three splits


# All of these look at one finished home, which takes a minute or two to make.
_OF_THE_FINISHED_HOME = {f"tests/e2e/test_{name}.py" for name in ("browser", "growth", "main_job", "services")}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where tests run in several processes, those of a file share one, and so do those of the finished home."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = super()._split_scope(nodeid)
            return "the finished home" if path in _OF_THE_FINISHED_HOME else path

    return ByFile(config, log)


def _optional_folder(variable: str, beside: str) -> Path:
    folder = Path(os.environ.get(variable, REPOSITORY.parent / "shared" / beside))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set {variable} to run this test")
    return folder


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of reference vectors made with the two earlier implementations."""
    return _optional_folder("REALM_GOLDEN", "golden")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real corpora and question sets."""
    return _optional_folder("REALM_DATA", "data")


# --- a home in miniature ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The first articles of the bundled encyclopedia and their questions, as the sources of a home."""
    folder = tmp_path_factory.mktemp("sources")
    sample = files("realm_core.sample")
    articles = [json.loads(line) for line in (sample / "encyclopedia.jsonl").read_text("utf-8").splitlines()[:ARTICLES]]
    names = {article["id"] for article in articles}
    questions = [json.loads(line) for line in (sample / "questions.jsonl").read_text("utf-8").splitlines()]
    rows = {"corpus": articles, "questions": [question for question in questions if question["article"] in names]}
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in rows}


@pytest.fixture(scope="session")
def build_home(tiny_sources: dict[str, str], refresh: Callable) -> Callable:
    """`build_home(folder, *overrides)`: a home made by calling the stages, with profile tiny; returns its Store.

    It holds corpus, questions, the warm start, the sparse reader, and run r1 at steps 0 and 4, both embedded, indexed,
    qualified and scored. Step 0 is live; step 4 has earned it and waits.
    """

    def build(folder: Path, *overrides: str) -> Any:
        from realm_core.artifacts.store import Store
        from realm_core.params import load_config
        from realm_core.ports import NullSink
        from realm_core.stages import corpus, finetune, ict, pretrain, promote, questions

        config = load_config(None, "tiny", overrides)
        store, sink = Store.create(folder, config, tiny_sources, "tiny"), NullSink()
        blocks, asked, start = (store.path(kind, "v0001") for kind in ("corpus", "questions", "ict"))
        corpus.run(config, source=store.source("corpus"), out=blocks, sink=sink)
        questions.run(config, source=store.source("questions"), out=asked, sink=sink)
        ict.run(config, corpus=blocks, out=start, sink=sink)
        reader = store.path("sparse_readers", "v0001")
        finetune.run(config, index=None, checkpoint=start, corpus=blocks, questions=asked, out=reader, sink=sink)
        training = {"store": store, "training_run": "r1", "corpus": blocks, "start": start, "sink": sink}
        for step in (0, 4):
            pretrain.run(config, **training, until=step)
            refresh(store, f"r1-s{step:07d}")
            if step == 0:
                promote.run(config, store=store, name="r1-s0000000", reason="first")
        return store

    return build


@pytest.fixture(scope="session")
def refresh() -> Callable:
    """`refresh(store, key, **config)`: embed, index, qualify and score one checkpoint; the verdict comes back."""

    def run(store: Any, key: str, config: Any = None) -> Any:
        from realm_core.ports import NullSink
        from realm_core.stages import evaluate, index, qualify, reembed

        config, sink = config or store.config(), NullSink()
        made = {"checkpoint": store.path("checkpoints", key), "corpus": store.newest("corpus")}
        reembed.run(config, **made, out=store.path("snapshots", key), sink=sink)
        made["snapshot"] = store.path("snapshots", key)
        index.run(config, **made, out=store.path("indexes", key), sink=sink)
        verdict = qualify.run(config, index=store.path("indexes", key), **made, out=store.path("verdicts", key))
        reader = store.newest("sparse_readers")
        evaluate.run(
            config,
            index=store.path("indexes", key),
            checkpoint=made["checkpoint"],
            reader=reader,
            reader_start=store.parent(reader, "checkpoint"),
            corpus=made["corpus"],
            questions=store.newest("questions"),
            split="dev",
            out=store.path("evaluations", key),
            sink=sink,
        )
        return verdict

    return run


@pytest.fixture(scope="session")
def tiny_home(build_home: Callable, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The Store of a home in miniature, shared by all tests: read it, never write to it."""
    return build_home(tmp_path_factory.mktemp("tiny") / "home")


@pytest.fixture
def copy_home(tiny_home: Any, tmp_path: Path) -> Callable:
    """`copy_home(name)`: the Store of a copy of the tiny home that a test may change. Any Store can be copied."""

    def copy(name: str = "home", of: Any = tiny_home) -> Any:
        from realm_core.artifacts.store import Store

        return Store.open(Path(shutil.copytree(of.home, tmp_path / name)))

    return copy


@pytest.fixture
def home(copy_home: Callable) -> Any:
    """One copy of the tiny home."""
    return copy_home()


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """Dagster leaves SIGTERM ignored after a run in this process. Whatever is started later inherits that, and who ends it
    waits in vain for as long as anybody may take to end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def realm(capsys: pytest.CaptureFixture[str]) -> Callable:
    """`realm("ask", "…")`: the library's command line in this process -> (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        from realm_core import cli

        capsys.readouterr()
        before, sys.argv = sys.argv, ["realm", *map(str, arguments)]
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            sys.argv = before
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def start_python() -> Iterator[Callable]:
    """`start_python(code, *arguments)`: a real process of this interpreter with piped streams; none outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
