"""Publish by rename: a folder is invisible until it is complete, and is never edited afterwards."""

import errno
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from realm_core import __version__
from realm_core.artifacts.manifest import MANIFEST, Manifest, Plan, file_sha256, read_manifest
from realm_core.errors import ArtifactError, BusyError


@dataclass
class Build:
    """A folder under construction. `commit` seals it; leaving the block without commit publishes nothing."""

    folder: Path
    plan: Plan
    began: float = field(default_factory=time.time)
    manifest: Manifest | None = None

    def commit(
        self,
        facts: Mapping[str, Any],
        record: Mapping[str, Any] | None = None,
        known: Mapping[str, str] | None = None,
    ) -> Manifest:
        """Hash the files (`known` spares those hashed already), write the manifest last, and make all of it durable."""
        known = known or {}
        files = {name: known.get(name) or file_sha256(self.folder / name) for name in _files_below(self.folder)}
        self.manifest = Manifest(
            stage=self.plan.stage,
            code=self.plan.code,
            config_digest=self.plan.config_digest,
            parents=self.plan.parent_digests,
            sources=dict(self.plan.sources),
            files=files,
            facts=json.loads(json.dumps(dict(facts))),
            record={
                "created": time.time(),
                "seconds": round(time.time() - self.began, 3),
                "host": platform.node(),
                "version": __version__,
                "git": git_commit(),
                **provenance(),
                **(record or {}),
            },
        )
        for name in files:
            _fsync(self.folder / name)
        write_durably(self.folder / MANIFEST, self.manifest.to_json())
        return self.manifest


@contextmanager
def building(final: Path, plan: Plan, *, resume: bool = False) -> Iterator[Build]:
    """Yield a Build whose folder becomes `final` if it is committed.

    With `resume` the scratch folder of a killed attempt is handed back as it was left, so that finished parts are kept.
    One builder at a time: the lock dies with its process, so a kill leaves no stale lease.
    Raises BusyError if somebody builds `final` now, ArtifactError if `final` exists or the disk is full.
    """
    if final.exists():
        raise ArtifactError(f"{final}: exists; artifacts are never overwritten, choose another name")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _operator_error(error, final.parent) from None
    scratch = final.parent / f".{final.name}.partial"
    lock = FileLock(final.parent / f".{final.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(f"{final}: another process is building it; wait for it or stop it") from None
    except OSError as error:
        raise _operator_error(error, final.parent) from None
    try:
        if scratch.exists() and not resume:
            shutil.rmtree(scratch)
        scratch.mkdir(exist_ok=True)
        build = Build(scratch, plan)
        yield build
        if build.manifest is not None:
            _fsync(scratch)
            os.rename(scratch, final)
            _fsync(final.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise _operator_error(error, final.parent) from None
        raise
    finally:
        if not resume:
            shutil.rmtree(scratch, ignore_errors=True)
        lock.release()  # the lock file stays: removing it would let two builders hold two locks of one name


def finished(folder: Path, plan: Plan) -> Manifest | None:
    """The manifest if `folder` already holds the result of `plan`, None if it is free.

    Raises ArtifactError if it holds something else: artifacts are never overwritten.
    """
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    if not plan.describes(manifest):
        raise ArtifactError(f"{folder}: holds a result of other inputs, settings or code; choose another name")
    return manifest


def write_durably(path: Path, text: str) -> None:
    """Replace a small text file: a reader sees the old or the new content, also after a power cut."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        _fsync(path.parent)
    except OSError as error:
        with suppress(OSError):
            scratch.unlink()
        raise _operator_error(error, path) from None


def append_durably(path: Path, values: Mapping[str, Any]) -> None:
    """Append one JSON line and make it durable."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(values), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file. A last line torn by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def provenance() -> dict[str, str]:
    """Ids of the runs on whose behalf this process works, taken from its environment."""
    names = {"dagster_run_id": "REALM_DAGSTER_RUN_ID", "mlflow_run_id": "REALM_MLFLOW_RUN_ID"}
    return {key: os.environ[name] for key, name in names.items() if os.environ.get(name)}


@cache
def git_commit() -> str:
    """Commit of the code that runs, with `+changes` when its files differ; `unknown` outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _files_below(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path != folder / MANIFEST and not path.name.startswith(".")
    )


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _operator_error(error: OSError, place: Path) -> ArtifactError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(place if place.is_dir() else place.parent).free
        return ArtifactError(f"{place}: disk full, {free} bytes free; free space and run again, nothing was published")
    return ArtifactError(
        f"{place}: cannot be written ({error.strerror}); choose another --home or mend its permissions"
    )
