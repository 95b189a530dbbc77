"""The installed environment is one that works: conflicts which no resolver reports are looked for here."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from dagster import AssetSelection
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ONLY_OUTSIDE = ("dvc", "hydra-core", "omegaconf")  # they bring antlr4 4.9, see the first test


@pytest.fixture(scope="module")
def declared(repository: Path) -> dict[str, list[Requirement]]:
    """Requirements of the base install (under "") and of every extra."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: [Requirement(line) for line in lines] for extra, lines in groups.items()}


@pytest.fixture(scope="module")
def pins(repository: Path) -> list[Requirement]:
    lines = (repository / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_a_selection_written_as_a_string_parses() -> None:
    assert AssetSelection.from_string("a") == AssetSelection.assets("a")
    assert AssetSelection.from_string("a+") == AssetSelection.assets("a").downstream(depth=1)


def test_nothing_that_breaks_the_selection_parser_is_installed_or_asked_for(
    declared: dict[str, list[Requirement]], pins: list[Requirement]
) -> None:
    installed = {canonicalize_name(found.name) for found in importlib.metadata.distributions()}
    asked_for = {canonicalize_name(each.name) for group in [*declared.values(), pins] for each in group}
    assert (installed | asked_for).isdisjoint(ONLY_OUTSIDE)


def test_one_distribution_at_most_provides_faiss() -> None:
    providers = sorted(set(importlib.metadata.packages_distributions().get("faiss", [])))
    assert len(providers) <= 1, f"{providers} overwrite each other; uninstall all of them, then install one"


def test_no_two_extras_without_gpu_ask_for_different_faiss_builds(declared: dict[str, list[Requirement]]) -> None:
    builds = {extra: {each.name for each in group if "faiss" in each.name} for extra, group in declared.items()}
    assert builds.pop("gpu") == {"faiss-gpu"}
    assert set().union(*builds.values()) == {"faiss-cpu"}
    assert not builds[""]  # the base install searches with torch and leaves the choice open


def test_every_dependency_is_pinned_within_its_range(
    declared: dict[str, list[Requirement]], pins: list[Requirement]
) -> None:
    pinned = {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in pins}
    for each in [each for extra, group in declared.items() if extra != "gpu" for each in group]:
        version = pinned.get(canonicalize_name(each.name))
        assert version is not None, f"{each.name} has no pin; run make constraints"
        assert each.specifier.contains(version), f"{each} does not admit the pin {version}; run make constraints"


def test_every_pin_is_exact_and_names_no_local_build(repository: Path) -> None:
    for name in ("constraints.txt", "requirements-dvc.txt"):
        lines = (repository / name).read_text().splitlines()
        for each in [Requirement(line) for line in lines if line and not line.startswith("#")]:
            (specifier,) = each.specifier
            assert specifier.operator == "==", f"{name}: {each}"
            assert not set("*+") & set(specifier.version), f"{name}: {each}"
