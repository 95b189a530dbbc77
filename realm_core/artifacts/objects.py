"""Object stores that artifacts are mirrored to: S3-protocol storage, or a folder (a network share, a test)."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlparse

from realm_core.errors import ArtifactError, ConfigError


@runtime_checkable
class Objects(Protocol):
    """Keys are relative paths with `/`. Every method raises ArtifactError, naming the store, when it cannot be reached."""

    address: str

    def size(self, key: str) -> int | None:
        """Bytes of an object, None if there is none."""
        ...

    def upload(self, path: Path, key: str) -> None: ...

    def download(self, key: str, path: Path) -> None:
        """Write an object's bytes to a new file. Raises ArtifactError if there is no such object."""
        ...

    def read(self, key: str) -> bytes | None:
        """A small object, None if there is none."""
        ...

    def write(self, key: str, content: bytes) -> None: ...

    def names(self, prefix: str) -> list[str]:
        """What stands directly below `prefix/`."""
        ...


def open_objects(address: str) -> Objects:
    """`s3://bucket/prefix`, or a folder. Raises ConfigError for anything else."""
    parts = urlparse(address)
    if parts.scheme == "s3" and parts.netloc:
        return S3Objects(address, parts.netloc, parts.path.strip("/"))
    if parts.scheme in ("", "file") and parts.path:
        return FolderObjects(Path(parts.path))
    raise ConfigError(f"{address!r}: not a place for artifacts; write s3://BUCKET/PREFIX or a folder")


class FolderObjects:
    """Objects as files below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, str(folder)

    def size(self, key: str) -> int | None:
        path = self.folder / key
        return path.stat().st_size if path.is_file() else None

    def upload(self, path: Path, key: str) -> None:
        with self._placing(key) as scratch:
            shutil.copyfile(path, scratch)

    def download(self, key: str, path: Path) -> None:
        try:
            shutil.copyfile(self.folder / key, path)
        except OSError as error:
            raise ArtifactError(f"{self.address}/{key}: {error.strerror}; push it again") from None

    def read(self, key: str) -> bytes | None:
        path = self.folder / key
        return path.read_bytes() if path.is_file() else None

    def write(self, key: str, content: bytes) -> None:
        with self._placing(key) as scratch:
            scratch.write_bytes(content)

    def names(self, prefix: str) -> list[str]:
        folder = self.folder / prefix
        return sorted(entry.name for entry in folder.iterdir() if entry.name[0] != ".") if folder.is_dir() else []

    @contextmanager
    def _placing(self, key: str) -> Iterator[Path]:
        """A file of its own that takes the object's place when it is complete."""
        path = self.folder / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_name(f".{path.name}.{os.getpid()}")
            yield scratch
            os.replace(scratch, path)
        except OSError as error:
            raise ArtifactError(
                f"{self.address}: cannot be written ({error.strerror}); mend it and push again"
            ) from None


class S3Objects:
    """Objects in a bucket. Credentials, region and endpoint come from the environment that boto3 reads (AWS_…)."""

    def __init__(self, address: str, bucket: str, prefix: str) -> None:
        try:
            import boto3
        except ImportError:
            raise ConfigError(f"{address}: needs boto3; install the extra s3") from None
        self.address, self.bucket, self.prefix = address.rstrip("/"), bucket, prefix
        # MLflow has a name of its own for the endpoint; one setting shall do for both.
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("MLFLOW_S3_ENDPOINT_URL")
        with self._reaching():
            self.client: Any = boto3.client("s3", endpoint_url=endpoint)

    def size(self, key: str) -> int | None:
        with self._reaching():
            try:
                return int(self.client.head_object(Bucket=self.bucket, Key=self._key(key))["ContentLength"])
            except self.client.exceptions.ClientError as error:
                if error.response["Error"]["Code"] in ("404", "NoSuchKey"):
                    return None
                raise

    def upload(self, path: Path, key: str) -> None:
        with self._reaching():
            self.client.upload_file(str(path), self.bucket, self._key(key))

    def download(self, key: str, path: Path) -> None:
        with self._reaching():
            self.client.download_file(self.bucket, self._key(key), str(path))

    def read(self, key: str) -> bytes | None:
        with self._reaching():
            try:
                return bytes(self.client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read())
            except self.client.exceptions.NoSuchKey:
                return None

    def write(self, key: str, content: bytes) -> None:
        with self._reaching():
            self.client.put_object(Bucket=self.bucket, Key=self._key(key), Body=content)

    def names(self, prefix: str) -> list[str]:
        below = self._key(prefix) + "/"
        found = []
        with self._reaching():
            pages = self.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=below, Delimiter="/"):
                found += [entry["Prefix"][len(below) :].rstrip("/") for entry in page.get("CommonPrefixes", [])]
                found += [entry["Key"][len(below) :] for entry in page.get("Contents", [])]
        return sorted(found)

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError, Boto3Error) as error:
            reason = " ".join(str(error).split())
            raise ArtifactError(f"{self.address}: {reason}; mend it, then push or pull again") from None
