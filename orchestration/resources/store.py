"""The artifact store as a Dagster resource."""

from pathlib import Path

import dagster as dg

from realm_core.artifacts.store import Store


class StoreResource(dg.ConfigurableResourceFactory[Store]):
    """Opens the home folder named by REALM_HOME, with the settings it was made with."""

    home: str

    def create_resource(self, context: dg.InitResourceContext) -> Store:
        return Store.open(Path(self.home))
