"""The files of a reference case, and what a check returns. See `golden` for the layout of the folder."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from realm_core.compat.golden_keys import noted, plain, unread
from realm_core.errors import DataError

DTYPES = {"float32": torch.float32, "float64": torch.float64}
SUFFIX = {"float32": "/f32", "float64": "/f64"}


@dataclass(frozen=True)
class CaseFiles:
    """The files of one family and set, all named `FAMILY_SET.*`."""

    folder: Path
    family: str
    set_name: str

    @property
    def name(self) -> str:
        return f"{self.family}_{self.set_name}"

    def path(self, part: str) -> Path:
        """The file of a part, for example "inputs.npz"."""
        return self.folder / f"{self.name}.{part}"

    def json(self, part: str) -> Any:
        """A JSON file."""
        return json.loads(self.path(part).read_text(encoding="utf-8"))

    def arrays(self, part: str) -> dict[str, np.ndarray]:
        """All arrays of an npz file."""
        with np.load(self.path(part), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The numeric inputs as tensors, real numbers cast to `dtype`."""
        tensors = {
            name: torch.from_numpy(array)
            for name, array in self.arrays("inputs.npz").items()
            if array.dtype.kind in "biuf"
        }
        return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}

    def load(self, module: nn.Module, dtype: torch.dtype, part: str = "state.safetensors", prefix: str = "") -> None:
        """Fill `module` from a state file: its own keys, each behind `prefix`. Others (tied copies, unused heads) are
        left aside. The module ends in evaluation mode and in `dtype`."""
        tensors = load_file(self.path(part))
        wanted = [name for name in module.state_dict() if prefix + name not in tensors]
        if wanted:
            raise DataError(f"{self.path(part)}: no tensor {prefix + wanted[0]} ({len(wanted)} are missing)")
        module.load_state_dict({name: tensors[prefix + name] for name in module.state_dict()})
        module.to(dtype).eval()


@dataclass(frozen=True)
class Comparison:
    """What was computed beside what the reference says; `precision` is that of the reference."""

    name: str
    found: Any
    expected: Any
    precision: str


@dataclass(frozen=True)
class Section:
    """One part of a JSON file, with the file around it, which may hold the vocabulary."""

    content: Any
    file: Mapping[str, Any]


Record = tuple[str, Any, Any]  # name, found, expected
Check = Callable[[Any, str], Iterable[Comparison]]  # (CaseFiles or Section, precision) -> comparisons
CompareExtra = Callable[[CaseFiles, Any, Mapping[str, Any]], Iterable[Record]]  # extra.json, what was computed


class _Unread:
    """Stands for the result of a check that does not exist."""


UNREAD = _Unread()


@dataclass(frozen=True)
class Family:
    """One check and the precisions it runs in."""

    check: Check
    precisions: tuple[str, ...]


def from_outputs(
    compute: Callable[[CaseFiles, torch.dtype], Mapping[str, Any]],
    compare_extra: CompareExtra | None = None,
) -> Family:
    """A family whose outputs are an npz file: every array in it is compared with what `compute` calls the same.

    `compare_extra` compares what an `extra.json` adds.
    """

    def check(case: CaseFiles, precision: str) -> Iterable[Comparison]:
        expected = _outputs_in(case.arrays("outputs.npz"), precision)
        found = compute(case, DTYPES[precision])
        comparisons = [Comparison(name, found.get(name), array, precision) for name, array in expected.items()]
        if case.path("extra.json").is_file():
            extra = noted(case.json("extra.json"))
            records = _complete(extra, compare_extra(case, extra, found) if compare_extra else (), ())
            comparisons += [Comparison(f"extra/{name}", mine, theirs, "exact") for name, mine, theirs in records]
        return comparisons

    return Family(check, tuple(DTYPES))


def _outputs_in(arrays: Mapping[str, np.ndarray], precision: str) -> dict[str, np.ndarray]:
    """The outputs of one precision by bare name. What exists in float64 only serves float32 as well."""
    fallback, wanted = SUFFIX["float64"], SUFFIX[precision]
    chosen: dict[str, np.ndarray] = {}
    for suffix in dict.fromkeys((fallback, wanted)):
        chosen.update({key.removesuffix(suffix): array for key, array in arrays.items() if key.endswith(suffix)})
    plain = {key: array for key, array in arrays.items() if not key.endswith(tuple(SUFFIX.values()))}
    return {**plain, **chosen}


def from_float32_records(
    compute: Callable[[Any, torch.dtype], Iterable[Record]], inputs: Collection[str] = ()
) -> Family:
    """A JSON section with float32 results: both precisions run, and are held to the float32 tolerance.

    `inputs` are the keys that are no results: what the reference was given, and what people may want to know of it.
    """

    def check(section: Section, precision: str) -> Iterable[Comparison]:
        content = noted(section.content)
        records = _complete(content, compute(content, DTYPES[precision]), inputs)
        return [Comparison(*record, "float32") for record in records]

    return Family(check, tuple(DTYPES))


def exact(compute: Callable[[Section], Iterable[Record]], inputs: Collection[str] = ()) -> Family:
    """Text and integers: equal or not. `inputs` as for `from_float32_records`."""

    def check(section: Section, _: str) -> Iterable[Comparison]:
        content = noted(section.content)
        records = _complete(content, compute(Section(content, section.file)), inputs)
        return [Comparison(*record, "exact") for record in records]

    return Family(check, ("exact",))


def _complete(content: Any, records: Iterable[Record], inputs: Collection[str]) -> Iterable[Record]:
    """The records, and after them one for every value that none of them looked at."""
    for name, found, expected in records:
        yield name, found, plain(expected)
    for place in unread(content, inputs):
        yield place, UNREAD, None
