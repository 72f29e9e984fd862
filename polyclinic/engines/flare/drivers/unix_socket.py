"""FLARE transport over a Unix domain socket, for the connections between the processes of one organization.

FLARE connects job processes to their parent process over loopback TCP in plain text and without authentication, so that
any local account could register as a cell. A socket in a folder of mode 0700 is accessible only to the account that
owns it; the listener also compares the peer's user id, as the kernel reports it. FLARE finds this module by
``comm_driver_path`` (``provisioning.write_settings``) and registers the class ``UnixSocketDriver``.

``comm_config.json``: ``{"internal": {"scheme": "unix", "resources": {"folder": "/absolute/folder"}}}``.
A URL is ``unix://0/absolute/folder/name``: FLARE requires a host in it, and 0 is a placeholder.
"""

import os
import socket
import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any
from urllib.parse import quote, unquote

from nvflare.fuel.f3.comm_error import CommError
from nvflare.fuel.f3.drivers.base_driver import BaseDriver
from nvflare.fuel.f3.drivers.driver_params import DriverCap, DriverParams
from nvflare.fuel.f3.drivers.socket_conn import ConnectionHandler, SocketConnection

SCHEME = "unix"
FOLDER = "folder"
_PEER = struct.Struct("3i")


class UnixSocketDriver(BaseDriver):  # type: ignore[misc]
    """Driver that listens on, or connects to, a socket in a private folder."""

    def __init__(self) -> None:
        super().__init__()
        self.server: _Server | None = None

    @staticmethod
    def supported_transports() -> list[str]:
        """Return the scheme of the URLs."""
        return [SCHEME]

    @staticmethod
    def capabilities() -> dict[str, Any]:
        """Return the capabilities of FLARE's TCP driver without TLS, which a socket of one account does not need."""
        return {DriverCap.SEND_HEARTBEAT.value: True, DriverCap.SUPPORT_SSL.value: False}

    @staticmethod
    def get_urls(scheme: str, resources: dict[str, Any]) -> tuple[str, str]:
        """Return a new URL to connect to and to listen on.

        Raises:
            CommError: If the folder is missing or accessible to other accounts.
        """
        folder = Path(str(resources.get(FOLDER, "")))
        _check_folder(folder)
        url = f"{scheme}://0{quote(str(folder / f'{uuid.uuid4().hex}.sock'))}"
        return url, url

    def listen(self, connector: Any) -> None:
        """Serve until ``shutdown``."""
        self.connector = connector
        path = Path(unquote(connector.params[DriverParams.PATH.value]))
        _check_folder(path.parent)
        self.server = _Server(self, connector, path)
        try:
            self.server.serve_forever()
        finally:
            path.unlink(missing_ok=True)

    def connect(self, connector: Any) -> None:
        """Connect, and read until the connection is closed."""
        self.connector = connector
        path = Path(unquote(connector.params[DriverParams.PATH.value]))
        _check_folder(path.parent)
        line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with _short(path) as short:
            line.connect(short)
        connection = SocketConnection(line, connector, False)
        self.add_connection(connection)
        connection.read_loop()
        self.close_connection(connection)

    def shutdown(self) -> None:
        """Close every connection and stop serving."""
        self.close_all()
        if self.server:
            self.server.shutdown()
            self.server.server_close()


class _Server(ThreadingMixIn, UnixStreamServer):
    """Listener that accepts connections of this user's processes."""

    daemon_threads = True
    ssl_context = None

    def __init__(self, driver: UnixSocketDriver, connector: Any, path: Path) -> None:
        self.driver, self.connector, self.path = driver, connector, path
        super().__init__(str(path), ConnectionHandler)

    def server_bind(self) -> None:
        """Bind to a socket of mode 0600 at a path of any length."""
        with _short(self.path) as short:
            self.socket.bind(short)
        self.path.chmod(0o600)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether the process at the other end belongs to this user."""
        return peer_user(request) == os.geteuid()


def peer_user(line: socket.socket) -> int:
    """Return the user id of the process at the other end of ``line``, as the kernel reports it."""
    _, user, _ = _PEER.unpack(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return int(user)


def _check_folder(folder: Path) -> None:
    try:
        status = folder.stat()
    except OSError as error:
        raise CommError(CommError.BAD_CONFIG, f"the folder for sockets: {error}") from None
    if not folder.is_absolute() or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise CommError(CommError.BAD_CONFIG, f"{folder} must belong to this user alone, with mode 0700")


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """Yield an alias of at most 107 bytes, the kernel's limit for a socket address, for the socket at ``path``."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
