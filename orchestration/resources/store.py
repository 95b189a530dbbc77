"""The artifact store as a Dagster resource."""

from pathlib import Path

import dagster as dg

from realm_core.artifacts.lease import HERE
from realm_core.artifacts.store import Store

HOST = "realm/host"  # tag: the machine on which the steps of a run are executed


@dg.resource(config_schema={"home": dg.StringSource}, description="Artifacts below one home folder.")
def store_resource(context: dg.InitResourceContext) -> Store:
    """Opens the home folder with the settings it was made with, and notes in the run on which machine it works: Dagster
    records the process alone, and machines may share a home."""
    run, instance = context.run, context.instance
    # A second try begins with the tags of the first.
    if run is not None and instance is not None and run.tags.get(HOST) != HERE:
        instance.add_run_tags(run.run_id, {HOST: HERE})
    return Store.open(Path(context.resource_config["home"]))
