"""A site and a server as services: what they report to systemd, and that one that hangs reports nothing."""

import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("nvflare", reason="the extra [flare] is not installed")

from polyclinic.engines.flare import flare_processes, service_manager
from polyclinic.engines.flare.client import site_setup
from polyclinic.engines.flare.protocol.paths import ServerFolder, SiteFolder, toml
from polyclinic.engines.flare.server.supervisor import Supervisor
from tests.engines.flare.test_status import JOINED

GIVEN: dict[str, str | int] = {"project": "p", "host": "localhost", "port": 8002, "organization": "x", "scheme": "grpc"}
ALIVE = b"READY=1\nWATCHDOG=1"


class Manager:
    """The end of systemd."""

    def __init__(self, address: str) -> None:
        self.line = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.line.bind(address)
        self.line.setblocking(False)

    def heard(self) -> list[bytes]:
        found = list[bytes]()
        while True:
            try:
                found.append(self.line.recv(1000))
            except BlockingIOError:
                return found


@pytest.fixture(params=["file", "abstract"])
def manager(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    name = str(tmp_path / "n") if request.param == "file" else f"@polyclinic-{tmp_path.name}"
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    manager = Manager(name.replace("@", "\0"))
    yield manager
    manager.line.close()


@pytest.fixture
def no_flare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flare_processes, "start", lambda *_, **__: SimpleNamespace(poll=lambda: None))
    monkeypatch.setattr(flare_processes, "end", lambda *_: 0)
    monkeypatch.setattr(site_setup, "require", lambda: None)


def joined(path: Path) -> SiteFolder:
    home = SiteFolder(path)
    home.kit.mkdir(parents=True)
    home.settings.write_text(toml(JOINED))
    return home


def test_a_site_reports_that_it_is_alive_and_that_it_stops(manager: Manager, no_flare: None, tmp_path: Path) -> None:
    home = joined(tmp_path / "site")
    beats = iter([False, False, True])
    site_setup.run(home, stopped=lambda: next(beats), pause=0.0)
    assert manager.heard() == [ALIVE, ALIVE, b"STOPPING=1"]


def test_a_server_reports_that_it_is_alive_and_that_it_stops(manager: Manager, no_flare: None, tmp_path: Path) -> None:
    home = ServerFolder(tmp_path / "server")
    home.path.mkdir()
    home.settings.write_text(toml(GIVEN))
    supervisor, beats = Supervisor(home), [0]

    def tick() -> None:
        beats[0] += 1
        supervisor.stop = beats[0] == 2

    supervisor.tick = tick  # type: ignore[method-assign]
    supervisor.run(pause=0.0)
    assert manager.heard() == [ALIVE, ALIVE, b"STOPPING=1"]


def test_a_site_that_hangs_reports_nothing(manager: Manager, no_flare: None, tmp_path: Path) -> None:
    home = joined(tmp_path / "site")

    def hangs() -> None:
        raise TimeoutError  # instead of never returning

    with pytest.raises(TimeoutError):
        site_setup.run(home, stopped=lambda: False, pause=0.0, notify=hangs)
    assert ALIVE not in manager.heard()[1:]


@pytest.mark.parametrize("address", ["", "relative", "/no/such/socket", "@nobody-listens"])
def test_without_a_service_manager_nothing_is_reported(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    service_manager.tell(service_manager.READY)
