"""Where settings come from: profiles of a `params.yaml`, and overrides `section.key=value`."""

import re
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from realm_core.config import Config
from realm_core.cron import problem_with
from realm_core.errors import ConfigError

DEFAULT_PARAMS = Path(__file__).with_name("params.yaml")
LOCAL_PARAMS = Path("params.yaml")


def load_config(params: Path | None = None, profile: str = "demo", overrides: Sequence[str] = ()) -> Config:
    """Read a profile of a params file and apply `section.key=value` overrides.

    Raises ConfigError naming the file, the key, what was found and what is known.
    """
    path = params or (LOCAL_PARAMS if LOCAL_PARAMS.exists() else DEFAULT_PARAMS)
    profiles = _read_profiles(path)
    if profile not in profiles:
        raise ConfigError(f"{path}: no profile {profile!r}; it has {', '.join(sorted(profiles))}")
    values = deepcopy(profiles[profile] or {})
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {profile}: a {type(values).__name__}, expected sections; mend the file")
    for override in overrides:
        _apply_override(values, override)
    return _with_usable_cron(config_from(values, where=f"{path}: {profile}"), where=f"{path}: {profile}")


def with_overrides(config: Config, overrides: Sequence[str], where: str) -> Config:
    """`config` with some `section.key=value` replaced. Raises ConfigError as `load_config` does."""
    values = config.model_dump(mode="json")
    for override in overrides:
        _apply_override(values, override)
    changed = config_from(values, where)
    return changed if changed.retrain.cron == config.retrain.cron else _with_usable_cron(changed, where)


def settings_for_command(params: Path | None, profile: str, overrides: Sequence[str] | None) -> Config:
    """`load_config` for a command line: a params.yaml that merely lies in the working directory is named, for it may
    belong to something else."""
    if params is None and LOCAL_PARAMS.exists() and not LOCAL_PARAMS.samefile(DEFAULT_PARAMS):
        print(f"settings: {LOCAL_PARAMS.resolve()}, profile {profile}", file=sys.stderr, flush=True)
    return load_config(params, profile, overrides or ())


def with_on_error(config: Config, on_error: Literal["fail", "skip"] | str | None) -> Config:
    """The settings, with another answer to bad records where one is given."""
    if on_error is None:
        return config
    values = config.model_dump()
    values["corpus"]["on_error"] = on_error
    return config_from(values, where="--on-error")


def config_from(values: Mapping[str, Any], where: str) -> Config:
    """Validate plain values; errors name `where` and the key."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, where)) from None


def _with_usable_cron(config: Config, where: str) -> Config:
    cron = config.retrain.cron
    if cron is not None and (problem := problem_with(cron)):
        raise ConfigError(f"{where}: retrain.cron={cron!r}: {problem}; such as '0 3 * * 0', or null for never")
    return config


def _read_profiles(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); pass --params FILE") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; mend the file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({str(error).splitlines()[0]}); mend the file") from None
    if not isinstance(document, dict) or not isinstance(document.get("profiles"), dict):
        raise ConfigError(f"{path}: no 'profiles' mapping; see the params.yaml of the repository")
    return document["profiles"]


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: no '='; write --set section.key=value")
    *sections, last = key.strip().split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    try:
        # YAML would read a digest of digits alone as a number.
        place[last] = text if re.fullmatch(r"[0-9]{40,}", text) else yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: the value is not YAML; quote it") from None


def _explain(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(_known_keys(first["loc"][:-1])))
        return f"{where}: unknown key {key}; known keys here: {known}"
    reason = first["msg"].removeprefix("Value error, ")
    found = "" if isinstance(first["input"], dict) else f" (found {first['input']!r})"
    return f"{where}: {key + ': ' if key else ''}{reason}{found}"


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    model: Any = Config
    for part in location:
        model = model.model_fields[str(part)].annotation
    return list(getattr(model, "model_fields", {}))
