"""Who may import whom, and what the definitions cost to load."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

HEAVY = ("torch", "faiss", "mlflow", "transformers")
LOAD_DEFINITIONS = """
import json, sys, time
import dagster
start = time.process_time()
import orchestration.definitions
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "modules": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sysconfig.get_path("scripts")) / "lint-imports"
    return subprocess.run([program, "--no-logo", "--no-cache"], cwd=folder, capture_output=True, text=True, check=False)


def python(code: str, folder: Path) -> str:
    """What a fresh interpreter prints; `folder` is first on its path, as with `python -m` and `dagster dev`."""
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_trainer_does_without_dagster(repository: Path) -> None:
    code = "import sys, orchestration.trainer, orchestration.resources.tracking; print('dagster' in sys.modules)"
    assert python(code, repository) == "False\n"


@pytest.mark.slow
def test_dagster_finds_every_definition_of_the_project_in_order(repository: Path) -> None:
    program = Path(sysconfig.get_path("scripts")) / "dg"
    command = [program, "check", "defs", "--verbose"]
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "DAGSTER_DISABLE_TELEMETRY": "1"}
    result = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    said = result.stdout + result.stderr
    assert result.returncode == 0 and "All definitions loaded successfully" in said, said
    assert "Warning" not in said, said


def test_every_import_contract_is_kept(repository: Path) -> None:
    result = lint_imports(repository)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("realm_core/errors.py", "import dagster", "realm_core runs without an orchestrator"),
        ("realm_core/ports.py", "from mlflow import tracking", "realm_core runs without an orchestrator"),
        ("realm_core/ports.py", "import assets", "never back"),
        ("assets/__init__.py", "import orchestration", "never back"),
        ("realm_core/errors.py", "from realm_core import ports", "inside realm_core"),
        ("realm_core/newcomer.py", "", "inside realm_core"),
    ],
)
def test_the_contracts_refuse(repository: Path, tmp_path: Path, module: str, statement: str, contract: str) -> None:
    for name in ("realm_core/__init__.py", "realm_core/errors.py", "realm_core/ports.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for package in ("assets", "orchestration"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "pyproject.toml").write_text((repository / "pyproject.toml").read_text())
    (tmp_path / module).write_text(statement + "\n")
    result = lint_imports(tmp_path)
    assert result.returncode != 0
    broken = [line for line in result.stdout.splitlines() if line.endswith("BROKEN")]
    assert len(broken) == 1 and contract in broken[0], result.stdout + result.stderr


@pytest.mark.slow
def test_loading_the_definitions_stays_cheap(repository: Path) -> None:
    # Dagster imports them again for every run, every step and every reload of the code server.
    if not (repository / "orchestration" / "definitions.py").exists():
        pytest.skip("orchestration/definitions.py does not exist")
    loads = [json.loads(python(LOAD_DEFINITIONS, repository)) for _ in range(2)]
    assert not set(HEAVY) & set(loads[0]["modules"])
    assert min(load["seconds"] for load in loads) < 1.0  # processor seconds beyond dagster's own


@pytest.mark.slow
def test_the_mlflow_folder_never_hides_the_package(repository: Path) -> None:
    assert list((repository / "mlflow").rglob("*.py")) == []
    found = Path(python("import mlflow.version; print(mlflow.__file__)", repository).strip())
    assert not found.is_relative_to(repository / "mlflow")
    assert found.is_relative_to(sysconfig.get_path("purelib"))
