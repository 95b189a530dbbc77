"""Names of checkpoints and of the versions made from them.

RUN-s0000500          a checkpoint, and its snapshot, index and scores over the corpus of that time
RUN-s0000500+v0002    the same checkpoint over another version of the corpus, which has grown since
"""

import re

from realm_core.errors import ConfigError

_RUN = re.compile(r"[a-z0-9][a-z0-9_]*")
_KEY = re.compile(r"(?P<checkpoint>(?P<run>[a-z0-9][a-z0-9_]*)-s(?P<step>\d{7}))(?:\+(?P<corpus>v\d{4,}))?")


def checkpoint_key(run: str, step: int) -> str:
    """Name of a checkpoint and of everything made from it; sorts by step within a run."""
    return f"{require_run_name(run)}-s{step:07d}"


def grown_key(checkpoint: str, corpus: str) -> str:
    """Name of a version of a checkpoint over a corpus that has grown since its first one."""
    return f"{checkpoint}+{corpus}"


def require_run_name(run: str) -> str:
    """The name itself. Raises ConfigError unless it can stand in a checkpoint key and as a folder."""
    if not _RUN.fullmatch(run):
        raise ConfigError(f"{run!r}: not a name of a training run; use lower-case letters, digits and _")
    return run


def is_run_name(name: str) -> bool:
    """Whether this can be the name of a training run."""
    return _RUN.fullmatch(name) is not None


def is_key(name: str) -> bool:
    """Whether this is the name of a checkpoint, or of a version made from one."""
    return _KEY.fullmatch(name) is not None


def parse_key(key: str) -> tuple[str, int]:
    """(run, step) of a checkpoint, or of a version made from it. Raises ConfigError on anything else."""
    match = _match(key)
    return match["run"], int(match["step"])


def checkpoint_of(key: str) -> str:
    """The checkpoint that a version was made from. Raises ConfigError on anything that is no key."""
    return _match(key)["checkpoint"]


def corpus_of(key: str) -> str | None:
    """The version of the corpus that the name says, if it says one. Raises ConfigError on anything that is no key."""
    return _match(key)["corpus"]


def _match(key: str) -> re.Match[str]:
    match = _KEY.fullmatch(key)
    if match is None:
        raise ConfigError(f"{key!r}: not a checkpoint key; they look like {checkpoint_key('r1', 500)}")
    return match
