"""What no source file may do."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.save", "read_pickle", "to_pickle"}
# A place on somebody's machine. Written so that this line is not one.
DEVELOPER_PATH = re.compile(r"(?<![\w.~-])(?:/(?:home|Users)/\w|/(?:root|work)/|[A-Z]:\\+Users\\)")


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def unsafe(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and reason of everything that could read or write pickled objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from ((node.lineno, name) for name in names if name.partition(".")[0] in UNSAFE_MODULES)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if called == "torch.load" and not _is(given.get("weights_only"), True):
            yield node.lineno, "torch.load without weights_only=True"
        # numpy.save pickles an object array unless told not to.
        if re.fullmatch(r"(np|numpy)\.(load|save)", called) and not _is(given.get("allow_pickle"), False):
            yield node.lineno, f"{called} without allow_pickle=False"
        elif "allow_pickle" in given and not _is(given["allow_pickle"], False):
            yield node.lineno, "allow_pickle is not False"
        if called in UNSAFE_CALLS or called.rpartition(".")[2] in UNSAFE_CALLS:
            yield node.lineno, called


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import pickle as p",
        "from cloudpickle import dumps",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.save(state, path)",
        "np.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "np.save(path, rows)",
        "np.savez(path, allow_pickle=flag)",
        "frame.to_pickle(path)",
    ],
)
def test_the_search_for_pickles_finds(line: str) -> None:
    assert len(list(unsafe(ast.parse(line)))) == 1


@pytest.mark.parametrize("line", ["torch.load(path, weights_only=True)", "np.load(path, allow_pickle=False)"])
def test_the_search_for_pickles_passes(line: str) -> None:
    assert list(unsafe(ast.parse(line))) == []


def test_no_source_file_pickles(sources: list[Path], repository: Path) -> None:
    assert sources
    found = [
        f"{path.relative_to(repository)}:{line}: {reason}"
        for path in sources
        for line, reason in unsafe(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize("place", ["/home" + "/ann/x", "'/root" + "/x'", "/Users" + "/ann", "C:\\" + "Users\\ann"])
def test_the_search_for_developer_paths_finds(place: str) -> None:
    assert DEVELOPER_PATH.search(place)


@pytest.mark.parametrize("text", ["https://example.org/work/x", "a/root/b", "~/work/x", "framework/"])
def test_the_search_for_developer_paths_passes(text: str) -> None:
    assert not DEVELOPER_PATH.search(text)


def test_no_file_names_a_place_on_a_developer_machine(repository: Path) -> None:
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(listing, cwd=repository, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip("not a git working tree, so project files cannot be told from results")
    found = []
    for name in filter(None, result.stdout.split("\0")):
        path = repository / name
        if not path.is_file():
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # a picture or an archive
            continue
        found += [f"{name}:{number}" for number, line in enumerate(lines, 1) if DEVELOPER_PATH.search(line)]
    assert found == []
