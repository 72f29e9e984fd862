"""How the processes of one house talk: over a socket that no other account reaches, with settings that no job
changes.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nvflare", reason="the extra [flare] is not installed")

from nvflare.fuel.f3.comm_error import CommError
from nvflare.fuel.f3.drivers.connector_info import ConnectorInfo, Mode
from nvflare.fuel.utils.config_factory import ConfigFactory

from polyclinic.engines.flare import flare_processes
from polyclinic.engines.flare.client import diagnosis
from polyclinic.engines.flare.drivers import unix_socket
from polyclinic.engines.flare.drivers.unix_socket import UnixSocketDriver
from polyclinic.engines.flare.pki import provisioning
from tests.support.flare_deployment import Hospitals, study, until

# An account without any right there, that knows where the socket is and how FLARE's cells register (as in the attack
# that this closes: over loopback TCP it was let in, read the configuration, and had `stop_cell` accepted).
INTRUDER = """
import os, sys, socket
os.setgid(65534); os.setuid(65534)
try:
    os.chdir(os.path.dirname(sys.argv[1]))  # a socket's name has at most 107 bytes
    line = socket.socket(socket.AF_UNIX); line.connect(os.path.basename(sys.argv[1])); print("connected")
except OSError as error:
    print(type(error).__name__)
"""


class Heard:
    """What FLARE tells of a connection's life."""

    def __init__(self) -> None:
        self.states: list[str] = []

    def state_change(self, connection: Any) -> None:
        self.states.append(connection.state.name)


def listener(folder: Path) -> tuple[UnixSocketDriver, str, Path, Heard]:
    url, _ = UnixSocketDriver.get_urls("unix", {"folder": str(folder)})
    path = Path(url.removeprefix("unix://0"))
    driver, heard = UnixSocketDriver(), Heard()
    driver.register_conn_monitor(heard)
    connector = ConnectorInfo(
        "test", driver, {"path": str(path), "url": url, "scheme": "unix"}, Mode.PASSIVE, 0, 0, False, False
    )
    threading.Thread(target=driver.listen, args=(connector,), daemon=True).start()
    until(path.exists, "the socket", 10)
    return driver, url, path, heard


def test_a_socket_has_a_private_folder_and_any_length_of_path(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100) / ("y" * 100)
    deep.mkdir(parents=True, mode=0o700)
    deep.chmod(0o755)
    with pytest.raises(CommError, match="must belong to this user alone"):
        UnixSocketDriver.get_urls("unix", {"folder": str(deep)})
    with pytest.raises(CommError, match="folder for sockets"):
        UnixSocketDriver.get_urls("unix", {"folder": str(tmp_path / "none")})
    deep.chmod(0o700)
    driver, _, path, heard = listener(deep)
    assert len(str(path)) > 200
    assert path.stat().st_mode & 0o777 == 0o600
    with unix_socket._short(path) as short, socket.socket(socket.AF_UNIX) as line:
        line.connect(short)
        until(lambda: heard.states == ["CONNECTED"], "the connection", 10)
    driver.shutdown()
    until(lambda: not path.exists(), "the socket to be removed", 10)


def test_a_peer_of_another_account_is_not_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the folder's mode: the kernel says whose process it is."""
    tmp_path.chmod(0o700)
    driver, _, path, heard = listener(tmp_path)
    monkeypatch.setattr(unix_socket, "peer_user", lambda line: os.geteuid() + 1)
    with unix_socket._short(path) as short, socket.socket(socket.AF_UNIX) as line:
        line.connect(short)
        line.settimeout(10)
        assert line.recv(1) == b""  # closed at once
    assert heard.states == []
    driver.shutdown()


def test_the_houses_settings_are_found_before_those_of_a_job(tmp_path: Path) -> None:
    """FLARE takes a settings file from wherever in its folder it meets one first; a job's files lie there too."""
    home = tmp_path / "flare"
    for folder in ("local", "startup", "a-job/app/config"):
        (home / folder).mkdir(parents=True)
    names = ("comm_config.json", "resources.json", "fed_client.json")
    for name in names:
        (home / "a-job/app/config" / name).write_text(
            '{"comm_driver_path": "/a-job", "class_allow_list": ["os.system"]}'
        )
    (home / "local/resources.json").write_text('{"class_allow_list": ["ours"]}')
    (home / "startup/fed_client.json").write_text('{"ours": true}')
    provisioning.write_settings(home)
    for name in names:
        _, found = ConfigFactory.search_config_format(name, [str(home)])
        assert found == str(home / name)
        assert "a-job" not in Path(found).read_text()
        assert Path(found).stat().st_mode & 0o077 == 0
    given = json.loads((home / "comm_config.json").read_text())
    assert given["internal"] == {"scheme": "unix", "resources": {"folder": str(home / "sockets")}}
    assert (Path(given["comm_driver_path"]) / "unix_socket.py").is_file()


@pytest.mark.deploy
@pytest.mark.slow
def test_no_process_of_a_house_listens_but_the_server_on_its_port(hospitals: Hospitals) -> None:
    """Nothing on loopback, while a job runs; another account is not let in; and the job ends well."""
    hospitals.hold(0, "site-0")
    hospitals.order(study("sockets", rounds=1))
    hospitals.held(0, "site-0")
    for name, home in hospitals.homes.items():
        assert hospitals.pids("site job", name)
        assert flare_processes.listening(home.path) == {}
        assert {what: good for what, good, _ in diagnosis.examine(home)}["sockets"]
    assert set(flare_processes.listening(hospitals.server.path)) == {hospitals.port}
    (path,) = (hospitals.homes["site-0"].kit / "sockets").iterdir()
    if os.geteuid() == 0:
        done = subprocess.run([sys.executable, "-c", INTRUDER, str(path)], capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == "PermissionError", done
    hospitals.release()
    hospitals.finished("sockets")
