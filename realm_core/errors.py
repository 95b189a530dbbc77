"""Errors an operator can fix: one line that names the place, what was found, and the next move.

Command line programs print the message and exit with code 2. `assert` is kept for our own bugs.
"""


class RealmError(Exception):
    """Anything an operator can fix."""


def quoted(text: str, most: int = 100) -> str:
    """Text from an input, for a message: its first characters in quotes, and none that a terminal would obey."""
    return repr(text if len(text) <= most else f"{text[:most]}…")


class ConfigError(RealmError):
    """A setting is unknown or impossible."""


class ArtifactError(RealmError):
    """A file or folder of the store is missing, torn, altered, or from another schema."""


class DataError(RealmError):
    """A corpus, question set or foreign checkpoint cannot be read as what it claims to be."""


class GateError(RealmError):
    """An index version may not go live."""


class BusyError(RealmError):
    """Somebody else holds the lease, the port or the folder."""
