"""Publish by rename: a folder is invisible until it is complete, and is never edited afterwards."""

import errno
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from realm_core import __version__
from realm_core.artifacts.manifest import MANIFEST, Manifest, Plan, file_sha256, read_manifest
from realm_core.errors import ArtifactError, BusyError, RealmError

INTERIM = ".interim"  # in the scratch folder of a long stage: what its next attempt goes on from; never published
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What libraries say that write by themselves and lose the error number: safetensors, numpy.
_NOT_OURS = (errno.EROFS, errno.EACCES, errno.EPERM)
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_READ_ONLY_TEXT = re.compile(r"attempt to write a readonly database|unable to open database file|disk I/O error")
_NO_ROOM_TEXT = re.compile(rf"os error ({'|'.join(map(str, _NO_ROOM))})\)|No space left|requested and \d+ written")


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
        for path in {place for name in files for place in (self.folder / name, (self.folder / name).parent)}:
            _fsync(path)
        write_durably(self.folder / MANIFEST, self.manifest.to_json())
        return self.manifest


@contextmanager
def building(final: Path, plan: Plan, *, resume: bool = False, interim: bool = False) -> Iterator[Build]:
    """Yield a Build whose folder becomes `final` if it is committed.

    With `resume` the scratch folder of a killed attempt is handed back as it was left, so that finished parts are kept; with
    `interim` only the folder INTERIM in it is, which no manifest lists and which goes when the artifact is published.
    One builder at a time: the lock dies with its process, so a kill leaves no stale lease.
    Raises BusyError if somebody builds `final` now, ArtifactError if `final` exists or the disk is full.
    """
    _require_free(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise operator_error(error, final.parent) from None
    scratch, kept = scratch_of(final), INTERIM if interim else None
    lock = FileLock(final.parent / f".{final.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(f"{final}: another process is building it; wait for it or stop it") from None
    except OSError as error:
        raise operator_error(error, final.parent) from None
    try:
        _require_free(final)  # whoever held the lock until now may have published
        if not resume:
            _clear(scratch, kept)
        scratch.mkdir(exist_ok=True)
        build = Build(scratch, plan)
        yield build
        if build.manifest is not None:
            _fsync(scratch)
            os.rename(scratch, final)
            _fsync(final.parent)
            _clear(final / INTERIM)  # only now: a kill before the rename would cost all that it spares
    except Exception as error:
        if _no_room(error):
            raise _disk_full(final.parent) from None
        if isinstance(error, OSError) and error.errno == errno.EROFS:
            raise operator_error(error, final.parent) from None
        raise
    finally:
        if not resume:
            with suppress(OSError):
                _clear(scratch, kept)
        lock.release()  # the lock file stays: removing it would let two builders hold two locks of one name


def scratch_of(final: Path) -> Path:
    """The folder in which `final` is built."""
    return final.parent / f".{final.name}.partial"


def adopt(folder: Path, final: Path) -> Manifest:
    """Publish a finished artifact from elsewhere as `final`, manifest and digest as they are.

    Raises ArtifactError if a byte differs from its manifest, or if `final` holds another one.
    """
    manifest = read_manifest(folder)
    if (final / MANIFEST).is_file() and read_manifest(final).digest == manifest.digest:
        return manifest
    plan = Plan(stage=manifest.stage, code=manifest.code, config_digest=manifest.config_digest)
    with building(final, plan) as build:
        for name, digest in manifest.files.items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ArtifactError(
                    f"{folder / MANIFEST}: names {name!r}, outside its folder; this is no artifact of ours"
                )
            source, target = folder / name, build.folder / name
            if not source.is_file():
                raise ArtifactError(f"{source}: missing; run the stage {manifest.stage} again")
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(source, target)
            if file_sha256(target) != digest:
                raise ArtifactError(
                    f"{source}: other bytes than its manifest says; run the stage {manifest.stage} again"
                )
        write_durably(build.folder / MANIFEST, manifest.to_json())
        build.manifest = manifest
    return manifest


def finished(folder: Path, plan: Plan) -> Manifest | None:
    """The manifest if `folder` already holds the result of `plan`, None if it is free.

    Raises ArtifactError if it holds something else: artifacts are never overwritten.
    """
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    if not plan.describes(manifest):
        raise ArtifactError(f"{folder}: holds a result of other inputs, settings or code; choose another name")
    with suppress(OSError):
        _clear(folder / INTERIM)  # its builder may have been killed as soon as it had published
    return manifest


def link_or_copy(source: Path, target: Path) -> None:
    """Put a published file under a second name without a second copy of its bytes where the file system can do that.

    Published files are never written to, so both names may share them. Whoever writes `target` anew unlinks it first.
    """
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)


def set_aside(folder: Path) -> Path | None:
    """Move a finished artifact out of the way of another opinion on the same subject; returns its new place.

    It keeps its content below `.superseded`, numbered in the order of the moves. None if there is nothing to move.
    """
    if not (folder / MANIFEST).is_file():
        return None
    shelf = folder.parent / ".superseded"
    shelf.mkdir(exist_ok=True)
    number = 1 + sum(entry.name.startswith(f"{folder.name}.") for entry in shelf.iterdir())
    place = shelf / f"{folder.name}.{number:04d}"
    os.rename(folder, place)
    _fsync(shelf)
    _fsync(folder.parent)
    return place


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
        raise operator_error(error, path) from None


def append_durably(path: Path, values: Mapping[str, Any]) -> None:
    """Append one JSON line and make it durable. A line that a crash left torn is closed first, so that it spoils no other."""
    line = json.dumps(dict(values)).encode() + b"\n"
    try:
        with path.open("ab+") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise operator_error(error, path) from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file. A line torn by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):  # what is left of a torn line may be a number
                rows.append(row)
    return rows


def provenance() -> dict[str, str]:
    """Ids of the runs on whose behalf this process works, taken from its environment."""
    names = {"dagster_run_id": "REALM_DAGSTER_RUN_ID", "mlflow_run_id": "REALM_MLFLOW_RUN_ID"}
    return {key: os.environ[name] for key, name in names.items() if os.environ.get(name)}


@cache
def git_commit() -> str:
    """Commit of the code that runs, with `+changes` when its files differ; `unknown` outside a checkout.

    A package installed below somebody else's checkout is not part of that: its own files must be tracked there.
    """
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _clear(folder: Path, kept: str | None = None) -> None:
    """Remove a folder that need not exist; if it holds an entry named `kept`, all but that one."""
    if kept is None or not (folder / kept).exists():
        if folder.exists():
            shutil.rmtree(folder)
        return
    for entry in folder.iterdir():
        if entry.name != kept:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _files_below(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path != folder / MANIFEST and not _hidden(path.relative_to(folder))
    )


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def operator_error(error: OSError, place: Path) -> ArtifactError:
    """What to tell the operator when `place` cannot be written."""
    if _no_room(error):
        return _disk_full(place)
    return ArtifactError(
        f"{place}: cannot be written ({error.strerror}); choose another --home or mend its permissions"
    )


def storage_trouble(error: BaseException, home: Path | None = None) -> str | None:
    """What to tell the operator if an error that no stage expected came from a disk that is full or may not be written.

    Looks along the causes: databases and trackers wrap what the operating system said. `home` is named as the place where
    none of them says which file it was.
    """
    seen: BaseException | None = error
    while seen is not None:
        place = getattr(seen, "filename", None) or home or "a file of the home"
        if isinstance(seen, Exception) and (_no_room(seen) or "database or disk is full" in str(seen)):
            free = f", {shutil.disk_usage(home).free} bytes free" if home else ""
            return f"{place}: disk full or quota reached{free}; free space and run again"
        if getattr(seen, "errno", None) in _NOT_OURS or _READ_ONLY_TEXT.search(str(seen)):
            return f"{place}: cannot be written; choose another --home or mend its permissions"
        seen = seen.__cause__ or seen.__context__
    return None


def _disk_full(place: Path) -> ArtifactError:
    free = shutil.disk_usage(place if place.is_dir() else place.parent).free
    return ArtifactError(
        f"{place}: disk full or quota reached, {free} bytes free; free space and run again, nothing was published"
    )


def _no_room(error: Exception) -> bool:
    if isinstance(error, RealmError):
        return False
    return getattr(error, "errno", None) in _NO_ROOM or bool(_NO_ROOM_TEXT.search(str(error)))


def _require_free(final: Path) -> None:
    if final.exists():
        raise ArtifactError(f"{final}: exists; artifacts are never overwritten, choose another name")
