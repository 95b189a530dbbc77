"""The artifact store as a Dagster resource."""

from pathlib import Path

import dagster as dg

from realm_core.artifacts.store import Store


@dg.resource(config_schema={"home": dg.StringSource}, description="Artifacts below one home folder.")
def store_resource(context: dg.InitResourceContext) -> Store:
    """Opens the home folder with the settings it was made with."""
    return Store.open(Path(context.resource_config["home"]))
