"""DVC on the pipeline of this repository: from raw files to shards, numbers, and a remote that gives them back.

DVC lives in an environment of its own (make dvc); REALM_DVC_BIN names another one. An S3 remote is tried where
moto_server is installed beside it.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from realm_core.artifacts.manifest import read_manifest
from realm_core.artifacts.store import Store
from realm_core.params import load_config
from tests.assets.test_materialisation import World, data_version
from tests.conftest import REPOSITORY
from tests.e2e.homes import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]
PROGRAMS = Path(os.environ.get("REALM_DVC_BIN", REPOSITORY / ".venv-dvc" / "bin"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the parts that dvc.yaml names, with the settings of the profile `tiny`, and everything made once."""
    if not (PROGRAMS / "dvc").exists():
        pytest.skip(f"{PROGRAMS}: no dvc; make dvc installs it")
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(REPOSITORY / "realm_core", folder / "realm_core", ignore=shutil.ignore_patterns("__pycache__"))
    text = (REPOSITORY / "dvc.yaml").read_text(encoding="utf-8").replace("profile: demo", "profile: tiny")
    (folder / "dvc.yaml").write_text(text, encoding="utf-8")
    (folder / "data").mkdir()
    command = folder / "bin" / "realm"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m orchestration.cli "$@"\n')
    command.chmod(0o755)
    run(folder, "init", "--no-scm", "--quiet")
    run(folder, "repro", "--quiet")
    return folder


def run(folder: Path, *arguments: str) -> str:
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "DVC_NO_ANALYTICS": "1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    done = subprocess.run(
        [str(PROGRAMS / "dvc"), *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def s3(project: Path) -> Iterator[str]:
    """Address of a server of the S3 protocol with a bucket named realm."""
    if not (PROGRAMS / "moto_server").exists():
        pytest.skip(f"{PROGRAMS}: no moto_server; pip install dvc-s3 'moto[server]' there")
    port = free_port()
    server = subprocess.Popen(
        [str(PROGRAMS / "moto_server"), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
        make = (
            "import boto3, sys; boto3.client('s3', endpoint_url=sys.argv[1], aws_access_key_id='test', "
            "aws_secret_access_key='test', region_name='us-east-1').create_bucket(Bucket='realm')"
        )
        address = f"http://127.0.0.1:{port}"
        subprocess.run([str(PROGRAMS / "python"), "-c", make, address], check=True)
        yield address
    finally:
        server.terminate()
        server.wait()


def test_metrics_and_the_plot_of_block_lengths_are_there(project: Path) -> None:
    facts = read_manifest(project / "data" / "corpus").facts
    shown = json.loads(run(project, "metrics", "show", "--json"))
    assert shown[""]["data"]["data/corpus-metrics.json"]["data"]["blocks"] == facts["blocks"]
    plots = json.loads(run(project, "plots", "show", "--json"))["data"]
    values = plots["data/corpus-lengths.csv"][0]["content"]["data"]["values"]
    assert sum(int(row["blocks"]) for row in values) == facts["blocks"]
    assert "up to date" in run(project, "status")


def test_what_a_remote_keeps_comes_back_byte_for_byte(project: Path, s3: str) -> None:
    run(project, "remote", "add", "--force", "--default", "storage", "s3://realm/dvc")
    run(project, "remote", "modify", "storage", "endpointurl", s3)
    run(project, "push")
    before = read_manifest(project / "data" / "corpus")
    shutil.rmtree(project / "data" / "corpus")
    shutil.rmtree(project / ".dvc" / "cache")
    run(project, "pull")
    assert read_manifest(project / "data" / "corpus") == before


def test_dagster_shows_the_digest_of_the_shards_that_dvc_made(project: Path, tmp_path: Path) -> None:
    sources = {"corpus": str(project / "data" / "corpus"), "questions": "none"}
    world = World(
        Store.create(tmp_path / "home", load_config(None, "tiny"), sources, "tiny"), dg.DagsterInstance.ephemeral()
    )
    assert world.materialise("corpus_shards").success
    assert data_version(world.newest_event("corpus_shards")) == read_manifest(project / "data" / "corpus").digest
