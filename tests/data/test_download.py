"""Fetching from a server on this machine: whole, resumed, damaged, refused, and with no server at all."""

import dataclasses
import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from polyclinic.data.catalog import dataset_catalog
from polyclinic.data.download import fetch
from polyclinic.data.examples import DataError
from polyclinic.data.federation import federate
from tests.data.catalog.test_dataset_catalog import decathlon
from tests.support.data_sets import data_spec

CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``CONTENT``; ``cut`` ends every answer after that many bytes; ``ranges`` is whether it can resume."""

    cut: int | None = None
    ranges = True
    status = 200
    content = CONTENT
    asked: list[str | None]


class Handler(BaseHTTPRequestHandler):
    """Answers GET."""

    server: Server

    def do_GET(self) -> None:
        """The content, or the rest of it."""
        span = self.headers.get("Range")
        self.server.asked.append(span)
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        first = int(span.removeprefix("bytes=").removesuffix("-")) if span and self.server.ranges else 0
        body = self.server.content[first:]
        if span and not body:
            self.send_error(416)
            return
        self.send_response(206 if span and self.server.ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cut])

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    """A server on the loopback address, for one test."""
    one = Server(("127.0.0.1", 0), Handler)
    one.asked = []
    thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield one
    one.shutdown()
    one.server_close()
    thread.join(5)


@pytest.fixture
def address(server: Server) -> str:
    """Where it listens."""
    return f"http://127.0.0.1:{server.server_address[1]}/"


def test_a_whole_file_comes_once(server: Server, address: str, tmp_path: Path) -> None:
    """Equal to the byte; the second time nothing is asked; no part is left behind."""
    to = tmp_path / "deep" / "x.npz"
    assert fetch(address, to, MD5).read_bytes() == CONTENT
    assert fetch(address, to, MD5) == to
    assert server.asked == [None]
    assert [f.name for f in to.parent.iterdir()] == ["x.npz"]


def test_an_interrupted_download_goes_on_where_it_stopped(server: Server, address: str, tmp_path: Path) -> None:
    """Answers that end early: each request asks for the rest only."""
    server.cut = 300_000
    assert fetch(address, tmp_path / "x", MD5).read_bytes() == CONTENT
    starts = [int(span.removeprefix("bytes=")[:-1]) for span in server.asked if span]
    assert starts == sorted(starts)
    assert len(server.asked) == -(-len(CONTENT) // 300_000)


def test_a_part_from_another_day_is_used(server: Server, address: str, tmp_path: Path) -> None:
    """The existing part is not requested again, and nothing if it is complete."""
    (tmp_path / "x.part").write_bytes(CONTENT[:1000])
    assert fetch(address, tmp_path / "x", MD5).read_bytes() == CONTENT
    assert server.asked == ["bytes=1000-"]
    (tmp_path / "y.part").write_bytes(CONTENT)
    assert fetch(address, tmp_path / "y", MD5).read_bytes() == CONTENT


def test_a_server_that_cannot_go_on_is_asked_anew(server: Server, address: str, tmp_path: Path) -> None:
    """It sends everything again, and the file is right."""
    server.ranges = False
    (tmp_path / "x.part").write_bytes(b"something else")
    assert fetch(address, tmp_path / "x", MD5).read_bytes() == CONTENT


def test_a_wrong_file_is_deleted_and_reported(server: Server, address: str, tmp_path: Path) -> None:
    """It never gets its name; another file under this name is also reported."""
    server.content = CONTENT[:-1] + b"!"
    with pytest.raises(DataError, match="is not the file that was published"):
        fetch(address, tmp_path / "x", MD5)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x").write_bytes(b"mine")
    with pytest.raises(DataError, match="delete it and try again"):
        fetch(address, tmp_path / "x", MD5)
    assert (tmp_path / "x").read_bytes() == b"mine"


def test_refusals_and_no_network_say_what_to_do(server: Server, address: str, tmp_path: Path) -> None:
    """404 at once; 503 after some tries; no server: instructions for a manual download, and its checksum."""
    server.status = 404
    with pytest.raises(DataError, match=f"the server answered 404 .* MD5 is {MD5}.* put it at"):
        fetch(address, tmp_path / "x", MD5)
    assert len(server.asked) == 1
    server.status = 503
    with pytest.raises(DataError, match="the server answered 503"):
        fetch(address, tmp_path / "x", MD5, tries=2)
    with pytest.raises(DataError, match="If this machine has no access to the internet"):
        fetch("http://127.0.0.1:9/x", tmp_path / "x", MD5, tries=1, timeout=2)
    server.status, server.cut = 200, 0
    with pytest.raises(DataError, match="the connection ended early"):
        fetch(address, tmp_path / "x", MD5, tries=2)


def test_the_catalog_fetches_by_name(
    server: Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To its place in the cache, under MedMNIST's name for the size; sets behind agreements say what to do."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path))
    one = dataset_catalog.entry("breastmnist")
    monkeypatch.setattr(dataset_catalog, "entry", lambda _: dataclasses.replace(one, md5={28: MD5, 64: MD5}))
    assert dataset_catalog.get("breastmnist", base=address) == tmp_path / "downloads" / "breastmnist.npz"
    assert dataset_catalog.get("breastmnist", 64, base=address).name == "breastmnist_64.npz"
    with pytest.raises(DataError, match="has no size 99: choose 28, 64"):
        dataset_catalog.get("breastmnist", 99)
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"adni cannot be fetched automatically\. Apply at LONI"):
        dataset_catalog.get("adni")


def tape(folder: Path, inside: str) -> bytes:
    """A ``.tar`` file of ``folder`` under the name ``inside``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as packed:
        packed.add(folder, inside)
    return buffer.getvalue()


def test_an_archive_is_fetched_unpacked_once_and_studied(
    server: Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task of the Decathlon, from nothing to sites at work, by its name alone."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    decathlon()(tmp_path / "made")
    server.content = tape(tmp_path / "made", "Task04_Hippocampus")
    one = dataset_catalog.entry("msd-hippocampus")
    right = dataclasses.replace(one, checksum=hashlib.md5(server.content).hexdigest())
    monkeypatch.setattr(dataset_catalog, "entry", lambda _: right)
    spec = data_spec(use="msd-hippocampus", sites={"partition": "iid", "count": 1})
    with pytest.raises(
        DataError, match="Task04_Hippocampus is not here yet: fetch it with `polyclinic data get msd-hip"
    ):
        federate(spec)
    server.cut = 20_000  # a poor line: each answer breaks off
    home = dataset_catalog.get("msd-hippocampus", base=address)
    assert home == tmp_path / "cache" / "downloads" / "msd-hippocampus"
    assert len(server.asked) > 2
    assert {path.name for path in home.parent.iterdir()} == {"msd-hippocampus"}  # the archive itself is gone
    asked = len(server.asked)
    assert dataset_catalog.get("msd-hippocampus", base=address) == home
    assert len(server.asked) == asked
    assert federate(spec).shape == (1, 6, 10, 12)


@pytest.mark.parametrize("kind", ["outside", "link", "device"])
def test_an_archive_cannot_write_elsewhere(tmp_path: Path, kind: str) -> None:
    from polyclinic.data.archives import unpack

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as packed:
        member = tarfile.TarInfo("../evil" if kind == "outside" else "evil")
        if kind == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        elif kind == "device":
            member.type = tarfile.CHRTYPE
        packed.addfile(member, io.BytesIO())
    (tmp_path / "x.tar").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match=r"x\.tar cannot be unpacked"):
        unpack(tmp_path / "x.tar", tmp_path / "inner" / "home")
    assert not (tmp_path / "inner" / "evil").exists()
    assert not (tmp_path / "inner" / "home").exists()


def test_an_archive_of_too_much_or_of_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polyclinic.data import archives

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_bytes(bytes(5000))
    (tmp_path / "x.tar").write_bytes(tape(tmp_path / "full", "full"))
    monkeypatch.setattr(archives, "MOST_BYTES", 1000)
    with pytest.raises(DataError, match="unpack it yourself"):
        archives.unpack(tmp_path / "x.tar", tmp_path / "home")
    (tmp_path / "y.tar").write_bytes(b"not an archive" * 100)
    with pytest.raises(DataError, match="cannot be unpacked"):
        archives.unpack(tmp_path / "y.tar", tmp_path / "home")
    assert not (tmp_path / "home").exists()
