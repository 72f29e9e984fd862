"""Who may join: requests, join files, certificates; forged, foreign, expired, changed."""

import json
import random
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from polyclinic.engines.flare.client import site_setup
from polyclinic.engines.flare.pki import certificate_authority as authorities
from polyclinic.engines.flare.pki import site_keys
from polyclinic.engines.flare.pki.certificate_authority import Authority, BadFile
from polyclinic.engines.flare.protocol import flare_job
from polyclinic.engines.flare.protocol.paths import ServerFolder, SetupError, SiteFolder, name
from polyclinic.engines.flare.server import server_setup
from tests.support.local_deployment import order


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def server(place: Path) -> ServerFolder:
    home = ServerFolder(place / "server")
    server_setup.init(home, "demo", "localhost", 8002, "coordinator_org")
    return home


@pytest.fixture(scope="module")
def site(place: Path, server: ServerFolder) -> SiteFolder:
    home = SiteFolder(place / "site")
    site_setup.init(home, "site-1", "hospital")
    return home


@pytest.fixture(scope="module")
def table(server: ServerFolder, site: SiteFolder) -> dict[str, Any]:
    return server_setup.admit(server, site.path / "site-1.request")[1]


def write(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_site_joins_and_its_keys_never_leave(site: SiteFolder, table: dict[str, Any], tmp_path: Path) -> None:
    join = write(tmp_path / "join", table)
    found, fingerprint = site_setup.read_join(site, join)
    (tmp_path / "data").mkdir()
    site_setup.join(site, found, tmp_path / "data")
    key = (site.keys / "site.key").read_text()
    for sent in ((site.path / "site-1.request").read_text(), join.read_text()):
        assert "PRIVATE" not in sent
        assert key[100:160] not in sent
        assert (site.keys / "secure.key").read_text() not in sent
    assert len(fingerprint.replace(":", "")) == 64
    for path in (site.keys / "site.key", site.keys / "secure.key", site.kit / "startup" / "client.key", site.settings):
        assert path.stat().st_mode & 0o077 == 0


def test_an_order_without_a_deadline_gets_the_servers(server: ServerFolder, table: dict[str, Any]) -> None:
    """A site that never answers would hold up a run for ever."""
    assert table["site"] == "site-1"
    queued = server_setup.order(server, order(run="no-deadline", sites=["site-1"]))
    assert queued.deadline == server_setup.DEFAULTS["answer_within"]
    assert server_setup.order(server, order(run="own-deadline", sites=["site-1"], deadline=7.0)).deadline == 7.0
    server.settings.write_text(server.settings.read_text().replace("answer_within = 86400", "answer_within = 600"))
    assert server_setup.order(server, order(run="set-deadline", sites=["site-1"])).deadline == 600.0


def test_nobody_may_bring_code_run_commands_or_read_logs(site: SiteFolder, server: ServerFolder) -> None:
    for folder in (site.kit, server.kit):
        resources = json.loads((folder / "local" / "resources.json").read_text())
        assert resources["class_allow_list"] in ([flare_job.EXECUTOR], [flare_job.CONTROLLER])
        assert resources["class_list_enforcement_mode"] == "enforce"
        assert "stream" not in json.dumps(resources["components"]).lower()
        rights = json.loads((folder / "local" / "authorization.json").read_text())["permissions"]
        for role, right in rights.items():
            allowed = (
                {right} if isinstance(right, str) else {right["byoc"], right["shell_commands"], right["clone_job"]}
            )
            assert allowed == {"none"}, role
    config = json.loads((site.kit / "startup" / "fed_client.json").read_text())
    assert config["require_signed_jobs"] is True
    assert config["client"]["connection_security"] == "mtls"
    assert "/tmp" not in (server.kit / "local" / "resources.json").read_text().replace(str(server.path), "")


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("host", "evil.example.org", "changed after"),
        ("port", 9999, "changed after"),
        ("project", "other", "changed after"),
        ("site", "site-2", "is for 'site-2'"),
        ("port", 0, "port"),
        ("port", True, "'port'"),
        ("port", "8002", "'port'"),
        ("host", "a b", "host"),
        ("host", "-x", "host"),
        ("scheme", "ftp", "scheme"),
        ("signature", "AAAA", "changed after"),
        ("signature", "not base 64!", "changed after"),
        ("certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", "cannot be read"),
        ("authority", "", "cannot be read"),
        ("format", "polyclinic join 2", "this version reads"),
        ("format", None, "not a join file"),
        ("surprise", "x", "not known"),
    ],
)
def test_a_changed_join_file_is_refused(
    field: str, value: Any, why: str, site: SiteFolder, table: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(BadFile, match=why):
        site_setup.read_join(site, write(tmp_path / "join", {**table, field: value}))


def test_a_join_file_of_another_authority_is_refused(site: SiteFolder, table: dict[str, Any], tmp_path: Path) -> None:
    other = Authority.make(tmp_path / "ca", "demo")
    request = json.loads((site.path / "site-1.request").read_text())
    settings = {"project": "demo", "host": "localhost", "port": 8002, "scheme": "grpc"}
    foreign = authorities.join_file(other, request, settings)
    (tmp_path / "data").mkdir()
    site_setup.join(site, site_setup.read_join(site, write(tmp_path / "join", table))[0], tmp_path / "data")
    with pytest.raises(BadFile, match="another authority"):
        site_setup.read_join(site, write(tmp_path / "foreign", foreign))
    mixed = {**foreign, "authority": table["authority"]}
    with pytest.raises(BadFile, match="changed after"):
        site_setup.read_join(site, write(tmp_path / "mixed", mixed))


def test_a_join_file_for_other_keys_is_refused(server: ServerFolder, table: dict[str, Any], tmp_path: Path) -> None:
    other = SiteFolder(tmp_path / "other")
    site_setup.init(other, "site-1", "hospital")
    with pytest.raises(BadFile, match="not for this site's key"):
        site_setup.read_join(other, write(tmp_path / "join", table))


def test_certificates_begin_end_and_say_so(server: ServerFolder) -> None:
    authority = Authority.load(server.authority)
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    certificate = authority.issue(key.public_key(), "site-9", "hospital", days=40)
    now = datetime.now(timezone.utc)
    assert authorities.check_dates(certificate) == 39
    with pytest.raises(BadFile, match="renew"):
        authorities.check_dates(certificate, now + timedelta(days=41))
    with pytest.raises(BadFile, match="set the clock"):
        authorities.check_dates(certificate, now - timedelta(days=1))
    assert authorities.check_dates(certificate, now + timedelta(days=1)) == 38
    long = authority.issue(key.public_key(), "site-9", "hospital", days=10**5)
    assert long.not_valid_after_utc == authority.certificate.not_valid_after_utc


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"site": "site-2"}, "certificate request is for"),
        ({"organization": "elsewhere"}, "certificate request is for"),
        ({"site": "../x"}, "a site's name"),
        ({"csr": "x"}, "cannot be read"),
        ({"secure": "zz"}, "cannot be read"),
        ({"format": "polyclinic request 9"}, "this version reads"),
        ({"organization": "a b"}, "an organization"),
    ],
)
def test_a_bad_request_is_refused(
    changes: Any, why: str, server: ServerFolder, site: SiteFolder, tmp_path: Path
) -> None:
    request = json.loads((site.path / "site-1.request").read_text())
    with pytest.raises(BadFile, match=why):
        server_setup.admit(server, write(tmp_path / "request", {**request, **changes}))


def test_a_weak_key_is_refused() -> None:
    from cryptography.hazmat.primitives import hashes, serialization

    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    csr = x509.CertificateSigningRequestBuilder(authorities._subject("site-1", "hospital")).sign(weak, hashes.SHA256())
    table = {
        "format": authorities.REQUEST,
        "site": "site-1",
        "organization": "hospital",
        "polyclinic": "1",
        "secure": "00" * 32,
        "csr": csr.public_bytes(serialization.Encoding.PEM).decode(),
    }
    with pytest.raises(BadFile, match="2048"):
        authorities.check_request(table)


def test_one_name_is_one_organization_and_may_be_shut_out(
    server: ServerFolder, site: SiteFolder, tmp_path: Path
) -> None:
    impostor = SiteFolder(tmp_path / "impostor")
    site_setup.init(impostor, "site-1", "other_hospital")
    with pytest.raises(BadFile, match="a site of hospital already"):
        server_setup.admit(server, impostor.path / "site-1.request")
    server_setup.revoke(server, "site-1")
    assert json.loads((server.kit / "disabled_clients.json").read_text()) == {"disabled_clients": ["site-1"]}
    with pytest.raises(BadFile, match="revoked"):
        server_setup.admit(server, site.path / "site-1.request")
    server_setup.reinstate(server, "site-1")
    assert server_setup.admit(server, site.path / "site-1.request")[0] == "site-1"
    with pytest.raises(SetupError, match="no site called 'site-7'"):
        server_setup.revoke(server, "site-7")


def test_a_renewed_certificate_is_for_the_same_or_for_new_keys(
    server: ServerFolder, site: SiteFolder, tmp_path: Path
) -> None:
    before = (site.keys / "site.key").read_text()
    site_setup.init(site, "site-1", "hospital", renew=True)
    assert (site.keys / "site.key").read_text() == before
    join = write(tmp_path / "join", server_setup.admit(server, site.path / "site-1.request")[1])
    site_setup.read_join(site, join)
    secure = site_keys.load_secure(site.keys / "secure.key").public_key().public_bytes_raw().hex()
    site_setup.init(site, "site-1", "hospital", renew=True, new_keys=True)
    assert (site.keys / "site.key").read_text() == before  # in use until the certificate has come
    site_setup.read_join(site, join)
    table, _ = site_setup.read_join(site, write(join, server_setup.admit(server, site.path / "site-1.request")[1]))
    (tmp_path / "data").mkdir()
    site_setup.join(site, table, tmp_path / "data")
    assert (site.keys / "site.key").read_text() != before
    assert not site_keys.upcoming(site.keys).exists()
    assert (site.kit / "startup" / "client.key").read_text() == (site.keys / "site.key").read_text()
    assert table["secure"] != secure
    for public in (secure, table["secure"]):  # studies that were approved with the earlier key go on with it
        assert site_keys.for_sums(site.keys, public).public_key().public_bytes_raw().hex() == public
    with pytest.raises(SetupError, match="not in keys"):
        site_keys.for_sums(site.keys, "0" * 64)
    assert len(list(site.certificates.glob("*.crt"))) == 2


@pytest.mark.parametrize(
    "bad", ["", "A", "../../etc/passwd", "/etc", "a" * 64, "a\nb", "<script>", "-a", "a\x00", "ａ", "a_b"]
)
def test_names_cannot_be_paths_lines_or_markup(bad: str) -> None:
    with pytest.raises(SetupError):
        name(bad)


def test_mutated_files_are_refused_in_words(
    server: ServerFolder, site: SiteFolder, table: dict[str, Any], tmp_path: Path
) -> None:
    """Two seconds each of damaged requests and join files."""
    rng = random.Random(3)
    for source, read in (
        ((site.path / "site-1.request").read_text(), lambda path: server_setup.admit(server, path)),
        (json.dumps(table), lambda path: site_setup.read_join(site, path)),
    ):
        until = time.monotonic() + 2
        while time.monotonic() < until:
            characters = list(source)
            for _ in range(rng.randint(1, 4)):
                characters[rng.randrange(len(characters))] = chr(rng.randrange(1, 200))
            path = tmp_path / "file"
            path.write_text("".join(characters))
            try:
                read(path)
            except SetupError:
                pass
    big = tmp_path / "big"
    big.write_bytes(b"[" * 2**21)
    for read in (lambda path: server_setup.admit(server, path), lambda path: site_setup.read_join(site, path)):
        with pytest.raises(SetupError):
            read(big)


def test_init_tells_every_mistake_and_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(SetupError) as found:
        server_setup.init(ServerFolder(tmp_path / "s"), "A B", "x y", 0, "no spaces", "ftp")
    assert len(str(found.value).splitlines()) == 5
    assert not (tmp_path / "s").exists()
