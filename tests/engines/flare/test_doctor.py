"""The doctor names what is wrong at a site, each with what to do; each failure made on purpose."""

import json
import os
import shutil
import socket
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from polyclinic.engines.flare.client import diagnosis, site_setup
from polyclinic.engines.flare.pki import certificate_authority as authorities
from polyclinic.engines.flare.pki import site_keys
from polyclinic.engines.flare.protocol.paths import ServerFolder, SiteFolder
from polyclinic.engines.flare.server import server_setup
from tests.conftest import little_sites
from tests.support.local_deployment import write_data


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("nvflare", reason="the extra [flare] is not installed")
    root = tmp_path_factory.mktemp("diagnose")
    server, site = ServerFolder(root / "server"), SiteFolder(root / "site")
    server_setup.init(server, "doctors", "localhost", 1, "umc")
    site_setup.init(site, "site-0", "hospital")
    _, table = server_setup.admit(server, site.path / "site-0.request")
    write_data(root / "data", little_sites()["site-0"])
    (root / "join").write_text(json.dumps(table))
    site_setup.join(site, site_setup.read_join(site, root / "join")[0], root / "data")
    return root


@pytest.fixture
def site(joined: Path, tmp_path: Path) -> SiteFolder:
    """A copy that a test may break."""
    shutil.copytree(joined, tmp_path / "all")
    home = SiteFolder(tmp_path / "all" / "site")
    home.settings.write_text(home.settings.read_text().replace(str(joined), str(tmp_path / "all")))
    return home


def found(site: SiteFolder) -> dict[str, tuple[bool, str]]:
    return {what: (good, words) for what, good, words in diagnosis.examine(site)}


def change(site: SiteFolder, key: str, value: object) -> None:
    lines = [line for line in site.settings.read_text().splitlines() if not line.startswith(f"{key} =")]
    site.settings.write_text("\n".join([*lines, f"{key} = {json.dumps(value)}"]) + "\n")


def test_a_healthy_site_lacks_nothing_but_its_server_and_its_processes(site: SiteFolder) -> None:
    seen = found(site)
    assert {what for what, (good, _) in seen.items() if not good} == {"port", "processes"}
    assert "site start" in seen["processes"][1]
    assert "12 patients" in seen["data"][1]
    assert "the same code" in seen["version"][1]


def test_a_folder_that_is_no_site(tmp_path: Path) -> None:
    ((what, good, words),) = diagnosis.examine(SiteFolder(tmp_path))
    assert (what, good) == ("folder", False)
    assert "site init" in words


def test_a_site_that_has_not_joined(tmp_path: Path) -> None:
    site_setup.init(SiteFolder(tmp_path), "site-0", "hospital")
    assert "site join" in found(SiteFolder(tmp_path))["folder"][1]


@pytest.mark.parametrize("days", [-1, 4000])
def test_a_clock_that_is_off(days: int, site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + days * 86400)
    good, words = found(site)["clock"]
    assert not good
    assert "set the clock" in words


def test_a_certificate_that_ends_soon_has_ended_or_is_for_other_keys(
    site: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for days, why in ((720, "ends in 9 days"), (740, "renew it"), (-1, "set the clock")):
        when = datetime.now(timezone.utc) + timedelta(days=days)

        class Off(datetime):
            @classmethod
            def now(cls, tz: Any = None, when: Any = when) -> Any:
                return when

        with monkeypatch.context() as patch:
            patch.setattr(authorities, "datetime", Off)
            good, words = found(site)["certificate"]
            assert not good
            assert why in words
    site_setup.init(site, "site-0", "hospital", renew=True, new_keys=True)
    assert "new keys have no certificate yet" in found(site)["certificate"][1]
    site_keys.take_up(site.keys)
    assert "does not match the keys" in found(site)["certificate"][1]
    (site.kit / "startup" / "client.crt").write_text("x")
    assert "cannot be read" in found(site)["certificate"][1]


def test_a_name_nobody_knows(site: SiteFolder) -> None:
    change(site, "host", "no-such-host.invalid")
    good, words = found(site)["name"]
    assert not good
    assert "name server" in words
    assert "port" not in found(site)


def test_a_port_that_does_not_answer_and_a_server_that_is_another(site: SiteFolder) -> None:
    assert "is the server up" in found(site)["port"][1]
    with socket.create_server(("127.0.0.1", 0)) as other:
        change(site, "port", other.getsockname()[1])
        diagnosis.PATIENCE, before = 0.3, diagnosis.PATIENCE
        try:
            seen = found(site)
        finally:
            diagnosis.PATIENCE = before
        assert seen["port"][0]
        assert "no secure connection" in seen["server"][1]


def test_a_proxy_that_is_not_there(site: SiteFolder) -> None:
    change(site, "proxy", "http://127.0.0.1:1")
    seen = found(site)
    assert "name" not in seen
    assert "through http://127.0.0.1:1?" in seen["port"][1]


def test_data_that_are_gone_empty_or_not_data(site: SiteFolder) -> None:
    folder = site.path.parent / "data"
    (folder / "train.npz").write_bytes(b"Jane Doe")
    good, words = found(site)["data"]
    assert not good
    assert "cannot be read" in words
    for path in folder.iterdir():
        path.unlink()
    assert "neither train.npz nor data.toml" in found(site)["data"][1]
    (folder / "data.toml").write_text('kind = "npz"\npath = "nothing.npz"\n')
    assert not found(site)["data"][0]
    shutil.rmtree(folder)
    assert "is the disk mounted" in found(site)["data"][1]


def test_a_policy_with_a_mistake_and_one_that_is_gone(site: SiteFolder) -> None:
    site.policy.write_text("[limits]\nepoch = 3\n")
    assert "unknown key" in found(site)["policy"][1]
    site.policy.unlink()
    assert "--reset" in found(site)["policy"][1]


def test_a_disk_that_is_nearly_full(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: os.terminal_size((1, 1)) and type("Usage", (), {"free": 2**20})()
    )
    assert "free some space" in found(site)["disk"][1]
