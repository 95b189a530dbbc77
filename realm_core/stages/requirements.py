"""What a home's settings need of this machine, asked before the first stage and not after the hours that come before its use."""

from realm_core.config import Config
from realm_core.index.backends import require_backend
from realm_core.model.device import require_device
from realm_core.model.weight_files import require_start_weights


def require_possible(config: Config) -> None:
    """Raise the one-line error of a device, an index or start weights that cannot be had here: ConfigError or ArtifactError."""
    require_device(config.runtime)
    require_backend(config.index.backend, config.index.params)
    require_start_weights(config.model)
