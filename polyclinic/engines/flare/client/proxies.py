"""Connection to the server through an HTTP proxy, which forwards the encrypted stream without reading it (CONNECT)."""

import os
import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from polyclinic.engines.flare.protocol.paths import SetupError, host

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")  # in gRPC's order


def check(proxy: str, scheme: str = "grpc") -> tuple[str, int]:
    """Return the host and port of ``proxy``.

    Raises:
        SetupError: If it is not a valid proxy URL, or the project's scheme is not ``grpc``, the only one that supports
            proxies.
    """
    try:
        parts = urlsplit(proxy)
        address = host(parts.hostname or ""), parts.port
    except ValueError as error:
        raise SetupError(
            f"a proxy is written like http://proxy.hospital.org:3128, not {proxy[:80]!r} ({error})"
        ) from None
    if parts.scheme != "http" or address[1] is None or parts.path.strip("/") or parts.username:
        raise SetupError(f"a proxy is written like http://proxy.hospital.org:3128, not {proxy[:80]!r}")
    if scheme != "grpc":
        raise SetupError(f"this project's server uses {scheme}, and only grpc passes a proxy: ask the coordinator")
    return address[0], address[1]


def use(proxy: str) -> None:
    """Make processes started from here use ``proxy``; if it is empty, the environment decides."""
    if proxy:
        os.environ["grpc_proxy"] = proxy  # noqa: SIM112  (gRPC reads this name in lowercase only)
        os.environ["no_grpc_proxy"] = "none.invalid"  # noqa: SIM112  (otherwise it would read no_proxy)


def of(settings: Mapping[str, Any]) -> str:
    """Return the proxy that a site's processes use: that of site.toml, or the one gRPC finds in the environment."""
    if settings.get("proxy") or settings.get("scheme") != "grpc":
        return str(settings.get("proxy", ""))
    passed = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy") or ""  # noqa: SIM112
    if settings.get("host") in [name.strip() for name in passed.split(",")]:
        return ""
    return next((os.environ[name] for name in VARIABLES if os.environ.get(name)), "")


def connect(to: str, port: int, proxy: str, patience: float) -> socket.socket:
    """Open a connection to ``to``, directly or through ``proxy``.

    Raises:
        OSError: If it fails. The message says whether at the proxy or the server.
    """
    if not proxy:
        return socket.create_connection((to, port), timeout=patience)
    line = socket.create_connection(check(proxy), timeout=patience)
    try:
        line.sendall(f"CONNECT {to}:{port} HTTP/1.1\r\nHost: {to}:{port}\r\n\r\n".encode())
        response = b""
        while b"\r\n\r\n" not in response and len(response) < 2**14:
            piece = line.recv(4096)
            if not piece:
                break
            response += piece
        status = response.split(b"\r\n", 1)[0].decode(errors="replace")
        if status.split(" ")[1:2] != ["200"]:
            raise OSError(f"the proxy refused the connection: {status[:80] or 'no answer'}")
    except BaseException:
        line.close()
        raise
    return line
