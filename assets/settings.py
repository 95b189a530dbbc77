"""Settings that shape the definitions themselves, read when Dagster loads them."""

import os
from pathlib import Path

from realm_core.artifacts.store import Store
from realm_core.config import Config
from realm_core.errors import RealmError


def home_settings() -> Config:
    """Settings of the home these definitions are loaded for, or the defaults where there is none."""
    try:
        return Store(Path(os.environ["REALM_HOME"])).config()
    except (KeyError, RealmError):
        return Config()
