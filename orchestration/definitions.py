"""Everything Dagster loads: `dagster dev -m orchestration.definitions`, or `realm up`.

Loads in well under a second because nothing here, nor anything it imports, imports torch, faiss, transformers or mlflow.
"""

import warnings

import dagster as dg

# Partitioned asset checks are a preview feature of Dagster 1.13; they are declared in assets/checks.py alone.
warnings.filterwarnings("ignore", category=dg.PreviewWarning)
# Dagster's own decorator for failure sensors passes a parameter that Dagster calls beta.
warnings.filterwarnings("ignore", category=dg.BetaWarning, message="Parameter `owners`")

from assets import checkpoint, checks, corpus, evaluation, ict, index, serving  # noqa: E402
from orchestration.defs import growth, jobs, schedules, sensors, watch  # noqa: E402
from orchestration.resources.store import store_resource  # noqa: E402
from orchestration.resources.tracking_resource import tracking_resource  # noqa: E402

HOME = {"home": {"env": "REALM_HOME"}}

defs = dg.Definitions(
    assets=dg.load_assets_from_modules(
        [corpus, ict, checkpoint, index, evaluation, serving],
        include_specs=True,  # the live pointer
    ),
    asset_checks=[checks.index_checks],
    jobs=jobs.ALL,
    sensors=[*sensors.ALL, *growth.ALL, *watch.ALL, *schedules.SENSORS],
    schedules=schedules.SCHEDULES,
    resources={"store": store_resource.configured(HOME), "tracker": tracking_resource.configured(HOME)},
    executor=dg.in_process_executor,  # a process a step costs seconds each, and its child survives its killed parent
)
