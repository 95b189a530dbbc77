"""MLflow's model registry: every index version that may go live, with its checkpoint, as a version of one model.

A registered version is a reference, not a copy: code, the home, names and digests. Loading it opens the artifacts of the home
and verifies them, so that a registry of hundreds of versions costs kilobytes, and retention is decided in one place.
"""

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from realm_core import __version__
from realm_core.artifacts.store import Store

MODEL = "realm"
CANDIDATE, CHAMPION = "candidate", "champion"
HOME_TAG, DIGEST_TAG = "realm.home", "realm.index_digest"
_CODE = Path(__file__).with_name("registered_model.py")


def model_name(client: Any, store: Store) -> str:
    """`realm`, or REALM_MODEL; the second home on one server takes `realm-` and the first digits of its identity."""
    from mlflow.exceptions import MlflowException

    wanted = os.environ.get("REALM_MODEL") or MODEL
    for name in (wanted, f"{wanted}-{store.identity[:8]}"):
        with suppress(MlflowException):  # it is there already
            client.create_registered_model(name, tags={HOME_TAG: store.identity}, description=_DESCRIPTION)
        if client.get_registered_model(name).tags.get(HOME_TAG) == store.identity:
            return name
    raise MlflowException(f"registered model {wanted} belongs to another home; set REALM_MODEL to another name")


def enter(client: Any, store: Store, run_id: str, version: Mapping[str, str], alias: str) -> None:
    """Register a version unless it is there, and move the alias: `candidate` to it, `champion` to what is live now.

    Repeating it changes nothing, which is what a spool needs. May raise whatever MLflow raises.
    """
    name = model_name(client, store)
    number = _number(client, name, version["index_digest"]) or _create(client, store, name, run_id, version)
    if alias == CANDIDATE:
        client.set_registered_model_alias(name, CANDIDATE, number)
        return
    # Not simply `number`: this row may have waited in a spool while the pointer moved on.
    live = store.live()
    champion = _number(client, name, live.index_digest) if live else None
    if champion is not None:
        client.set_registered_model_alias(name, CHAMPION, champion)


def _number(client: Any, name: str, digest: str) -> str | None:
    found = client.search_model_versions(f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'", max_results=1)
    return str(found[0].version) if found else None


def _create(client: Any, store: Store, name: str, run_id: str, version: Mapping[str, str]) -> str:
    import mlflow.pyfunc

    with tempfile.TemporaryDirectory(prefix="realm-model-") as scratch:
        folder = Path(scratch) / "model"
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(_CODE),
            model_config={"home": str(store.home.resolve()), **version},
            pip_requirements=[f"realm-ops=={__version__}"],
        )
        place = f"models/{version['index']}-{version['index_digest'][:12]}"
        client.log_artifacts(run_id, str(folder), place)
    source = f"{client.get_run(run_id).info.artifact_uri.rstrip('/')}/{place}"
    made = client.create_model_version(
        name,
        source=source,
        run_id=run_id,
        tags={
            HOME_TAG: store.identity,
            DIGEST_TAG: version["index_digest"],
            **{f"realm.{k}": v for k, v in version.items()},
        },
        description=f"index {version['index']}, step {version['step']}",
    )
    return str(made.version)


_DESCRIPTION = (
    "Question answering from one index version of a realm home: retriever, index and reader. "
    "champion: what live.json names; candidate: the newest version that passed its checks."
)
