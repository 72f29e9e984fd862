"""Diagnosis of a site: one line for each check, with what to do if it fails."""

import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from polyclinic import __version__
from polyclinic.engines import notifications
from polyclinic.engines.flare import flare_processes
from polyclinic.engines.flare.client import proxies, site_setup
from polyclinic.engines.flare.pki import certificate_authority as authorities
from polyclinic.engines.flare.pki import site_keys
from polyclinic.engines.flare.protocol.paths import SetupError, SiteFolder, read_small
from polyclinic.errors import ConfigError

PATIENCE = 5.0
Finding = tuple[str, bool, str]


def examine(home: SiteFolder) -> list[Finding]:
    """Return for each check its name, whether it passed, and the result or what to do."""
    try:
        given = site_setup.settings(home, joined=True)
    except SetupError as error:
        return [("folder", False, str(error))]
    return list(_examine(home, given))


def probe(home: SiteFolder, handshake: bool) -> list[Finding]:
    """Return the quick checks of the connection: the port and, with ``handshake``, the server's certificate."""
    try:
        given = site_setup.settings(home, joined=True)
    except SetupError as error:
        return [("folder", False, str(error))]
    proxy = proxies.of(given)
    found = [_try("port", lambda: _connect(given["host"], given["port"], proxy))]
    if handshake and found[0][1]:
        found.append(_try("server", lambda: _handshake(home, given, proxy)))
    return found


def _examine(home: SiteFolder, given: dict[str, Any]) -> Iterator[Finding]:
    proxy = proxies.of(given)
    yield _try("clock", lambda: _clock(home))
    yield _try("certificate", lambda: _certificate(home))
    where = proxies.check(proxy) if proxy else (given["host"], given["port"])
    name = _try("proxy" if proxy else "name", lambda: _resolve(*where))
    yield name
    if name[1]:
        port = _try("port", lambda: _connect(given["host"], given["port"], proxy))
        yield port
        if port[1]:
            yield _try("server", lambda: _handshake(home, given, proxy))
    yield _try("data", lambda: _data(Path(given["data"])))
    yield _try("policy", lambda: _policy(home))
    yield _try("disk", lambda: _disk(home.path))
    if (home.path / notifications.FILE).exists():
        yield _try("notify", lambda: _notify(home))
    yield _try("sockets", lambda: _sockets(home))
    yield _try("version", _version)
    running = len(flare_processes.working_in(home.kit))
    yield (
        "processes",
        site_setup.is_up(home),
        f"{running} of FLARE run" if site_setup.is_up(home) else "not running: polyclinic site start",
    )


def _try(what: str, look: Callable[[], str]) -> Finding:
    try:
        return what, True, look()
    except Exception as error:  # a failed check must not end the diagnosis
        return what, False, f"{error}" if isinstance(error, SetupError) else f"{type(error).__name__}: {error}"


def _certificate(home: SiteFolder) -> str:
    certificate = authorities.load_certificate(read_small(home.kit / "startup" / "client.crt"))
    days = authorities.check_dates(certificate)
    if certificate.public_key() != site_keys.load(home.keys / "site.key").public_key():
        raise SetupError(
            "it does not match the keys in keys/: send the new request, and join with the join file in reply"
        )
    if days < authorities.WARN_DAYS:
        raise SetupError(f"ends in {days} days: polyclinic site init --renew, and send the request to the coordinator")
    pending = "; new keys have no certificate yet: join with the coordinator's join file"
    return f"valid for {days} days{pending if site_keys.upcoming(home.keys).exists() else ''}"


def _clock(home: SiteFolder) -> str:
    """Check that the clock is not before anything this site has written and not outside the authority's validity."""
    now = time.time()
    text = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    root = authorities.load_certificate(read_small(home.kit / "startup" / "rootCA.pem"))
    written = max(path.stat().st_mtime for path in (home.settings, home.journal) if path.exists())
    if now < written - 300 or now < root.not_valid_before_utc.timestamp() - 300:
        raise SetupError(f"it says {text}, which is before the last write of this site: set the clock (chrony, ntpd)")
    if now > root.not_valid_after_utc.timestamp():
        raise SetupError(
            f"it says {text}, and the project's certificate expired on {root.not_valid_after_utc:%Y-%m-%d}: set "
            "the clock, or join a new project"
        )
    return f"says {text}; compare it with another"


def _resolve(host: str, port: int) -> str:
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except socket.gaierror as error:
        raise SetupError(
            f"{host} cannot be found ({error}): is the name right, and does this machine have a name server?"
        ) from None
    return f"{host} is {', '.join(sorted(addresses))}"


def _connect(host: str, port: int, proxy: str) -> str:
    try:
        with proxies.connect(host, port, proxy, PATIENCE):
            return f"{host}:{port} answers{f' through {proxy}' if proxy else ''}"
    except OSError as error:
        raise SetupError(
            f"{host}:{port} does not answer ({error}): is the server up, and may this machine connect out to that port"
            + (f" through {proxy}?" if proxy else "? Behind a proxy: `polyclinic site join FILE ... --proxy URL`")
        ) from None


def _handshake(home: SiteFolder, given: dict[str, Any], proxy: str) -> str:
    startup = home.kit / "startup"
    context = ssl.create_default_context(cafile=str(startup / "rootCA.pem"))
    context.load_cert_chain(startup / "client.crt", startup / "client.key")
    try:
        with (
            proxies.connect(given["host"], given["port"], proxy, PATIENCE) as line,
            context.wrap_socket(line, server_hostname=given["host"]) as safe,
        ):
            return f"has a certificate of this project's authority ({safe.version()})"
    except ssl.SSLCertVerificationError as error:
        raise SetupError(
            f"its certificate is not from this project's authority, or a clock is wrong ({error.verify_message})"
        ) from None
    except (ssl.SSLError, OSError) as error:
        raise SetupError(f"no secure connection ({error}): does a firewall or proxy intercept TLS?") from None


def _data(folder: Path) -> str:
    from polyclinic.engines.flare.client.site_data import ROLES, read

    if not folder.is_dir():
        raise SetupError(f"{folder} does not exist: is the disk mounted?")
    roles = [role for role in ROLES if (folder / f"{role}.npz").is_file()]
    if not roles and not (folder / "data.toml").is_file():
        raise SetupError(f"{folder} contains neither train.npz nor data.toml; see docs/how-to/deployment.md")
    data_by_role = read(folder, {}).roles
    if not os.access(folder, os.R_OK | os.X_OK):
        raise SetupError(f"{folder} cannot be read by this user")
    return "; ".join(f"{role}: {len(set(data.patients))} patients" for role, data in data_by_role.items())


def _version() -> str:
    """Return the installed version; the server compares the code hash when a study begins."""
    from polyclinic.engines.flare.protocol.run_request import code_hash

    return f"polyclinic {__version__}, code {code_hash()[:12]}; the server must have the same code"


def _policy(home: SiteFolder) -> str:
    from polyclinic.engines.policy import site_policy as policies

    policies.read(home.policy)
    return f"{home.policy} is valid"


def _notify(home: SiteFolder) -> str:
    try:
        ways = notifications.read(home.path).ways
    except ConfigError as error:
        raise SetupError(str(error)) from None
    names = ", ".join(type(way).__name__.lower() for way in ways) or "nothing"
    return f"{notifications.FILE} is valid ({names}); polyclinic site notify sends a test"


def _sockets(home: SiteFolder) -> str:
    """Check that no process of this site listens on a TCP port, which any account of this machine could reach."""
    if ports := flare_processes.listening(home.kit):
        listed = ", ".join(f"port {port} (process {pid})" for port, pid in sorted(ports.items()))
        raise SetupError(
            f"its processes listen on {listed}, which other accounts on this machine can reach: polyclinic site "
            "stop, and start"
        )
    folder = home.kit / "sockets"
    if folder.exists() and folder.stat().st_mode & 0o077:
        raise SetupError(f"{folder} is open to other accounts: chmod 700 {folder}")
    return "no port is open; its processes communicate over a socket that only this account can access"


def _disk(folder: Path) -> str:
    import shutil

    free = shutil.disk_usage(folder).free
    if free < 2**30:
        raise SetupError(f"{free / 2**20:.0f} MB are free at {folder}: free some space")
    return f"{free / 2**30:.0f} GB are free"
