"""The files of the start weights, by one name: `hub:NAME@REVISION`, `package:NAME`, `folder:PATH`, or `random`.

All but `random` end as a folder with config.json, model.safetensors and vocab.txt. Digests are checked before a file is opened.
"""

from importlib.util import find_spec
from pathlib import Path

from realm_core.artifacts.manifest import file_sha256
from realm_core.config import ModelConfig
from realm_core.errors import ArtifactError, ConfigError

WEIGHTS, VOCABULARY, CONFIG = "model.safetensors", "vocab.txt", "config.json"


def vocabulary_path(config: ModelConfig) -> Path | None:
    """The vocabulary that belongs to the start weights; None for random weights, whose vocabulary the corpus gives."""
    if config.weights == "random":
        return None
    path = weights_folder(config) / VOCABULARY
    check_digest(path, config.vocabulary_sha256, "model.vocabulary_sha256")
    return path


def require_start_weights(config: ModelConfig) -> None:
    """Raise ConfigError or ArtifactError unless the start weights are there with the digests that the settings demand."""
    if vocabulary_path(config) is not None:
        check_digest(weights_folder(config) / WEIGHTS, config.weights_sha256, "model.weights_sha256")


def weights_sha256(config: ModelConfig) -> str:
    """Digest of the start weights: the one the settings demand, else that of the file. Raises ConfigError without a file."""
    path = weights_folder(config) / WEIGHTS
    _require_file(path)
    return config.weights_sha256 or file_sha256(path)


def weights_folder(config: ModelConfig) -> Path:
    """Folder with the three files of the start weights, fetched if they come from a hub."""
    scheme, _, name = config.weights.partition(":")
    if scheme == "package":
        return _package_folder(name)
    if scheme == "folder":
        return Path(name).expanduser()
    if scheme == "hub":
        return _hub_folder(name)
    raise ConfigError(f"model.weights={config.weights!r}: use hub:NAME@REVISION, package:NAME, folder:PATH or random")


def _package_folder(name: str) -> Path:
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"model.weights=package:{name}: no such Python package; install the one that carries the weights, or name another"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    found = sorted(root.rglob(WEIGHTS))
    if not found:
        raise ConfigError(f"model.weights=package:{name}: {root} holds no {WEIGHTS}; choose another package")
    return found[0].parent


def _hub_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=[WEIGHTS, VOCABULARY, CONFIG])
        )
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ConfigError(
            f"model.weights=hub:{name}: cannot be fetched ({reason}); go online, or set model.weights=folder:PATH"
        ) from None


def check_digest(path: Path, expected: str | None, setting: str) -> None:
    _require_file(path)
    if expected is not None and (found := file_sha256(path)) != expected:
        raise ArtifactError(f"{path}: sha256 {found}, {setting} says {expected}; do not use this file")


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(
            f"{path}: missing; model.weights must name a folder with {CONFIG}, {WEIGHTS} and {VOCABULARY}"
        )
