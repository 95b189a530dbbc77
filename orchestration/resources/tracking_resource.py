"""The tracker as a Dagster resource. Apart from the tracker itself, which the trainer uses without Dagster."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from orchestration.resources.tracking import MlflowTracker, tracker_for


@dg.resource(config_schema={"home": dg.StringSource}, description="MLflow; see tracker_for for the address.")
def tracking_resource(context: dg.InitResourceContext) -> Iterator[MlflowTracker]:
    """The tracker of the home. The end of a run waits a short time for what is unsent; a sensor's look does not."""
    tracker = tracker_for(Path(context.resource_config["home"]))
    try:
        yield tracker
    finally:
        if context.run is not None:
            tracker.close()
        else:
            tracker.close(0.0)
