"""Checks the project's own code against reference vectors of the two earlier implementations of REALM.

A folder of reference vectors holds, for a family F and a set s, `F_s.config.json`, `F_s.inputs.npz`, `F_s.outputs.npz`,
`F_s.state.safetensors` and the like, or one `F_s.json`. Outputs are called NAME/f32 and NAME/f64, or NAME alone where
they are integers or booleans. A family is one function that computes the same names here. Nothing depends on the name
of a set or on its sizes; an output that is not computed, a JSON value that no check looks at and a family that is not
known count as misses.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from realm_core.compat import golden_model, golden_openqa, golden_text
from realm_core.compat.golden_case import UNREAD, CaseFiles, Comparison, Family, Section
from realm_core.errors import DataError

TOLERANCE = {"float32": (1e-4, 2e-5), "float64": (1e-9, 1e-10)}  # relative, absolute
FAMILIES: dict[str, Family] = {**golden_model.FAMILIES, **golden_openqa.FAMILIES, **golden_text.FAMILIES}
DATA_SECTIONS = ("vocab",)  # parts of a JSON file that other parts use
_CASE_FILE = re.compile(r"(?P<family>.+)_(?P<set>[^_.]+)(?:\.[^.]+)*\.(?:json|npz|safetensors)")


@dataclass(frozen=True)
class GoldenResult:
    """One compared quantity, or one case that could not run.

    `error` is the largest absolute difference; infinite where nothing could be compared, and 1 for unequal text.
    """

    case: str
    precision: str
    error: float
    ok: bool
    message: str


def run_golden(folder: Path) -> Iterator[GoldenResult]:
    """Run every case of a folder with the project's code. Raises DataError when the folder holds none."""
    cases = find_cases(folder)
    if not cases:
        raise DataError(f"{folder}: no reference vectors (F_s.outputs.npz or F_s.json) here; name the folder with them")
    for case in cases:
        yield from run_case(case)


def find_cases(folder: Path) -> list[CaseFiles]:
    """All cases of a folder, in the order of their names."""
    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder; name the folder with the reference vectors")
    matches = [_CASE_FILE.fullmatch(path.name) for path in sorted(folder.iterdir())]
    pairs = dict.fromkeys((match["family"], match["set"]) for match in matches if match)
    return [CaseFiles(folder, family, set_name) for family, set_name in pairs]


def run_case(case: CaseFiles) -> Iterator[GoldenResult]:
    """Run one case: once in each precision, or once if it holds text and integers only."""
    if case.path("outputs.npz").is_file():
        yield from _run(case.name, FAMILIES.get(case.family), case)
        return
    try:
        content = case.json("json")
    except (OSError, ValueError) as error:
        yield _miss(case.name, "exact", f"cannot run: {case.path('json')} is not readable ({error})")
        return
    if case.family in FAMILIES:
        yield from _run(case.name, FAMILIES[case.family], Section(content, content))
        return
    for name in [name for name in content if name not in DATA_SECTIONS]:
        yield from _run(f"{case.name}/{name}", FAMILIES.get(f"{case.family}.{name}"), Section(content[name], content))


def summarise(results: Iterable[GoldenResult]) -> list[GoldenResult]:
    """One line a case (a family, or a section of a JSON file) and precision: its worst error and first miss."""
    groups: dict[tuple[str, str], list[GoldenResult]] = {}
    for result in results:
        case = result.case.partition(": ")[0]
        groups.setdefault((case, result.precision), []).append(result)
    lines = []
    for (case, precision), members in groups.items():
        misses = [member for member in members if not member.ok]
        message = f"{len(members) - len(misses)} of {len(members)} agree"
        if misses:
            message += f"; first miss {misses[0].case}: {misses[0].message}"
        lines.append(GoldenResult(case, precision, max(member.error for member in members), not misses, message))
    return lines


def _run(name: str, family: Family | None, content: Any) -> Iterator[GoldenResult]:
    if family is None:
        yield _miss(name, "exact", "cannot run: no code here for this kind of case")
        return
    for precision in family.precisions:
        try:
            comparisons = list(family.check(content, precision))
        except Exception as error:  # one broken case must not hide the others, whatever breaks it
            yield _miss(name, precision, f"cannot run: {type(error).__name__}: {error}")
            continue
        if not comparisons:
            yield _miss(name, precision, "cannot run: the case holds nothing to compare")
        for comparison in comparisons:
            yield _judge(f"{name}: {comparison.name}", precision, comparison)


def _miss(case: str, precision: str, message: str) -> GoldenResult:
    return GoldenResult(case, precision, float("inf"), False, message)


def _judge(case: str, precision: str, comparison: Comparison) -> GoldenResult:
    if comparison.found is UNREAD:
        return _miss(case, precision, "no check here looks at this value")
    found, expected = _plain(comparison.found), _plain(comparison.expected)
    if found is None and expected is not None:
        return _miss(case, precision, "not computed")
    if comparison.precision == "exact" or not _are_real(found, expected):
        equal = _are_equal(found, expected)
        message = "equal" if equal else f"found {_short(found)}, expected {_short(expected)}"
        return GoldenResult(case, precision, 0.0 if equal else 1.0, equal, message)
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        return _miss(case, precision, f"shape {found.shape}, expected {expected.shape}")
    relative, absolute = TOLERANCE[comparison.precision]
    difference = np.abs(found - expected)
    ok = bool(np.all(difference <= absolute + relative * np.abs(expected)))  # false for anything that is not a number
    error = float(difference.max(initial=0.0))
    verdict = "within" if ok else "beyond"
    return GoldenResult(
        case, precision, error, ok, f"largest error {error:.2e}, {verdict} {comparison.precision} tolerance"
    )


def _plain(value: Any) -> Any:
    return value.detach().numpy() if isinstance(value, torch.Tensor) else value


def _are_real(found: Any, expected: Any) -> bool:
    """Whether these are numbers to be compared within a tolerance. JSON writes a real number as 1 where it is whole."""
    kinds = _kind(found) + _kind(expected)
    return "f" in kinds and not set(kinds) - set("biuf")


def _kind(value: Any) -> str:
    try:
        return np.asarray(value).dtype.kind
    except ValueError:  # lists of different lengths
        return "O"


def _are_equal(found: Any, expected: Any) -> bool:
    if isinstance(found, np.ndarray) or isinstance(expected, np.ndarray):
        return np.array_equal(found, expected)
    return bool(found == expected)


def _short(value: Any) -> str:
    text = json.dumps(value.tolist() if isinstance(value, np.ndarray) else value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
