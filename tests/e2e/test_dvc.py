"""DVC on the pipeline of this repository: from raw files to shards, numbers, and a remote that gives them back; and on
versions of a corpus that commands made.

DVC lives in an environment of its own (make dvc); REALM_DVC_BIN names another one. The S3 remote is a server
of the tests' own environment.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest

from realm_core.artifacts.manifest import open_artifact, read_manifest
from realm_core.artifacts.store import Store
from realm_core.corpus.shards import Corpus
from realm_core.params import load_config
from realm_core.ports import NullSink
from realm_core.stages import corpus
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
    git(folder, "init", "--quiet")
    run(folder, "init", "--quiet")
    run(folder, "repro", "--quiet")
    return folder


def git(folder: Path, *arguments: str) -> None:
    somebody = ("-c", "user.name=somebody", "-c", "user.email=somebody@localhost")
    subprocess.run(["git", *somebody, *arguments], cwd=folder, check=True, capture_output=True)


def run(folder: Path, *arguments: str, refused: bool = False) -> str:
    """What a command of DVC prints; with `refused` what it says when it refuses, as it must."""
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
    assert (done.returncode != 0) is refused, done.stdout + done.stderr
    return done.stderr if refused else done.stdout


@pytest.fixture
def s3(project: Path) -> Iterator[str]:
    """Address of a server of the S3 protocol with a bucket named realm."""
    port = free_port()
    server = subprocess.Popen(
        [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)],
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
        subprocess.run([sys.executable, "-c", make, address], check=True)
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


@pytest.fixture
def remote(project: Path, s3: str) -> None:
    run(project, "remote", "add", "--force", "--default", "storage", "s3://realm/dvc")
    run(project, "remote", "modify", "storage", "endpointurl", s3)


@pytest.mark.usefixtures("remote")
def test_what_a_remote_keeps_comes_back_byte_for_byte(project: Path) -> None:
    run(project, "push")
    before = read_manifest(project / "data" / "corpus")
    shutil.rmtree(project / "data" / "corpus")
    shutil.rmtree(project / ".dvc" / "cache")
    run(project, "pull")
    assert read_manifest(project / "data" / "corpus") == before


def home_on(folder: Path, shards: Path) -> Store:
    """A home whose first corpus is a folder of finished shards."""
    config = load_config(None, "tiny")
    store = Store.create(folder, config, {"corpus": str(shards), "questions": "none"}, "tiny")
    corpus.of_home(config, store=store, sink=NullSink())
    return store


@pytest.mark.usefixtures("remote")
def test_versions_that_commands_made_go_through_a_remote_into_an_empty_clone(
    project: Path, tmp_path: Path, realm: Callable
) -> None:
    """The home stays the owner of its versions; DVC owns the copy that `dvc add --out` makes."""
    store = home_on(tmp_path / "home", project / "data" / "corpus")
    title = Corpus.open(project / "data" / "corpus").block(0).title
    new = tmp_path / "new.jsonl"
    new.write_text('{"id": "n", "title": "Quorvane", "text": "The lighthouse of Quorvane is made of glass."}\n')
    for words in (("add", new), ("remove", "--title", title)):
        code, _, problem = realm("corpus", *words, "--home", store.home)
        assert code == 0, problem
    run(project, "push")
    for name in ("v0002", "v0003"):
        run(project, "add", "--out", f"data/corpus-{name}", str(store.path("corpus", name)))
    pushed = int(run(project, "push").split(" file", maxsplit=1)[0].split()[-1])
    first, *grown = (set(store.manifest("corpus", name).files.values()) for name in ("v0001", "v0002", "v0003"))
    lists = 2 * len(grown)  # the manifest of each, and DVC's own list of its files
    assert pushed == len(set.union(*grown) - first) + lists  # what the versions share is there already
    refusal = run(project, "add", "--out", "data/corpus", str(store.path("corpus", "v0003")), refused=True)
    assert "overlaps with an output of stage: 'corpus'" in refusal
    assert "up to date" in run(project, "status")

    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "grown versions")
    clone = tmp_path / "clone"
    git(project, "clone", "--quiet", ".", str(clone))
    assert not (clone / "data" / "corpus-v0002").exists()
    run(clone, "pull", "data/corpus-v0002.dvc", "data/corpus-v0003.dvc")
    for name in ("v0002", "v0003"):
        assert open_artifact(clone / "data" / f"corpus-{name}", "corpus") == store.manifest("corpus", name)
    pulled = clone / "data" / "corpus-v0003"
    assert "made of glass" in realm("corpus", "show", pulled, "--title", "Quorvane")[1]
    assert "no document titled" in realm("corpus", "show", pulled, "--title", title)[2]
    assert "| articles |" in realm("corpus", "report", pulled)[1]

    elsewhere = home_on(tmp_path / "elsewhere", pulled)
    assert realm("corpus", "remove", "--id", "n", "--home", elsewhere.home)[0] == 0
    told = json.loads(realm("corpus", "status", "--home", elsewhere.home, "--json")[1])
    assert [row["change"] for row in told["versions"]] == ["remove -1", "remove -1"]
    assert told["versions"][0]["digest"] == store.manifest("corpus", "v0003").digest


def test_dagster_shows_the_digest_of_the_shards_that_dvc_made(project: Path, tmp_path: Path) -> None:
    sources = {"corpus": str(project / "data" / "corpus"), "questions": "none"}
    world = World(
        Store.create(tmp_path / "home", load_config(None, "tiny"), sources, "tiny"), dg.DagsterInstance.ephemeral()
    )
    assert world.materialise("corpus_shards").success
    assert data_version(world.newest_event("corpus_shards")) == read_manifest(project / "data" / "corpus").digest
