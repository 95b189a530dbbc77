"""Dagster's pages of a finished home, in a real browser: what a person sees and does without reading any code.

Every test leaves pictures of what was seen in the folder `pictures` of pytest's temporary folder.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestration import services
from realm_core.stages import promote
from tests.e2e.homes import PATIENCE, Home, free_port

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
WINDOW = {"width": 1600, "height": 1700}  # high enough for all metadata of a partition
LOCATION = "/locations/__repository__@orchestration.definitions"
STEPS = ("embedding_snapshot", "mips_index", "index_checks", "qa_eval", "promoted_index")
NOUNS = {
    "corpus": ["corpus_shards", "pretraining_shards", "question_sets"],
    "train": ["ict_checkpoint", "realm_checkpoint", "live_index_pointer"],
    "index": ["embedding_snapshot", "mips_index", "realm_checkpoint", "promoted_index"],
    "evaluate": ["qa_eval", "sparse_reader", "qa_result", "sparse_result"],
    "serving": ["live_index_pointer", "promoted_index", "qa_reader"],
}


@pytest.fixture(scope="module")
def webserver(finished: tuple[Home, dict[str, Any]]) -> Iterator[str]:
    """Address of Dagster's web interface on the finished home."""
    home, _ = finished
    port = free_port()
    service = services.webserver(home.path, port)
    with services.running(service):
        services.require_answering(service, port, PATIENCE)
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is absent; set CHROMIUM to run this test")
    playwright.expect.set_options(timeout=SLOW)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def picture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the picture of this test goes; those of all tests lie side by side."""
    name = re.sub(r"\W+", "_", request.node.name).strip("_")
    return tmp_path_factory.getbasetemp() / "pictures" / f"{name}.png"


@pytest.fixture
def page(browser: Any, webserver: str, picture: Path) -> Iterator[Any]:
    """A page of the finished home."""
    with opened(browser, webserver, picture) as page:
        yield page


@pytest.fixture
def gone_back(finished: tuple[Home, dict[str, Any]], tmp_path: Path) -> Iterator[tuple[Home, str]]:
    """A copy of the finished home in which an earlier index is live again, and a checkpoint after it that was passed over."""
    source, _ = finished
    home = Home(Path(shutil.copytree(source.path, tmp_path / "home")), source.documents, source.questions)
    store = home.store
    passed_over = [key for key in store.checkpoints("r1") if not store.has("indexes", key)][-1]
    earlier = [key for key in store.names("indexes") if key < passed_over][-1]
    promote.run(store.config(), store=store, name=earlier, reason="worse answers", allow_older=True)
    yield home, passed_over
    home.end()


@contextmanager
def opened(browser: Any, address: str, picture: Path) -> Iterator[Any]:
    """A page that ends in a picture of what was seen."""
    page = browser.new_page(base_url=address, viewport=WINDOW)
    page.set_default_timeout(SLOW)
    try:
        yield page
    finally:
        take(page, picture)
        page.close()


def take(page: Any, picture: Path) -> None:
    page.screenshot(path=picture, animations="disabled")


def part(picture: Path, name: str) -> Path:
    """Where one of several pictures of a test goes."""
    return picture.with_stem(f"{picture.stem}_{name}")


def seen(page: Any, text: str | re.Pattern[str]) -> None:
    """Wait until a text is on the page."""
    page.get_by_text(text).first.wait_for(state="visible")


def facts_are_seen(page: Any, facts: Mapping[str, Any]) -> None:
    """Wait until the table of metadata gives these facts."""
    for name, value in facts.items():
        row = page.get_by_role("row").filter(has=page.get_by_role("cell", name=name, exact=True))
        text = value if isinstance(value, str) else f"{value}".removesuffix(".0")
        playwright.expect(row.get_by_role("cell").nth(1)).to_have_text(text)


@pytest.mark.parametrize("group", NOUNS)
def test_the_asset_graph_shows_the_nouns_of_the_loop(page: Any, group: str) -> None:
    page.goto(f"{LOCATION}/asset-groups/{group}/lineage")
    for noun in NOUNS[group]:
        seen(page, noun)
    seen(page, "Latest event")
    playwright.expect(page.get_by_text("Loading")).to_have_count(0)


def test_a_partition_of_the_index_shows_digest_parents_and_drift(
    finished: tuple[Home, dict[str, Any]], page: Any
) -> None:
    version = live_version(finished[1])
    page.goto(f"/assets/mips_index?view=partitions&partition={version['checkpoint']}")
    index = finished[0].store.manifest("indexes", version["checkpoint"])
    facts_are_seen(page, {"digest": version["index_digest"], "config_digest": index.config_digest})
    facts_are_seen(page, {"vectors": index.facts["vectors"]} | drift_facts(version))
    assert index.parents.keys() == {"checkpoint", "snapshot", "corpus"}
    for digest in index.parents.values():
        seen(page, digest)


def test_a_partition_of_what_was_promoted_shows_recall_and_drift(
    finished: tuple[Home, dict[str, Any]], page: Any
) -> None:
    version = live_version(finished[1])
    page.goto(f"/assets/promoted_index?view=partitions&partition={version['checkpoint']}")
    facts_are_seen(page, {"state": "live", "index_digest": version["index_digest"]})
    facts_are_seen(page, {name: version[name] for name in ("recall_vs_exact", "recall_at_5", "exact_match")})
    facts_are_seen(page, {"drift/against": version["drift"]["against"]} | drift_facts(version))


def test_the_checks_of_the_index_show_their_verdicts(finished: tuple[Home, dict[str, Any]], page: Any) -> None:
    version = live_version(finished[1])
    findings = finished[0].store.manifest("verdicts", version["checkpoint"]).facts["findings"]
    page.goto("/assets/mips_index?view=checks")
    for check in ("no_missing_shard", "checksum", "vectors_sane", "retriever_not_collapsed", "recall_vs_bruteforce"):
        page.get_by_text(check, exact=True).first.click()
        seen(page, re.compile("^Passed$"))
        facts_are_seen(page, {"found": str(findings[check]["found"]), "index_digest": version["index_digest"]})


def test_the_refresh_job_has_a_page_with_its_runs(finished: tuple[Home, dict[str, Any]], page: Any) -> None:
    page.goto(f"{LOCATION}/jobs/refresh_index/runs")
    seen(page, finished[1]["index_versions"][-1]["dagster_run_id"][:8])
    seen(page, "Success")


def test_the_sensor_has_a_page_that_shows_what_it_asked_for(finished: tuple[Home, dict[str, Any]], page: Any) -> None:
    version = live_version(finished[1])
    page.goto(f"{LOCATION}/sensors/checkpoint_sensor")
    seen(page, "refresh_index")
    seen(page, version["checkpoint"])
    playwright.expect(page.get_by_role("checkbox").first).to_be_checked()
    page.get_by_role("button", name="Runs", exact=True).click()  # ticks that ask for nothing fill the other list
    seen(page, version["dagster_run_id"][:8])


def test_the_run_of_a_refresh_shows_its_steps(finished: tuple[Home, dict[str, Any]], page: Any) -> None:
    page.goto(f"/runs/{finished[1]['index_versions'][0]['dagster_run_id']}")
    for step in STEPS:
        seen(page, step)
    all_steps_have_succeeded(page)


def test_a_refresh_launched_from_the_page_of_its_job_goes_live(
    gone_back: tuple[Home, str], browser: Any, picture: Path
) -> None:
    home, key = gone_back
    port = free_port()
    daemon, pages = services.KeptDaemon(home.path), services.webserver(home.path, port)
    with services.running(daemon, pages):
        services.require_answering(pages, port, PATIENCE)
        with opened(browser, f"http://127.0.0.1:{port}", part(picture, "3_promoted")) as page:
            choose(page, key)
            take(page, part(picture, "1_chosen"))
            page.get_by_role("button", name="Launch 1 run").click()
            page.get_by_role("link", name="View", exact=True).click()
            seen(page, f"partition: {key}")
            run_id = page.url.rpartition("/")[2]
            page.get_by_text(re.compile("^(Success|Failure)$")).first.wait_for(timeout=1000 * PATIENCE)
            all_steps_have_succeeded(page)
            take(page, part(picture, "2_run"))
            page.goto(f"/assets/promoted_index?view=partitions&partition={key}")
            live = home.store.require_live()
            facts_are_seen(page, {"index": key, "state": "live", "index_digest": live.index_digest})
    assert (live.index, live.dagster_run_id) == (key, run_id)
    assert home.store.manifest("indexes", key).digest == live.index_digest
    assert home.store.manifest("verdicts", key).facts["passed"] and home.store.has("evaluations", key)
    with home.instance() as instance:
        run = instance.get_run_by_id(run_id)
        assert run is not None and run.job_name == "refresh_index" and "dagster/sensor_name" not in run.tags


def all_steps_have_succeeded(page: Any) -> None:
    """Wait for the list of steps, and for the chart, which lags behind the events: the first step is at its left end then."""
    page.reload()
    seen(page, f"Succeeded ({len(STEPS)})")
    playwright.expect(page.get_by_text(STEPS[0]).first).to_be_in_viewport(ratio=1)


def choose(page: Any, key: str) -> None:
    """Open the page of the refresh job and choose one partition, up to the button that launches."""
    page.goto(f"{LOCATION}/jobs/refresh_index")
    page.get_by_role("button", name="Materialize all").click()
    page.get_by_role("dialog").get_by_text("Select a partition").click()
    page.get_by_placeholder("Filter partitions").fill(key)
    page.get_by_role("menuitem", name=key).click()
    page.keyboard.press("Escape")


def live_version(report: dict[str, Any]) -> dict[str, Any]:
    return next(version for version in report["index_versions"] if version["live"])


def drift_facts(version: dict[str, Any]) -> dict[str, Any]:
    """What the metadata says of the distance to the version before."""
    return {f"drift/{name}": version["drift"][name] for name in ("top_k_overlap", "cosine_mean", "age_steps")}
