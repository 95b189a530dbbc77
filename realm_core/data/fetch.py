"""Public originals of question sets: fetched from a fixed list of addresses, accepted only with the expected sha256.

The list is all that is ever asked for. A redirect may lead to the hosts of the list only, over https, and no connection
is kept that ends on this machine or in a private network. Digests and sizes are those that the dataset catalogues of
TensorFlow Datasets (url_checksums) and Hugging Face Datasets (dataset_infos.json) publish.
"""

import http.client
import ipaddress
import os
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from realm_core.artifacts.manifest import file_sha256
from realm_core.errors import DataError

_SECONDS = 60.0  # without a byte
_CHUNK = 1 << 20
_LARGEST_MEMBER = 8 << 30  # bytes of an archive member


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One file of the list. `sha256` and `size` are those of what is sent; `member` is the part of a tar file to keep."""

    url: str
    sha256: str
    size: int
    name: str  # under which it is kept
    member: str | None = None


@dataclass(frozen=True, kw_only=True)
class Original:
    """A question set as it was published: what its splits are made of, and how to read them."""

    form: str
    train: RemoteFile
    test: RemoteFile


_NQ = "https://raw.githubusercontent.com/google-research-datasets/natural-questions/master/nq_open"
_WQ = "https://worksheets.codalab.org/rest/bundles"
_SQUAD = "https://rajpurkar.github.io/SQuAD-explorer/dataset"
_TRIVIA = "https://nlp.cs.washington.edu/triviaqa/data/triviaqa-unfiltered.tar.gz"
_TRIVIA_SHA256 = "7f0c94207fd0a1eb7bba3d52cdfe0735c98de850b9e5aa4e75f2776ef9a531d0"

ORIGINALS: Mapping[str, Original] = {
    "nq-open": Original(
        form="nq",
        train=RemoteFile(
            url=f"{_NQ}/NQ-open.train.jsonl",
            sha256="0c93aaf13b12f855628489665e4ef85ffb8573ad444646f11f4fabdc57a0aabf",
            size=8_522_298,
            name="NQ-open.train.jsonl",
        ),
        test=RemoteFile(
            url=f"{_NQ}/NQ-open.dev.jsonl",
            sha256="f15567f38099f3615f5b8a685c0aef449c11ad90d3da3735e8d1b98115b40616",
            size=391_316,
            name="NQ-open.dev.jsonl",
        ),
    ),
    "webquestions": Original(
        form="webquestions",
        train=RemoteFile(
            url=f"{_WQ}/0x4a763f8cde224c2da592b75f29e2f5c2/contents/blob/",
            sha256="fb1797e4554a1b1be642388367de1379f8c0d5afc609ac171492c67f7b70cb1e",
            size=825_320,
            name="webquestions.train.json",
        ),
        test=RemoteFile(
            url=f"{_WQ}/0xe7bac352fce7448c9ef238fb0a297ec2/contents/blob/",
            sha256="e3d4550e90660aaabe18458ba34b59f2624857273f375af7353273ce8b84ce6e",
            size=447_645,
            name="webquestions.test.json",
        ),
    ),
    "triviaqa": Original(
        form="triviaqa",
        train=RemoteFile(
            url=_TRIVIA,
            sha256=_TRIVIA_SHA256,
            size=632_549_060,
            name="unfiltered-web-train.json",
            member="triviaqa-unfiltered/unfiltered-web-train.json",
        ),
        test=RemoteFile(
            url=_TRIVIA,
            sha256=_TRIVIA_SHA256,
            size=632_549_060,
            name="unfiltered-web-dev.json",
            member="triviaqa-unfiltered/unfiltered-web-dev.json",
        ),
    ),
    "squad": Original(
        form="squad",
        train=RemoteFile(
            url=f"{_SQUAD}/train-v1.1.json",
            sha256="3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955",
            size=30_288_272,
            name="train-v1.1.json",
        ),
        test=RemoteFile(
            url=f"{_SQUAD}/dev-v1.1.json",
            sha256="95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9",
            size=4_854_279,
            name="dev-v1.1.json",
        ),
    ),
}
# Nobody publishes a digest of these, so they are not fetched; a file that somebody has is read with --format.
ELSEWHERE = {
    "curatedtrec": "large2180-train.tsv and large2180-test.tsv of github.com/brmson/dataset-factoid-curated, --format trec",
}


@dataclass(frozen=True)
class Policy:
    """Where a request may go."""

    hosts: frozenset[str]
    schemes: frozenset[str] = frozenset({"https"})
    private: bool = False  # addresses of this machine and of private networks

    def check(self, url: str) -> None:
        """Raises DataError for an address outside the policy."""
        parts = urlsplit(url)
        if parts.scheme not in self.schemes or parts.hostname not in self.hosts:
            raise DataError(
                f"{url[:200]}: not on the list of addresses ({', '.join(sorted(self.hosts))} over "
                f"{' or '.join(sorted(self.schemes))}); refused"
            )

    def check_peer(self, host: str, address: str) -> None:
        """Raises DataError where a name leads to this machine or into a private network."""
        if not self.private and not ipaddress.ip_address(address.partition("%")[0]).is_global:
            raise DataError(f"{host}: leads to {address}, which is no public address; refused")


def default_policy() -> Policy:
    """The hosts of the list, over https."""
    urls = [file.url for original in ORIGINALS.values() for file in (original.train, original.test)]
    return Policy(frozenset(str(urlsplit(url).hostname) for url in urls))


def original(name: str) -> Original:
    """The set of that name. Raises DataError with the names that are known."""
    if name in ELSEWHERE:
        raise DataError(
            f"{name}: no digest of its originals is published, so it is not fetched; take {ELSEWHERE[name]}"
        )
    if name not in ORIGINALS:
        raise DataError(f"{name}: unknown question set; choose one of {', '.join(sorted(ORIGINALS))}")
    return ORIGINALS[name]


def fetch(
    name: str,
    folder: Path,
    policy: Policy | None = None,
    progress: Callable[[int, int], None] = lambda done, size: None,
) -> dict[str, Path]:
    """Files of a question set below `folder`, {"train": …, "test": …}; what is there with the right content stays.

    Raises DataError if an address cannot be reached, sends something else than expected, or leads elsewhere.
    """
    found = original(name)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"train": folder / found.train.name, "test": folder / found.test.name}
    for file in (found.train, found.test):
        fetch_file(file, folder, policy or default_policy(), progress)
    return paths


def fetch_file(file: RemoteFile, folder: Path, policy: Policy, progress: Callable[[int, int], None]) -> Path:
    """One file, verified. A member is taken out of its archive by its exact name; no name in an archive is ever a path."""
    kept = folder / file.name
    if file.member is None:
        if not (kept.is_file() and file_sha256(kept) == file.sha256):
            _download(file, kept, policy, progress)
        return kept
    archive = folder / f"{file.sha256[:16]}.tar.gz"
    if not (archive.is_file() and file_sha256(archive) == file.sha256):
        _download(file, archive, policy, progress)
    if not kept.is_file():
        _take_out(archive, file.member, kept)
    return kept


def _download(file: RemoteFile, target: Path, policy: Policy, progress: Callable[[int, int], None]) -> None:
    policy.check(file.url)
    scratch = target.with_name(f".{target.name}.part")
    digest, size = sha256(), 0
    try:
        with _opener(policy).open(file.url, timeout=_SECONDS) as response, scratch.open("wb") as out:
            while piece := response.read(_CHUNK):
                size += len(piece)
                if size > file.size:
                    raise DataError(f"{file.url}: sends more than the {file.size} bytes expected; refused")
                digest.update(piece)
                out.write(piece)
                progress(size, file.size)
        if digest.hexdigest() != file.sha256:
            raise DataError(
                f"{file.url}: sha256 {digest.hexdigest()[:16]}…, expected {file.sha256[:16]}… ({size} of {file.size} "
                "bytes); the published file has changed or the transfer was damaged, nothing was kept"
            )
        os.replace(scratch, target)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = error.reason if type(error) is urllib.error.URLError else error
        if isinstance(reason, DataError):
            raise reason from None
        raise DataError(
            f"{file.url}: cannot be fetched ({reason}); check the network, or put the file at {target}, where its "
            "digest is checked"
        ) from None
    finally:
        scratch.unlink(missing_ok=True)


def _take_out(archive: Path, member: str, target: Path) -> None:
    scratch = target.with_name(f".{target.name}.part")
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for entry in tar:
                if entry.name == member and entry.isreg():
                    if entry.size > _LARGEST_MEMBER:
                        raise DataError(f"{archive}: {member} holds {entry.size} bytes, more than expected; refused")
                    source = tar.extractfile(entry)
                    assert source is not None
                    with scratch.open("wb") as out:
                        shutil.copyfileobj(source, out, _CHUNK)
                    os.replace(scratch, target)
                    return
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive}: cannot be unpacked ({error}); remove it and fetch again") from None
    finally:
        scratch.unlink(missing_ok=True)
    raise DataError(f"{archive}: no file {member} in it; remove it and fetch again")


def _opener(policy: Policy) -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Redirects(policy), _Http(policy), _Https(policy))


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self._policy.check(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self._policy = policy

    def http_open(self, req: Any) -> Any:
        return self.do_open(_checked(http.client.HTTPConnection, self._policy), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self._policy = policy

    def https_open(self, req: Any) -> Any:
        return self.do_open(_checked(http.client.HTTPSConnection, self._policy), req)


def _checked(kind: type[http.client.HTTPConnection], policy: Policy) -> Any:
    """A connection that looks at the address it has reached before it sends anything."""

    class Checked(kind):  # type: ignore[valid-type,misc]
        def connect(self) -> None:
            super().connect()
            if getattr(self, "_tunnel_host", None):
                return  # the configured proxy is the peer, and resolves the name
            try:
                policy.check_peer(self.host, self.sock.getpeername()[0])
            except DataError:
                self.close()
                raise

    return Checked
