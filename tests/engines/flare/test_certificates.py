"""Who is heard by a real server: certificates of all kinds, another's name, shutting out; and the line through
a proxy.
"""

import shutil
import socket
import ssl
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from polyclinic.engines.flare import flare_processes
from polyclinic.engines.flare.client import proxies
from polyclinic.engines.flare.pki import certificate_authority as authorities
from polyclinic.engines.flare.pki import site_keys
from polyclinic.engines.flare.pki.certificate_authority import Authority
from polyclinic.engines.flare.protocol.paths import SetupError
from polyclinic.engines.flare.server import server_setup
from tests.support.flare_deployment import Hospitals, until
from tests.support.http_proxy import HttpProxy
from tests.support.local_deployment import order


def test_a_proxy_is_one_or_is_told() -> None:
    assert proxies.check("http://proxy.hospital.org:3128") == ("proxy.hospital.org", 3128)
    for bad in (
        "",
        "proxy:3128",
        "https://proxy:1",
        "http://proxy",
        "http://proxy:99999",
        "http://a b:1",
        "http://u:p@proxy:1",
        "http://[::1:1",
        "http://p:1/x",
    ):
        with pytest.raises(SetupError, match="written like"):
            proxies.check(bad)
    with pytest.raises(SetupError, match="only grpc passes"):
        proxies.check("http://proxy:1", "tcp")


def test_the_environment_names_a_proxy_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*proxies.VARIABLES, "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    given = {"host": "fed.org", "scheme": "grpc"}
    assert proxies.of(given) == ""
    monkeypatch.setenv("https_proxy", "http://env:1")
    assert proxies.of(given) == "http://env:1"
    assert proxies.of({**given, "proxy": "http://own:1"}) == "http://own:1"
    assert proxies.of({**given, "scheme": "tcp"}) == ""
    monkeypatch.setenv("no_proxy", "a.org, fed.org")
    assert proxies.of(given) == ""


def test_a_line_through_a_proxy_and_one_that_says_no() -> None:
    house, closed = HttpProxy(), HttpProxy(allow=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with proxies.connect("127.0.0.1", port, house.url, 5.0) as line:
            there, _ = server.accept()
            line.sendall(b"x")
            assert there.recv(1) == b"x"
            there.close()
        assert house.asked == [f"127.0.0.1:{port}"]
        with pytest.raises(OSError, match="403 Forbidden"):
            proxies.connect("127.0.0.1", port, closed.url, 5.0)
    house.close()
    closed.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    pytest.importorskip("nvflare", reason="the extra [flare] is not installed")
    with Hospitals(Path(tmp_path_factory.mktemp("two")), count=2) as made:
        yield made


def heard(port: int, root: Path, certificate: tuple[Path, Path] | None) -> bool:
    """Whether a gRPC server answers someone with this certificate and key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(root)
    context.set_alpn_protocols(["h2"])
    if certificate:
        context.load_cert_chain(*certificate)
    try:
        with (
            socket.create_connection(("localhost", port), timeout=30) as line,
            context.wrap_socket(line, server_hostname="localhost") as safe,
        ):
            safe.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
            return bool(safe.recv(9))
    except (ssl.SSLError, ConnectionError):
        return False


def at(days: float) -> type[datetime]:
    """A clock that is off."""

    class Off(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(days=days)

    return Off


@pytest.mark.deploy
@pytest.mark.slow
def test_who_has_no_good_certificate_is_not_heard(
    two: Hospitals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, foreign = Authority.load(two.server.authority), Authority.make(tmp_path / "ca", "tests")
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def made(name: str, authority: Authority, clock: float = 0.0) -> tuple[Path, Path]:
        with monkeypatch.context() as patch:
            if clock:
                patch.setattr(authorities, "datetime", at(clock))
            certificate = authority.issue(key.public_key(), "site-0", "hospital", days=1)
        for ending, data in (
            (".crt", certificate.public_bytes(serialization.Encoding.PEM)),
            (".key", site_keys.pem(key)),
        ):
            (tmp_path / f"{name}{ending}").write_bytes(data)
        return tmp_path / f"{name}.crt", tmp_path / f"{name}.key"

    root = two.server.authority / "ca.crt"
    kit = two.homes["site-0"].kit / "startup"
    assert heard(two.port, root, (kit / "client.crt", kit / "client.key"))
    assert heard(two.port, root, made("fresh", ours))
    assert not heard(two.port, root, None)
    assert not heard(two.port, root, made("foreign", foreign))
    assert not heard(two.port, root, made("expired", ours, -10))
    assert not heard(two.port, root, made("early", ours, 10))


@pytest.mark.deploy
@pytest.mark.slow
def test_a_site_cannot_take_another_sites_name(two: Hospitals, tmp_path: Path) -> None:
    """A certificate of site-0 under the name of site-1, while site-1 is away."""
    two.command("site", "stop", home=two.homes["site-1"].path)
    until(lambda: "site-1" not in server_setup.status(two.server)["sites"], "site-1 to be away")
    shutil.copytree(two.homes["site-0"].kit, tmp_path / "kit", ignore=shutil.ignore_patterns("*.sock"))
    config = tmp_path / "kit" / "startup" / "fed_client.json"
    config.write_text(config.read_text().replace("site-0", "site-1"))
    process = flare_processes.start("site", tmp_path / "kit", tmp_path / "log", uid="site-1", org="hospital")
    try:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            assert "site-1" not in server_setup.status(two.server)["sites"]
            time.sleep(0.5)
    finally:
        process.kill()
        process.wait()
        flare_processes.end(tmp_path)
    two.start_site("site-1")
    two.together()


@pytest.mark.deploy
@pytest.mark.slow
def test_who_is_shut_out_is_out_and_may_be_let_in_again(two: Hospitals) -> None:
    two.command("server", "revoke", "site-1", home=two.server.path)
    until(lambda: "site-1" not in server_setup.status(two.server)["sites"], "site-1 to be out")
    time.sleep(10)
    assert "site-1" not in server_setup.status(two.server)["sites"]
    assert "revoked 20" in two.command("server", "sites", home=two.server.path)
    assert "not admitted" in two.command(
        "server",
        "run",
        str(write(two, order("fedavg", run="out", sites=("site-0", "site-1")))),
        home=two.server.path,
        code=2,
    )
    two.command("server", "reinstate", "site-1", home=two.server.path)
    two.together()


def write(two: Hospitals, an: Any) -> Path:
    path = two.root / f"{an.run}.json"
    path.write_text(an.to_json())
    return path
