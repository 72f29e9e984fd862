"""The application: its routes, and the stream of events that keeps the pages current.

| route | what | key |
|---|---|---|
| ``GET /`` and ``/static/...`` | the page, without any data | no |
| ``POST /api/login`` | one-time token to key | no |
| ``GET /api/events`` | server-sent events | yes |
| ``POST /api/act`` | one action | yes |
| ``POST /api/link`` | another one-time token | of the command line |
| ``GET /report/<ticket>`` | one file, once, in a sandbox | ticket |
| ``GET /metrics`` | numbers for Prometheus | yes, or the key for metrics |
| ``GET /healthz`` | ``{"ok": true}`` | no |

Nothing is read from disk while no page is open.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from polyclinic.console.guard import OPERATOR, REPORT_POLICY, VIEWER, Guard, Keys
from polyclinic.console.page import Page, Refused, Watcher, encoded, exposition
from polyclinic.errors import PolyclinicError

log = logging.getLogger(__name__)
STATIC = Path(__file__).with_name("static")
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
MAX_STREAMS = 32
ALIVE_SECONDS = 15.0
METRICS_SECONDS = 2.0


class Console:
    """One page with its keys and its watchers."""

    def __init__(self, page: Page, keys: Keys) -> None:
        self.page, self.keys = page, keys
        self.closing = asyncio.Event()
        self.streams = 0
        self._ticks = 0
        self._tick = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self._looked = 0.0
        files = sorted(path for path in STATIC.rglob("*") if path.suffix in TYPES)
        self._edition = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]

    @property
    def files(self) -> str:
        """The path below which the page's own files are served."""
        return f"/static/{self._edition}"

    def app(self, port: int) -> Guard:
        """Return the application behind its guard."""
        routes: list[tuple[str, Callable[[Request], Awaitable[Response]], str]] = [
            ("/", self._shell, "GET"),
            ("/static/{edition}/{name:path}", self._static, "GET"),
            ("/api/login", self._login, "POST"),
            ("/api/link", self._link, "POST"),
            ("/api/events", self._events, "GET"),
            ("/api/act", self._act, "POST"),
            ("/report/{ticket}", self._report, "GET"),
            ("/metrics", self._metrics, "GET"),
            ("/healthz", self._health, "GET"),
        ]
        app = Starlette(routes=[Route(at, to, methods=[how]) for at, to, how in routes])
        app.router.redirect_slashes = False
        return Guard(app, self.keys, port)

    async def _shell(self, request: Request) -> Response:
        text = (STATIC / "index.html").read_text(encoding="utf-8")
        return HTMLResponse(text.replace("@STATIC@", self.files).replace("@KIND@", self.page.kind))

    async def _static(self, request: Request) -> Response:
        """Return one of the page's own files. Its path names the edition of all files, so that a browser keeps it."""
        path = (STATIC / request.path_params["name"]).resolve()
        known = request.path_params["edition"] == self._edition and path.is_relative_to(STATIC)
        if not known or path.suffix not in TYPES or not path.is_file():
            return PlainTextResponse("not found", 404)
        headers = {"cache-control": "private, max-age=31536000, immutable"}
        return FileResponse(path, media_type=TYPES[path.suffix], headers=headers)

    async def _login(self, request: Request) -> Response:
        body = await _json(request)
        if self.keys.locked:
            return _error("too many wrong tokens: wait a minute", 429)
        made = self.keys.exchange(str(body.get("token", ""))[:200])
        if made is None:
            log.warning("a wrong, used or old token was refused")
            return _error("this link was used already, or is older than ten minutes", 403)
        key, role = made
        await self._in_thread(self.page.opened, role)
        return JSONResponse({"key": key, "role": role})

    async def _link(self, request: Request) -> Response:
        role = VIEWER if (await _json(request)).get("role") == VIEWER else OPERATOR
        return JSONResponse({"token": self.keys.token(role)})

    async def _events(self, request: Request) -> Response:
        if self.streams >= MAX_STREAMS:
            return _error(f"{MAX_STREAMS} pages are open already: close some", 429)
        hello = {"kind": self.page.kind, "title": self.page.title, "role": request.scope["polyclinic.role"]}
        watcher = await self._in_thread(self.page.watch, dict(request.query_params))
        return StreamingResponse(self._stream(hello, watcher), media_type="text/event-stream")

    async def _stream(self, hello: dict[str, Any], watcher: Watcher) -> AsyncIterator[bytes]:
        self.streams += 1
        try:
            first = await self._in_thread(watcher.updates)  # what is known is sent before it is read again
            yield b"".join(_event(name, data) for name, data in [("hello", hello), *first])
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._poll())
            sent, tick = time.monotonic(), -1
            while not self.closing.is_set():
                if events := await self._in_thread(watcher.updates):
                    sent = time.monotonic()
                    yield b"".join(_event(name, data) for name, data in events)
                elif time.monotonic() - sent > ALIVE_SECONDS:
                    sent = time.monotonic()
                    yield b": alive\n\n"
                async with self._tick:
                    while tick == self._ticks and not self.closing.is_set():
                        await self._tick.wait()
                    tick = self._ticks
        finally:
            self.streams -= 1

    async def _poll(self) -> None:
        """Read the page again and again while somebody watches."""
        while self.streams and not self.closing.is_set():
            try:
                await self._in_thread(self.page.look)
            except Exception:  # an unreadable file must not end the stream; the next reading may succeed
                log.exception("reading failed")
            self._looked = time.monotonic()
            await self.wake()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.closing.wait(), self.page.pace)
        await self.wake()

    def close(self) -> None:
        """End every stream, which would otherwise delay the end of the server."""
        self.closing.set()
        self._ending = asyncio.get_running_loop().create_task(self.wake())

    async def wake(self) -> None:
        """Make every stream look for updates."""
        async with self._tick:
            self._ticks += 1
            self._tick.notify_all()

    async def _act(self, request: Request) -> Response:
        body = await _json(request)
        name = str(body.get("act", ""))
        if request.scope["polyclinic.role"] != OPERATOR and name not in self.page.reads():
            return _error("this link may only look. `--link` without `--viewer` prints one that may act", 403)
        try:
            shown = await self._in_thread(self.page.act, name, body)
        except Refused as error:
            return _error(str(error), error.status)
        except (PolyclinicError, OSError) as error:
            return _error(str(error), 422)
        except Exception:
            log.exception("the action %r failed", name[:40])
            return _error("this failed because of a bug in Polyclinic; the terminal of the console shows it", 500)
        if (file := shown.pop("file", None)) is not None:
            shown["ticket"] = self.keys.ticket(file)
        await self.wake()
        return Response(encoded(shown), media_type="application/json")

    async def _report(self, request: Request) -> Response:
        file = self.keys.redeem(request.path_params["ticket"])
        if file is None or not Path(file).is_file():
            return PlainTextResponse("This link was used already. Open the file from the page again.", 403)
        if Path(file).suffix == ".html":
            return FileResponse(file, media_type="text/html", headers={"content-security-policy": REPORT_POLICY})
        return FileResponse(file, filename=Path(file).name)

    async def _metrics(self, request: Request) -> Response:
        if time.monotonic() - self._looked > METRICS_SECONDS:
            await self._in_thread(self.page.look)
            self._looked = time.monotonic()
        text = exposition(await self._in_thread(lambda: list(self.page.metrics())))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"ok": True})

    async def _in_thread(self, do: Callable[..., Any], *arguments: Any) -> Any:
        """Return ``do(*arguments)``, called in a thread while no other thread uses the page."""

        def locked() -> Any:
            with self.page.lock:
                return do(*arguments)

        return await asyncio.to_thread(locked)


async def _json(request: Request) -> dict[str, Any]:
    """Return the body of a request; an empty table if it is none, or too long."""
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError, ClientDisconnect):
        return {}
    return body if isinstance(body, dict) else {}


def _error(message: str, status: int) -> Response:
    return JSONResponse({"error": message}, status)


def _event(name: str, data: Any) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + encoded(data) + b"\n\n"
