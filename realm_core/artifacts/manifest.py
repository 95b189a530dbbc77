"""The manifest: what one artifact folder holds, from what it was made, and by which run. Written last; never edited."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from realm_core.errors import ArtifactError

SCHEMA = 1
MANIFEST = "manifest.json"
PRUNED = "pruned.json"  # stands beside the manifest of an artifact whose files retention has dropped
QUARANTINED = "quarantined.json"  # stands beside the manifest of a checkpoint that nobody should go on from
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One artifact. `record` describes how it came about and is the only part outside the digest.

    Two runs with equal inputs, settings and code on one machine therefore give equal digests.
    """

    stage: str
    code: str  # version of the stage's code: raised when its result changes for equal inputs
    config_digest: str  # of the sections the stage reads
    parents: Mapping[str, str]  # role -> digest of the parent's manifest
    sources: Mapping[str, str]  # role -> sha256 of a raw input outside the store
    files: Mapping[str, str]  # path inside the folder -> sha256 of its bytes
    facts: Mapping[str, Any] = field(default_factory=dict)  # results that follow from the inputs: rows, step, recall
    record: Mapping[str, Any] = field(default_factory=dict)  # when, where, how long, git commit, run ids, parent names
    schema: int = SCHEMA

    @property
    def digest(self) -> str:
        """sha256 over everything but `record`: Dagster's data version, MLflow's tag."""
        content = {key: value for key, value in asdict(self).items() if key != "record"}
        return hashlib.sha256(_canonical(content)).hexdigest()

    @property
    def stands_for(self) -> str:
        """The stage whose output this is laid out as: its own, or the one an imported artifact stands in for."""
        return str(self.facts.get("stands_for", self.stage))

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "digest": self.digest}, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a stage is about to make. Known before it starts, so that finished work is recognised and not done again."""

    stage: str
    code: str
    config_digest: str
    parents: Mapping[str, Manifest] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def describes(self, manifest: Manifest) -> bool:
        """Whether `manifest` is the result of this very plan."""
        mine = (self.stage, self.code, self.config_digest, self.parent_digests, dict(self.sources))
        found = (manifest.stage, manifest.code, manifest.config_digest, dict(manifest.parents), dict(manifest.sources))
        return mine == found

    @property
    def parent_digests(self) -> dict[str, str]:
        return {role: parent.digest for role, parent in self.parents.items()}


def read_manifest(folder: Path) -> Manifest:
    """Read and verify a manifest. Raises ArtifactError if it is missing, torn, altered or from another schema."""
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values["schema"]
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{folder}: no {MANIFEST}; the stage that writes it has not finished here") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); mend its permissions") from None
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(f"{path}: not a manifest; remove the folder and run its stage again") from None
    if found != SCHEMA:
        record = values.get("record")
        writer = record.get("version") if isinstance(record, dict) else None
        raise ArtifactError(
            f"{path}: schema {found}, written by realm-ops {writer or 'of an unknown version'}, this code reads {SCHEMA}; "
            "use the version that wrote it"
        )
    digest = str(values.pop("digest", "nothing"))
    try:
        manifest = Manifest(**values)
    except TypeError as error:
        raise ArtifactError(f"{path}: {error}; remove the folder and run its stage again") from None
    if manifest.digest != digest:
        raise ArtifactError(
            f"{path}: content gives {manifest.digest[:12]}, it says {digest[:12]}; it was edited, restore it"
        )
    return manifest


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, read in constant memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def verify_files(folder: Path, manifest: Manifest, only: str = "") -> None:
    """Hash the files (those whose path starts with `only`) against the manifest. Raises ArtifactError naming the file."""
    for name, expected in manifest.files.items():
        if not name.startswith(only):
            continue
        path = folder / name
        if not path.is_file():
            if (folder / PRUNED).exists():
                raise ArtifactError(f"{folder}: its files were dropped by retention; use a newer one")
            raise ArtifactError(f"{path}: missing; remove {folder.name} and run stage {manifest.stage} again")
        if (found := file_sha256(path)) != expected:
            raise ArtifactError(
                f"{path}: sha256 {found[:12]}, its manifest says {expected[:12]}; "
                f"remove {folder.name} and run stage {manifest.stage} again"
            )


def open_artifact(folder: Path, stage: str | None = None) -> Manifest:
    """Manifest of `folder` after checking that the expected stage wrote it and that its bytes are unaltered."""
    manifest = read_manifest(folder)
    if stage is not None and manifest.stands_for != stage:
        raise ArtifactError(f"{folder}: written by stage {manifest.stage}, expected {stage}; pass the right folder")
    verify_files(folder, manifest)
    return manifest


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
