"""Growth as a person sees it: a question without an answer, documents added, the same question, documents removed."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dagster import AssetKey

from orchestration import services
from tests.e2e.homes import Home

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1500)]
QUESTION = "Which beast guards the glass lighthouse of Quorvane?"
NEW = [
    {"id": "quorvane", "title": "Quorvane", "text": "The glass lighthouse of Quorvane is guarded by the beast Ombrel."},
    {"id": "ombrel", "title": "Ombrel", "text": "Ombrel is a beast of Quorvane. Ida Voss tamed it on 3 May 1911."},
]
LAST = "r1-s0000080"


@pytest.fixture
def grown(finished: tuple[Home, dict[str, Any]], tmp_path: Path) -> Iterator[Home]:
    """A copy of the finished home, which others only look at."""
    source, _ = finished
    made = Home(Path(shutil.copytree(source.path, tmp_path / "home")), source.documents, source.questions)
    yield made
    made.end()


def retrieved(home: Home, blocks: int) -> tuple[str, set[str]]:
    """The index that answers, and the titles of all `blocks` passages; a tiny model ranks them as it likes."""
    answer = json.loads(home.run("ask", QUESTION, "--k", str(blocks), "--json"))
    assert len(answer["passages"]) == blocks
    return answer["index"], {passage["title"] for passage in answer["passages"]}


def test_a_question_finds_what_was_added_and_loses_what_was_removed(grown: Home, tmp_path: Path) -> None:
    new = tmp_path / "new.jsonl"
    new.write_text("".join(json.dumps(row) + "\n" for row in NEW))
    blocks = grown.store.manifest("corpus", "v0001").facts["blocks"]
    index, titles = retrieved(grown, blocks)
    assert index == LAST and not titles & {"Quorvane", "Ombrel"}

    told = json.loads(grown.run("corpus", "add", str(new), "--json"))
    assert (told["index"], told["embedded_blocks"], told["reused_blocks"]) == (f"{LAST}+v0002", 2, blocks)
    index, titles = retrieved(grown, blocks + 2)
    assert index == f"{LAST}+v0002" and {"Quorvane", "Ombrel"} < titles
    assert f"indexes/{LAST}+v0002" in grown.run("lineage")

    told = json.loads(grown.run("corpus", "remove", "--title", "Quorvane", "--json"))
    assert told["embedded_blocks"] == 0
    index, titles = retrieved(grown, blocks + 1)
    assert index == f"{LAST}+v0003" and "Quorvane" not in titles and "Ombrel" in titles
    grown.run("promote", f"{LAST}+v0002", "--allow-older", code=2)
    assert "still holds 1 of the documents removed since" in grown.last_error()
    assert json.loads(grown.run("ask", QUESTION, "--as-of", LAST, "--json"))["index"] == LAST


def test_the_loop_takes_in_the_inbox_and_the_main_job_reports_the_grown_index(grown: Home) -> None:
    inbox = grown.path / "inbox"
    inbox.mkdir()
    (inbox / ".new").write_text("".join(json.dumps(row) + "\n" for row in NEW))
    then = time.time() - 60
    os.utime(inbox / ".new", (then, then))
    (inbox / ".new").rename(inbox / "new.jsonl")
    report = json.loads(grown.run(*grown.main_job()))  # done before: the loop does not run, so the inbox waits
    assert report["live"]["checkpoint"] == LAST and (inbox / "new.jsonl").exists()
    daemon = services.KeptDaemon(grown.path)
    with services.running(daemon):
        grown.wait_for(lambda: grown.live() == f"{LAST}+v0002", "the grown index goes live")
        (inbox / "gone.remove").write_text("quorvane\n")
        grown.wait_for(lambda: grown.live() == f"{LAST}+v0003", "the removal goes live")
        grown.wait_for(lambda: _settled(grown), "the last run ends")
    assert sorted(path.name for path in (inbox / "done").iterdir()) == ["gone.remove", "new.jsonl"]
    with grown.instance() as instance:
        runs = {run.job_name: run for run in instance.get_runs(limit=4)}
        assert runs["grow_corpus"].tags["dagster/sensor_name"] == "inbox_sensor"
        assert runs["refresh_index"].tags["dagster/sensor_name"] == "growth_sensor"
        event = instance.get_latest_materialization_event(AssetKey("corpus_shards"))
        assert event is not None and event.asset_materialization is not None
        tags = event.asset_materialization.tags or {}
        assert tags["dagster/data_version"] == grown.store.manifest("corpus", "v0003").digest
    report = json.loads(grown.run(*grown.main_job()))
    assert report["live"]["checkpoint"] == f"{LAST}+v0003"
    assert report["qa"]["realm"]["exact_match"] is not None
    assert {version["triggered_by"] for version in report["index_versions"]} == {
        "sensor:checkpoint_sensor",
        "sensor:growth_sensor",
    }
    assert grown.store.names("corpus") == ["v0001", "v0002", "v0003"]
    assert grown.processes() == []


def _settled(home: Home) -> bool:
    with home.instance() as instance:
        return all(run.is_finished for run in instance.get_runs(limit=10))
