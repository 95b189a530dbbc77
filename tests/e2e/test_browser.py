"""Dagster's pages of a finished home, in a real browser: what a person sees without reading any code."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestration import services
from tests.e2e.homes import Home, answers, free_port

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.browser, pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1500)]

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SLOW = 120_000.0  # milliseconds; the first paint takes seconds on a quiet machine
LOCATION = "/locations/__repository__@orchestration.definitions"


@pytest.fixture(scope="module")
def webserver(finished: tuple[Home, dict[str, Any]]) -> Iterator[str]:
    """Address of Dagster's web interface on the finished home."""
    home, _ = finished
    port = free_port()
    service = services.webserver(home.path, port)
    with services.running(service):
        address = f"http://127.0.0.1:{port}"
        home.wait_for(answers(f"{address}/server_info"), "Dagster does not answer", service.process)
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is absent; set CHROMIUM to run this test")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, webserver: str, tmp_path: Path) -> Iterator[Any]:
    """A page that ends in a picture of what was seen, below the test's folder."""
    page = browser.new_page(base_url=webserver, viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(SLOW)
    yield page
    page.screenshot(path=tmp_path / "page.png")
    page.close()


def seen(page: Any, text: str | re.Pattern[str]) -> None:
    """Wait until a text is on the page."""
    page.get_by_text(text).first.wait_for(state="visible")


@pytest.mark.parametrize(
    ("group", "nouns"),
    [
        ("corpus", ["corpus_shards", "pretraining_shards", "question_sets"]),
        ("train", ["ict_checkpoint", "realm_checkpoint", "live_index_pointer"]),
        ("index", ["embedding_snapshot", "mips_index", "realm_checkpoint", "promoted_index"]),
        ("evaluate", ["qa_eval", "sparse_reader", "qa_result", "sparse_result"]),
        ("serving", ["live_index_pointer", "promoted_index", "qa_reader"]),
    ],
)
def test_the_asset_graph_shows_the_nouns_of_the_loop(page: Any, group: str, nouns: list[str]) -> None:
    page.goto(f"{LOCATION}/asset-groups/{group}/lineage")
    for noun in nouns:
        seen(page, noun)


def test_a_partition_of_the_index_shows_its_digest(finished: tuple[Home, dict[str, Any]], page: Any) -> None:
    live = finished[1]["live"]
    page.goto(f"/assets/mips_index?view=partitions&partition={live['checkpoint']}")
    seen(page, live["checkpoint"])
    seen(page, live["index_digest"])
    for fact in ("config_digest", "parents", "top_k_overlap", "vectors"):
        seen(page, fact)


def test_the_checks_of_the_index_show_their_verdicts(page: Any) -> None:
    page.goto("/assets/mips_index?view=checks")
    for check in ("no_missing_shard", "checksum", "vectors_sane", "recall_vs_bruteforce", "retriever_not_collapsed"):
        seen(page, check)
    seen(page, re.compile("Passed|Succeeded"))


def test_the_refresh_job_has_a_page_with_its_runs(finished: tuple[Home, dict[str, Any]], page: Any) -> None:
    page.goto(f"{LOCATION}/jobs/refresh_index/runs")
    seen(page, finished[1]["index_versions"][-1]["dagster_run_id"][:8])
    seen(page, "Success")


def test_the_sensor_has_a_page_that_says_it_runs(page: Any) -> None:
    page.goto(f"{LOCATION}/sensors/checkpoint_sensor")
    seen(page, "checkpoint_sensor")
    seen(page, "refresh_index")


def test_the_run_of_a_refresh_shows_its_steps(finished: tuple[Home, dict[str, Any]], page: Any) -> None:
    page.goto(f"/runs/{finished[1]['index_versions'][0]['dagster_run_id']}")
    for step in ("embedding_snapshot", "mips_index", "index_checks", "qa_eval", "promoted_index"):
        seen(page, step)
