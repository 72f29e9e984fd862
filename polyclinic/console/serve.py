"""Serving a page on the loopback interface, and one-time links to it.

While a console runs, a private file in the account's runtime folder names its port and a key, with which ``--link`` of
the same account asks it for another link.
"""

import asyncio
import hashlib
import json
import logging
import os
import secrets
import socket
import threading
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import platformdirs

from polyclinic.console.page import Page
from polyclinic.core.atomic import write_private
from polyclinic.errors import ConfigError, MissingDependency

log = logging.getLogger(__name__)
HOST = "127.0.0.1"
Say = Callable[[str], None]


def serve(
    page: Page,
    folder: Path,
    port: int,
    say: Say,
    *,
    open_browser: bool = False,
    viewer: bool = False,
    metrics_key: Path | None = None,
) -> None:
    """Serve ``page`` until SIGINT or SIGTERM. What it shows continues without it.

    Args:
        page: The page.
        folder: The folder that it shows.
        port: The port on the loopback interface; 0 for any free one.
        say: Prints a line.
        open_browser: Whether to open the link in this machine's browser.
        viewer: Whether the first link may only look.
        metrics_key: File with the key for ``/metrics``, which is created if it does not exist.

    Raises:
        ConfigError: If the port is in use, or the key's file cannot be used.
    """
    require()
    import uvicorn

    from polyclinic.console.app import Console
    from polyclinic.console.guard import OPERATOR, VIEWER, Keys

    os.umask(0o077)
    keys = Keys(_metrics_key(metrics_key) if metrics_key else "")
    with _listening(port) as line:
        actual = line.getsockname()[1]

        async def main() -> None:
            console = Console(page, keys)
            config = uvicorn.Config(
                console.app(actual),
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=2,
                limit_concurrency=200,
            )
            server = uvicorn.Server(config)
            loop = asyncio.get_running_loop()

            def end(sig: int, frame: FrameType | None) -> None:
                server.should_exit = True
                loop.call_soon_threadsafe(console.close)

            server.handle_exit = end  # type: ignore[method-assign]  # uvicorn offers no other hook at its end
            link = f"http://{HOST}:{actual}/#{keys.token(VIEWER if viewer else OPERATOR)}"
            say(f"open     {link}")
            say(
                "         valid once, for ten minutes; --link prints another. Ctrl-C ends the console and nothing else."
            )
            if open_browser:
                threading.Thread(target=_open, args=(link,), daemon=True).start()
            await server.serve(sockets=[line])

        with _announced(page.kind, folder, actual, keys.link), suppress(KeyboardInterrupt):
            try:
                asyncio.run(main())
            finally:
                page.close()


def _open(link: str) -> None:
    """Open ``link`` in this machine's browser, by a private file, since other accounts can read its command line."""
    file = _folder() / f"open-{secrets.token_hex(8)}.html"
    try:
        write_private(file, f'<meta http-equiv="refresh" content="0; url={link}">', durable=False)
        webbrowser.open(file.as_uri())
        time.sleep(30)
    finally:
        file.unlink(missing_ok=True)


def new_link(kind: str, folder: Path, viewer: bool) -> str:
    """Return another one-time link of the console that shows ``folder``.

    Raises:
        ConfigError: If no console of this account shows it.
    """
    file = _place(kind, folder)
    missing = ConfigError(f"no console of this account shows {folder.resolve()}: start one, without --link")
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        headers = {"content-type": "application/json", "x-polyclinic-key": known["key"]}
        body = json.dumps({"role": "viewer" if viewer else "operator"}).encode()
        address = f"http://{HOST}:{int(known['port'])}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(f"{address}/api/link", body, headers), timeout=10) as answer:
            return f"{address}/#{json.loads(answer.read(2**16))['token']}"
    except (OSError, ValueError, KeyError, TypeError, urllib.error.URLError):
        raise missing from None


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    """Listen on the loopback interface.

    Raises:
        ConfigError: If the port is in use.
    """
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            line.bind((HOST, port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"--port {port}: {why}. Give another port, or 0 for any free one") from None
        line.listen(128)  # before the link is printed, so that a browser that opens it at once is answered
        yield line


@contextmanager
def _announced(kind: str, folder: Path, port: int, key: str) -> Iterator[None]:
    """Keep the file that ``new_link`` reads."""
    file = _place(kind, folder)
    content = json.dumps({"port": port, "key": key, "pid": os.getpid()})
    try:
        write_private(file, content, durable=False)
        yield
    finally:
        with suppress(OSError, ValueError, KeyError):
            if json.loads(file.read_text(encoding="utf-8"))["pid"] == os.getpid():
                file.unlink()


def _place(kind: str, folder: Path) -> Path:
    """Return the path of the file of the console of ``folder``."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return _folder() / f"console-{kind}-{name}.json"


def _folder() -> Path:
    """Return this account's folder for files of running consoles."""
    given = os.environ.get("XDG_RUNTIME_DIR")
    place = Path(given) / "polyclinic" if given else platformdirs.user_cache_path("polyclinic") / "runtime"
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    return place


def _metrics_key(file: Path) -> str:
    """Return the key in ``file``; create the file if it does not exist.

    Raises:
        ConfigError: If it is too short, or other accounts can read it.
    """
    if not file.exists():
        write_private(file, secrets.token_urlsafe(32) + "\n")
    key, mode = file.read_text(encoding="utf-8").strip(), file.stat().st_mode
    if len(key) < 20:
        raise ConfigError(f"{file}: a key for metrics has at least 20 characters. Delete the file to create a new one")
    if mode & 0o007:
        raise ConfigError(f"{file}: every account can read it: chmod 600 {file}")
    return key


def require() -> None:
    """Check that the extra ``console`` is installed.

    Raises:
        MissingDependency: If it is not.
    """
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise MissingDependency("console", f"the console needs {' and '.join(missing)}")
