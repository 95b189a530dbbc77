"""Settings of a home over time: which ones an artifact was made with, and which may change while training goes on."""

from contextlib import suppress
from typing import Any

from realm_core.artifacts.manifest import Manifest
from realm_core.artifacts.publish import read_json_lines
from realm_core.artifacts.store import Store, parse_key
from realm_core.config import OPERATION, Config, digest_of
from realm_core.errors import ConfigError
from realm_core.params import config_from, with_overrides


def change(store: Store, overrides: list[str]) -> Config:
    """Change settings of the operation from now on; returns all settings.

    Raises ConfigError for a setting that training or an artifact depends on: those are fixed once a run has begun. Those of
    joint training are free again when a run has collapsed and no other may still go on: the next run needs other ones.
    """
    before = store.config()
    after = with_overrides(before, overrides, where=str(store.home / "home.json"))
    changed = sorted(differences(before, after))
    free = ", ".join(allowed := _free(store))
    fixed = [key for key in changed if key.partition(".")[0] not in allowed]
    if fixed and store.names("checkpoints"):
        raise ConfigError(
            f"{store.home}: {fixed[0]} is fixed since training began; {free} may change, else another --home"
        )
    if changed:
        store.write_settings({**store.settings(), "config": after.model_dump(mode="json")})
    return after


def _free(store: Store) -> tuple[str, ...]:
    """Sections that may change although a run has begun."""
    runs = {run: store.checkpoints(run) for run in store.runs()}
    last = store.config().pretrain.steps
    collapsed = [run for run in runs if store.collapse(run)]
    going_on = [run for run, keys in runs.items() if run not in collapsed and keys and parse_key(keys[-1])[1] < last]
    return (*OPERATION, "pretrain") if collapsed and not going_on else OPERATION


def differences(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """`section.key` -> (before, after) of every setting that differs."""
    old, new = _flat(before.model_dump(mode="json")), _flat(after.model_dump(mode="json"))
    return {
        key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    }


def settings_of(store: Store, manifest: Manifest, sections: tuple[str, ...]) -> Config | None:
    """The settings, of now or of earlier, that an artifact depends on; None if this home does not remember them.

    They are recognised as they were written down, and with the settings that have been added since at their defaults.
    """
    rows = read_json_lines(store.home / "settings.history.jsonl")
    for values in [store.settings()["config"], *(row.get("config") for row in reversed(rows))]:
        with suppress(ConfigError, KeyError, TypeError):  # of a version that knew other settings
            config = config_from(values, where=str(store.home))
            if manifest.config_digest in (config.digest(*sections), digest_of(values, *sections)):
                return config
    return None


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, inner in values.items():
        if isinstance(inner, dict):
            flat.update({f"{section}.{key}": value for key, value in inner.items()})
        else:
            flat[section] = inner
    return flat
