"""A home whose corpus is a folder of finished shards, as DVC leaves one; and the numbers DVC shows of such a folder."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from realm_core.artifacts.manifest import MANIFEST, Manifest, read_manifest
from realm_core.artifacts.store import Store
from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.corpus.sources import Source
from realm_core.errors import ArtifactError, ConfigError, DataError
from realm_core.params import load_config
from realm_core.ports import NullSink
from realm_core.stages import corpus, grow

SINK = NullSink()


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(None, "tiny")


@pytest.fixture(scope="module")
def built(tiny_sources: dict[str, str], config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `realm corpus build` leaves; never changed."""
    folder = tmp_path_factory.mktemp("dvc") / "corpus"
    corpus.run(config, source=tiny_sources["corpus"], out=folder, sink=SINK)
    return folder


@pytest.fixture
def shards(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    import shutil

    return Path(shutil.copytree(built, tmp_path / "shards"))


def home_on(folder: Path, source: Path, config: Config) -> Store:
    return Store.create(folder / "home", config, {"corpus": str(source), "questions": "none"}, "tiny")


def test_a_home_on_finished_shards_has_their_digest_and_shares_their_bytes(
    shards: Path, tmp_path: Path, config: Config
) -> None:
    store = home_on(tmp_path, shards, config)
    folder, manifest = corpus.of_home(config, store=store, sink=SINK)
    assert (folder.name, manifest.digest) == ("v0001", read_manifest(shards).digest)
    assert manifest == read_manifest(folder)
    assert (folder / "shard-000" / "tokens.safetensors").samefile(shards / "shard-000" / "tokens.safetensors")
    assert corpus.of_home(config, store=store, sink=SINK)[0] == folder
    assert store.names("corpus") == ["v0001"]


def test_such_a_home_grows_and_its_source_may_not_change(shards: Path, tmp_path: Path, config: Config) -> None:
    store = home_on(tmp_path, shards, config)
    first, _ = corpus.of_home(config, store=store, sink=SINK)
    victim = Corpus.open(first).block(0).doc_id
    grow.apply(config, store=store, change=grow.Remove(ids=[victim]), sink=SINK)
    assert corpus.of_home(config, store=store, sink=SINK)[0].name == "v0002"
    reseal(shards, facts={**read_manifest(shards).facts, "pages": 0})
    with pytest.raises(
        DataError, match=r"shards: changed since .*home was made from it; restore it and bring the change with"
    ):
        corpus.of_home(config, store=store, sink=SINK)


def test_an_altered_byte_is_refused_and_nothing_is_published(shards: Path, tmp_path: Path, config: Config) -> None:
    path = shards / "shard-001" / "tokens.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    store = home_on(tmp_path, shards, config)
    with pytest.raises(ArtifactError, match=r"tokens\.safetensors: other bytes than its manifest says"):
        corpus.of_home(config, store=store, sink=SINK)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"tokens\.safetensors: missing; run the stage corpus again"):
        corpus.of_home(config, store=store, sink=SINK)
    assert store.names("corpus") == []


@pytest.mark.parametrize("name", ["../../escaped", "/etc/passwd"])
def test_a_manifest_that_names_files_outside_its_folder_is_refused(
    shards: Path, tmp_path: Path, config: Config, name: str
) -> None:
    reseal(shards, files={**read_manifest(shards).files, name: "0" * 64})
    with pytest.raises(ArtifactError, match="outside its folder; this is no artifact of ours"):
        corpus.of_home(config, store=home_on(tmp_path, shards, config), sink=SINK)


def test_shards_that_do_not_fit_the_settings_are_refused(
    shards: Path, tmp_path: Path, config: Config, tiny_home: Store
) -> None:
    small = load_config(None, "tiny", ["lengths.document=24", "corpus.block_wordpieces=24"])
    with pytest.raises(
        ConfigError, match=r"lengths\.document=24 would cut them; build it with the profile of this home"
    ):
        corpus.of_home(small, store=home_on(tmp_path, shards, small), sink=SINK)
    with pytest.raises(DataError, match="written by stage ict; pass documents, or a folder that realm corpus build"):
        corpus.of_home(config, store=home_on(tmp_path / "other", tiny_home.newest("ict"), config), sink=SINK)


def test_the_report_gives_numbers_and_a_table_for_plots(built: Path, tmp_path: Path, realm: Callable) -> None:
    metrics, lengths = tmp_path / "metrics.json", tmp_path / "lengths.csv"
    code, out, err = realm("corpus", "report", built, "--metrics", metrics, "--lengths", lengths)
    assert (code, out) == (0, ""), err
    facts = read_manifest(built).facts
    told = json.loads(metrics.read_text())
    assert told["blocks"] == facts["blocks"] and told["spans_per_block"] == round(facts["spans"] / facts["blocks"], 3)
    assert all(isinstance(value, int | float) for value in told.values())
    head, *rows = lengths.read_text().splitlines()
    assert head == "wordpieces,blocks"
    assert sum(int(row.split(",")[1]) for row in rows) == facts["blocks"]
    assert realm("corpus", "report", built)[1].startswith("# Corpus\n")
    assert json.loads(realm("corpus", "report", built, "--json")[1])["digest"] == read_manifest(built).digest


def test_a_grown_corpus_reports_what_changed(built: Path, tmp_path: Path, config: Config, realm: Callable) -> None:
    new = tmp_path / "new.jsonl"
    new.write_text(json.dumps({"id": "q", "title": "Quorvane", "text": "A glass lighthouse."}))
    out = tmp_path / "grown"
    grow.run(config, base=built, change=grow.Add(source=Source.find(new)), out=out, sink=SINK)
    code, text, _ = realm("corpus", "report", out)
    assert code == 0 and "## This change" in text and "| added_documents | 1 |" in text
    code, _, err = realm("corpus", "report", tmp_path)
    assert code == 2 and "no manifest.json" in err


def reseal(folder: Path, **changes: object) -> None:
    made: Manifest = replace(read_manifest(folder), **changes)  # type: ignore[arg-type]
    (folder / MANIFEST).write_text(made.to_json(), encoding="utf-8")
