"""Downloads of originals against a real server: only what is on the list, only with the right digest, never inwards."""

import gzip
import io
import tarfile
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import realm_core.data.fetch as module
from realm_core.cli import app
from realm_core.data.fetch import ORIGINALS, Original, Policy, RemoteFile, default_policy, fetch, original
from realm_core.errors import DataError

CONTENT = b'{"question": "who?", "answer": ["Ada"]}\n'


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("../../escape", "/absolute", "set/train.json"):
            entry = tarfile.TarInfo(name)
            entry.size = len(CONTENT)
            tar.addfile(entry, io.BytesIO(CONTENT))
        link = tarfile.TarInfo("set/dev.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    return gzip.compress(buffer.getvalue(), mtime=0)


ARCHIVE = archive()


class Handler(BaseHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/").replace("PORT", str(self.server.server_port)))
            self.end_headers()
            return
        body = {"/train": CONTENT, "/test": CONTENT, "/set.tar.gz": ARCHIVE, "/huge": CONTENT * 1000}.get(self.path)
        self.send_response(200 if body else 404)
        self.end_headers()
        self.wfile.write((body or b"")[: 10 if self.path == "/short" else None])

    def log_message(self, *_: Any) -> None:
        return None


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def listed(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a set whose files come from `path` of the local server on the list."""

    def put(path: str, content: bytes = CONTENT, **changes: Any) -> Policy:
        def file(name: str) -> RemoteFile:
            values = {"sha256": sha256(content).hexdigest(), "size": len(content), "name": f"{name}.json", **changes}
            return RemoteFile(url=f"http://127.0.0.1:{server.server_port}{path}", **values)

        monkeypatch.setattr(module, "ORIGINALS", {"mine": Original(form="nq", train=file("train"), test=file("test"))})
        monkeypatch.setattr(Handler, "asked", [])
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        return Policy(frozenset({"127.0.0.1"}), frozenset({"http"}), private=True)

    return put


def test_a_listed_file_with_the_right_digest_is_kept_and_not_asked_for_again(listed: Any, tmp_path: Path) -> None:
    policy = listed("/train")
    paths = fetch("mine", tmp_path, policy)
    assert paths["train"].read_bytes() == CONTENT
    assert fetch("mine", tmp_path, policy) == paths
    assert len(Handler.asked) == 2
    paths["train"].write_bytes(b"edited")
    fetch("mine", tmp_path, policy)
    assert paths["train"].read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "changes", "reason"),
    [
        ("/train", {"sha256": "0" * 64}, "expected 0000000000000000"),
        ("/huge", {}, "sends more than the"),
        ("/absent", {}, "404: Not Found"),
        ("/to/http://localhost:PORT/train", {}, "localhost.*not on the list"),
        ("/to/https://127.0.0.1/train", {}, "not on the list"),
        ("/to/file:///etc/hostname", {}, "not allowed"),
        ("/to/http://169.254.169.254/latest/meta-data", {}, "169.254.169.254.*not on the list"),
        ("/to/ftp://127.0.0.1/x", {}, "not on the list"),
    ],
)
def test_anything_else_is_refused_and_nothing_is_kept(
    listed: Any, tmp_path: Path, path: str, changes: dict[str, Any], reason: str
) -> None:
    policy = listed(path, **changes)
    with pytest.raises(DataError, match=reason):
        fetch("mine", tmp_path, policy)
    assert list(tmp_path.iterdir()) == []


def test_a_redirect_within_the_list_is_followed(listed: Any, tmp_path: Path) -> None:
    assert fetch("mine", tmp_path, listed("/to/http://127.0.0.1:PORT/train"))["test"].read_bytes() == CONTENT


def test_a_listed_name_that_leads_to_this_machine_is_refused_before_a_byte_is_sent(listed: Any, tmp_path: Path) -> None:
    policy = listed("/train")
    with pytest.raises(DataError, match=r"leads to 127\.0\.0\.1, which is no public address"):
        fetch("mine", tmp_path, Policy(policy.hosts, policy.schemes))
    assert Handler.asked == []


def test_a_server_that_is_away_is_explained(listed: Any, tmp_path: Path, server: ThreadingHTTPServer) -> None:
    policy = listed("/train")
    closed = RemoteFile(url="http://127.0.0.1:9/x", sha256="0" * 64, size=1, name="x")
    with pytest.raises(DataError, match=r"cannot be fetched \(.*put the file at"):
        module.fetch_file(closed, tmp_path, policy, lambda done, size: None)


def test_a_member_is_taken_out_by_its_exact_name_and_no_name_is_a_path(listed: Any, tmp_path: Path) -> None:
    policy = listed("/set.tar.gz", ARCHIVE, member="set/train.json")
    folder = tmp_path / "a" / "b" / "c"
    assert fetch("mine", folder, policy)["train"].read_bytes() == CONTENT
    assert len(Handler.asked) == 1  # both files come from one archive
    assert [path for path in tmp_path.rglob("*") if path.is_file() and folder not in path.parents] == []
    for member, reason in (("set/dev.json", "no file set/dev.json"), ("absent", "no file absent")):
        policy = listed("/set.tar.gz", ARCHIVE, member=member, name=member.replace("/", "-"))
        with pytest.raises(DataError, match=reason):  # the first is a link out of the archive
            fetch("mine", folder, policy)


def test_the_list_holds_https_addresses_with_full_digests() -> None:
    policy = default_policy()
    for found in ORIGINALS.values():
        for file in (found.train, found.test):
            policy.check(file.url)
            assert len(bytes.fromhex(file.sha256)) == 32
            assert file.size > 0
            assert Path(file.name).name == file.name
    with pytest.raises(DataError, match="refused"):
        policy.check("http://raw.githubusercontent.com/x")
    for address in ("10.0.0.1", "169.254.169.254", "::1", "fe80::1%eth0", "192.168.0.1"):
        with pytest.raises(DataError, match="no public address"):
            policy.check_peer("host", address)
    policy.check_peer("host", "140.82.112.3")


def test_unknown_sets_and_sets_without_a_published_digest_are_explained() -> None:
    with pytest.raises(DataError, match="choose one of nq-open"):
        original("riddles")
    with pytest.raises(DataError, match=r"no digest .* --format trec"):
        original("curatedtrec")


def test_the_command_line_says_what_to_do_next(listed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = listed("/train")
    monkeypatch.setattr(module, "default_policy", lambda: policy)
    result = CliRunner().invoke(app, ["qa", "fetch", "mine", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert f"realm qa build --format nq --input {tmp_path / 'mine' / 'train.json'}" in result.stdout
