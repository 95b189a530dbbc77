"""The registered model as code: MLflow runs this file when a version is loaded. No object of ours is ever pickled.

The version's configuration names a home, an index and its digest. REALM_HOME overrides the home, for a machine on which the
artifacts lie elsewhere (realm pull fetches them).
"""

import os
from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel, PythonModelContext


class RealmModel(PythonModel):
    """Questions in, answers with evidence and index version out."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the index version and verify its digest. Raises ArtifactError if the home holds another, or none."""
        from realm_core.answer import Answerer
        from realm_core.artifacts.store import Store
        from realm_core.errors import ArtifactError

        known: dict[str, Any] = dict(context.model_config or {})
        home = Path(os.environ.get("REALM_HOME") or known["home"])
        store = Store.open(home)
        if not store.has("indexes", known["index"]):
            raise ArtifactError(
                f"{home}: no index {known['index']}; realm pull {known['index']} --home {home} fetches it"
            )
        self.answerer = Answerer.open(store, known["index"])
        if self.answerer.live.index_digest != known["index_digest"]:
            raise ArtifactError(
                f"{home}: its index {known['index']} is {self.answerer.live.index_digest[:12]}, this model answers from "
                f"{known['index_digest'][:12]}; set REALM_HOME to the home it was registered from"
            )

    # No result type: MLflow would make a schema of it, and knows none for nested objects.
    def predict(self, context: Any, model_input: list[str], params: dict[str, Any] | None = None):  # type: ignore[no-untyped-def]
        """One answer a question, as `realm ask --json` prints it: a list of dicts."""
        return [self.answerer.ask(question).to_dict() for question in model_input]


mlflow.models.set_model(RealmModel())
