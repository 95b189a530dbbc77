"""How assets speak to Dagster: manifests as metadata and data versions, operator errors as failures without retry."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg

from realm_core.artifacts.manifest import Manifest
from realm_core.artifacts.store import Store, parse_key
from realm_core.errors import RealmError
from realm_core.ports import Tracker

DATA_VERSION_TAG = "dagster/data_version"
CODE_VERSION_TAG = "dagster/code_version"


@contextmanager
def stage_run(
    context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext | dg.OpExecutionContext,
) -> Iterator[None]:
    """Let the stage record this Dagster run, and turn an operator's error into a failure that is not retried."""
    os.environ["REALM_DAGSTER_RUN_ID"] = context.run.run_id
    try:
        yield
    except RealmError as error:
        named = {"error": type(error).__name__}  # tells a refusal from what may be tried again
        raise dg.Failure(description=str(error), metadata=named, allow_retries=False) from error
    finally:
        os.environ.pop("REALM_DAGSTER_RUN_ID", None)


def materialized(folder: Path, manifest: Manifest, **extra: Any) -> dg.MaterializeResult:
    """The manifest as a materialisation: its digest is the data version, its facts are the metadata."""
    return dg.MaterializeResult(
        data_version=dg.DataVersion(manifest.digest), metadata={**describe(folder, manifest), **extra}
    )


def describe(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Metadata of an artifact: numbers as numbers, so that the UI plots them over partitions."""
    metadata: dict[str, Any] = {
        "digest": manifest.digest,
        "folder": dg.MetadataValue.path(str(folder)),
        "config_digest": manifest.config_digest,
        "parents": dg.MetadataValue.json(dict(manifest.parents)),
        "git": str(manifest.record.get("git", "unknown")),
        "seconds": float(manifest.record.get("seconds", 0.0)),
    }
    for key, value in flatten(manifest.facts).items():
        if isinstance(value, bool | int | float | str):
            metadata[key] = value
    shards = manifest.facts.get("shards")
    if isinstance(shards, Mapping):
        metadata["shards"] = dg.MetadataValue.json(dict(shards))
    return metadata


def version_facts(store: Store, key: str, tracker: Tracker) -> dict[str, Any]:
    """What is known of an index version, as on `realm index list`, with the way to its run in the tracker."""
    from realm_core.evaluate.versions import describe as describe_version

    known = describe_version(store, key)
    facts: dict[str, Any] = {
        name: value for name, value in flatten(known).items() if isinstance(value, bool | int | float | str)
    }
    if url := tracker.url(parse_key(key)[0]):
        facts["mlflow"] = dg.MetadataValue.url(url)
    return facts


def version_card(store: Store, key: str) -> dict[str, str]:
    """What a model registry is told of an index version."""
    index = store.manifest("indexes", key)
    known = {"index": key, "index_digest": index.digest, "step": str(index.facts["step"])}
    return known | {f"{role}_digest": digest for role, digest in index.parents.items()}


def mirror_version(store: Store, key: str) -> str | None:
    """Mirror a version that went live, in the production profile; what came of it in words. A mirror that cannot be reached
    stops nothing: the next promotion, or `realm push`, brings it what it lacks."""
    from realm_core.artifacts import mirror

    address = mirror.address_from_environment()
    if address is None:
        return None
    try:
        return str(mirror.push(store, key, address))
    except RealmError as problem:
        return f"not mirrored: {problem}"


def drop_old_versions(store: Store) -> str:
    """Retention of snapshots and indexes; what went, in words. It comes after the pointer has moved and fails nobody."""
    from realm_core.artifacts import retention

    kept = store.config().retention
    try:
        gone = retention.collect(store, keep=kept.keep_indexes, grace_seconds=kept.grace_seconds)["dropped"]
    except (RealmError, OSError) as problem:
        return f"not now: {problem}"
    return ", ".join(row["index"] for row in gone) or "none"


def drift_facts(context: dg.AssetExecutionContext, store: Store, key: str) -> dict[str, int | float]:
    """How far this version lies from the one it is to replace. What cannot be measured is said, and stops nothing."""
    from realm_core.evaluate.drift import measures
    from realm_core.stages import drift

    measured, problem = drift.observe(store.config(), store=store, name=key)
    if problem:
        context.log.warning(f"drift was not measured: {problem}")
    return measures(measured)


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """One level of nesting becomes `outer/inner`; deeper values stay with their artifact."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{inner}": inner_value for inner, inner_value in value.items() if key != "shards"})
        else:
            flat[key] = value
    return flat
