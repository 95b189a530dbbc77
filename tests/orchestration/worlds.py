"""Tiny homes: a few articles of the bundled encyclopedia, random weights, the settings of the profile `tiny`."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.events import DagsterEvent
from dagster._core.execution.plan.objects import ErrorSource, StepFailureData, UserFailureData

from realm_core.artifacts.manifest import MANIFEST, Manifest, Plan
from realm_core.artifacts.publish import building
from realm_core.artifacts.store import Store, checkpoint_key
from realm_core.params import load_config
from realm_core.ports import NullSink
from realm_core.stages import CODE, corpus, finetune, ict, pretrain, questions

ARTICLES = 30


def sources(folder: Path, articles: int = ARTICLES) -> tuple[Path, Path]:
    """(documents, questions): JSON-lines files of the first articles and of the questions about them."""
    sample = files("realm_core.sample")
    lines = (sample / "encyclopedia.jsonl").read_text(encoding="utf-8").splitlines()[:articles]
    known = {json.loads(line)["id"] for line in lines}
    asked = (sample / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [line for line in asked if json.loads(line)["article"] in known]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("documents.jsonl", lines), ("questions.jsonl", asked)):
        (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "documents.jsonl", folder / "questions.jsonl"


def create(home: Path, overrides: Sequence[str] = ()) -> Store:
    """A home with sources and settings, and nothing made yet."""
    documents, asked = sources(home.parent / f"{home.name}-sources")
    config = load_config(profile="tiny", overrides=("refresh.backlog=newest", *overrides))
    return Store.create(home, config, {"corpus": str(documents), "questions": str(asked)}, "tiny")


def bootstrap(store: Store) -> None:
    """What the job `bootstrap` makes, and the checkpoint at step 0 of run r1."""
    config = store.config()
    made = {kind: store.path(kind, "v0001") for kind in ("corpus", "questions", "ict", "sparse_readers")}
    corpus.run(config, source=store.source("corpus"), out=made["corpus"], sink=NullSink())
    questions.run(config, source=store.source("questions"), out=made["questions"], sink=NullSink())
    ict.run(config, corpus=made["corpus"], out=made["ict"], sink=NullSink())
    inputs = {"checkpoint": made["ict"], "corpus": made["corpus"], "questions": made["questions"]}
    finetune.run(config, index=None, **inputs, out=made["sparse_readers"], sink=NullSink())
    train(store, "r1", 0)


def train(store: Store, run: str, until: int) -> None:
    """Train in this process; step 0 needs no index."""
    made = {"corpus": store.newest("corpus"), "start": store.newest("ict")}
    pretrain.run(store.config(), store=store, training_run=run, until=until, sink=NullSink(), **made)


def pretend_checkpoint(store: Store, run: str, step: int) -> str:
    """A checkpoint that has a manifest and no weights: enough for a sensor, too little for a refresh."""
    key = checkpoint_key(run, step)
    plan = Plan(stage="pretrain", code=CODE["pretrain"], config_digest="0" * 64)
    with building(store.path("checkpoints", key), plan) as build:
        build.commit({"run": run, "step": step, "metrics": {"loss": 7.0}, "index_timeline": []})
    return key


def end_runs(instance: dg.DagsterInstance, status: dg.DagsterRunStatus, error: str | None = None) -> None:
    """Every run under way ends like this, a failed one at its step with the library's error of this name."""
    ends = {"FAILURE": "PIPELINE_FAILURE", "SUCCESS": "PIPELINE_SUCCESS", "CANCELED": "PIPELINE_CANCELED"}
    for run in instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])):
        if error is not None:
            metadata = {"error": dg.MetadataValue.text(error)}
            said = StepFailureData(
                None,
                UserFailureData(label="Failure", description="it said why", metadata=metadata),
                ErrorSource.USER_CODE_ERROR,
            )
            event = DagsterEvent("STEP_FAILURE", run.job_name, step_key="promoted_index", event_specific_data=said)
            instance.report_dagster_event(event, run.run_id)
        instance.report_dagster_event(DagsterEvent(ends[status.value], run.job_name), run.run_id)


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    """A folder with nothing but a manifest of these values."""
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(Manifest(**values).to_json(), encoding="utf-8")
