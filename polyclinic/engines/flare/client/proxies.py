"""The way out of a hospital through an HTTP proxy, which passes an encrypted line on without reading it (CONNECT)."""

import os
import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from polyclinic.engines.flare.protocol.paths import SetupError, host

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")  # in gRPC's order


def check(proxy: str, scheme: str = "grpc") -> tuple[str, int]:
    """The host and port of ``proxy``.

    Raises:
        SetupError: Where it cannot be a proxy, or the project does not speak ``grpc``, which passes proxies.
    """
    try:
        parts = urlsplit(proxy)
        found = host(parts.hostname or ""), parts.port
    except ValueError as error:
        raise SetupError(
            f"a proxy is written like http://proxy.hospital.org:3128, not {proxy[:80]!r} ({error})"
        ) from None
    if parts.scheme != "http" or found[1] is None or parts.path.strip("/") or parts.username:
        raise SetupError(f"a proxy is written like http://proxy.hospital.org:3128, not {proxy[:80]!r}")
    if scheme != "grpc":
        raise SetupError(f"this project's server speaks {scheme}, and only grpc passes a proxy: ask the coordinator")
    return found[0], found[1]


def use(proxy: str) -> None:
    """Lets processes that are started from here go out by ``proxy``; where it is empty, as the environment says."""
    if proxy:
        os.environ["grpc_proxy"] = proxy  # noqa: SIM112  (gRPC reads this name in small letters alone)
        os.environ["no_grpc_proxy"] = "none.invalid"  # noqa: SIM112  (else it would look at no_proxy)


def of(settings: Mapping[str, Any]) -> str:
    """The proxy that a site's processes take: that of site.toml, or what gRPC finds in the environment."""
    if settings.get("proxy") or settings.get("scheme") != "grpc":
        return str(settings.get("proxy", ""))
    passed = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy") or ""  # noqa: SIM112
    if settings.get("host") in [name.strip() for name in passed.split(",")]:
        return ""
    return next((os.environ[name] for name in VARIABLES if os.environ.get(name)), "")


def connect(to: str, port: int, proxy: str, patience: float) -> socket.socket:
    """A line to ``to``, directly or through ``proxy``.

    Raises:
        OSError: Where there is none. The message says at which of the two it failed.
    """
    if not proxy:
        return socket.create_connection((to, port), timeout=patience)
    line = socket.create_connection(check(proxy), timeout=patience)
    try:
        line.sendall(f"CONNECT {to}:{port} HTTP/1.1\r\nHost: {to}:{port}\r\n\r\n".encode())
        said = b""
        while b"\r\n\r\n" not in said and len(said) < 2**14:
            piece = line.recv(4096)
            if not piece:
                break
            said += piece
        status = said.split(b"\r\n", 1)[0].decode(errors="replace")
        if status.split(" ")[1:2] != ["200"]:
            raise OSError(f"the proxy does not let it pass: {status[:80] or 'no answer'}")
    except BaseException:
        line.close()
        raise
    return line
