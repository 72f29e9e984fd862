"""Access to the console: loopback host names, keys in a header, no cookies, and headers that let the page load nothing
else.

A cookie would be sent by the browser without the page's doing, and to every port of this machine. The key is kept in
the page's local storage, which belongs to one port, and is sent in a header. Requests of other pages therefore carry
no key, so that cross-site request forgery is impossible; ``Origin`` and ``Sec-Fetch-Site`` are checked as well. A page
that made its own host name point to this machine (DNS rebinding) is refused by its ``Host``.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPERATOR, VIEWER = "operator", "viewer"
TOKEN_SECONDS, TICKET_SECONDS, IDLE_SECONDS = 600.0, 60.0, 12 * 3600.0
MAX_BODY = 2**16
MAX_KEYS = 64
GUESSES_PER_MINUTE = 10

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types "
    "'none'"
)
# A report may come from another machine: it is shown in an origin of its own, runs no script and loads nothing.
REPORT_POLICY = (
    "sandbox allow-popups; default-src 'none'; img-src data:; style-src 'unsafe-inline'; font-src data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass
class Session:
    """A browser that has exchanged a one-time token for a key.

    Attributes:
        role: ``operator``, or ``viewer``, who may not change anything.
        used: Time of its last request.
    """

    role: str
    used: float


class Keys:
    """One-time tokens, the keys for which they are exchanged, and one-time tickets for single files.

    Only hashes are kept, so that a look-up takes the same time for every wrong guess. All of them end with the process.
    """

    def __init__(self, metrics: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        """Begin without any key.

        Args:
            metrics: Key for ``/metrics`` only; empty for none.
            clock: Returns the time in seconds.
        """
        self.link = secrets.token_urlsafe(32)
        """Key with which another command of the same account asks for a link."""
        self._metrics, self._clock = metrics, clock
        self._tokens: dict[bytes, tuple[float, str]] = {}
        self._sessions: dict[bytes, Session] = {}
        self._tickets: dict[bytes, tuple[float, Any]] = {}
        self._wrong: list[float] = []

    def token(self, role: str = OPERATOR) -> str:
        """Return a new token, valid once and for ``TOKEN_SECONDS``."""
        made, now = secrets.token_urlsafe(24), self._clock()
        self._tokens = {token: known for token, known in self._tokens.items() if known[0] > now}
        self._tokens[_hash(made)] = now + TOKEN_SECONDS, role
        return made

    def exchange(self, token: str) -> tuple[str, str] | None:
        """Return a key and its role for a token, or None if the token is wrong, used or old."""
        until, role = self._tokens.pop(_hash(token), (0.0, ""))
        now = self._clock()
        if until <= now:
            self._wrong.append(now)
            return None
        key = secrets.token_urlsafe(32)
        if len(self._sessions) >= MAX_KEYS:
            del self._sessions[min(self._sessions, key=lambda known: self._sessions[known].used)]
        self._sessions[_hash(key)] = Session(role, now)
        return key, role

    @property
    def locked(self) -> bool:
        """Whether no token is accepted, because too many wrong ones were tried within a minute."""
        now = self._clock()
        self._wrong = [then for then in self._wrong if then > now - 60]
        return len(self._wrong) >= GUESSES_PER_MINUTE

    def session(self, key: str) -> Session | None:
        """Return the session of ``key`` and note its use, or None if there is none."""
        known, now = self._sessions.get(_hash(key)), self._clock()
        if known is None or known.used < now - IDLE_SECONDS:
            return None
        known.used = now
        return known

    def may_measure(self, authorization: str) -> bool:
        """Return whether the header ``Authorization: Bearer KEY`` carries the key for ``/metrics``."""
        scheme, _, key = authorization.partition(" ")
        right = scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._metrics.encode())
        return bool(self._metrics) and right

    def may_link(self, key: str) -> bool:
        """Return whether ``key`` may ask for links."""
        return hmac.compare_digest(key.encode(), self.link.encode())

    def ticket(self, what: Any) -> str:
        """Return a ticket for ``what``, valid once and for ``TICKET_SECONDS``."""
        made, now = secrets.token_urlsafe(24), self._clock()
        self._tickets = {ticket: known for ticket, known in self._tickets.items() if known[0] > now}
        self._tickets[_hash(made)] = now + TICKET_SECONDS, what
        return made

    def redeem(self, ticket: str) -> Any:
        """Return what a ticket is for, or None if it is wrong, used or old."""
        until, what = self._tickets.pop(_hash(ticket), (0.0, None))
        return what if until > self._clock() else None


class Guard:
    """Outermost layer of the application: refuses requests, and adds the headers to every response."""

    def __init__(self, app: App, keys: Keys, port: int) -> None:
        self.app, self.keys, self.port = app, keys, port
        self.hosts = frozenset(f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]"))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                more = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in given]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        if refusal := self._refusal(scope):
            status, why = refusal
            await JSONResponse({"error": why}, status)(scope, receive, with_headers)
            return
        await self.app(scope, _bounded(receive), with_headers)

    def _refusal(self, scope: Message) -> tuple[int, str] | None:
        """Return the status and the reason of a refusal; None if the request may pass."""
        method, path = scope["method"], scope["path"]
        given = [(k.decode("latin1").lower(), v.decode("latin1")) for k, v in scope["headers"]]
        headers = dict(given)
        if sum(name == "host" for name, _ in given) != 1 or headers["host"].lower() not in self.hosts:
            return 421, (
                f"this console is served as http://127.0.0.1:{self.port} only. From another machine, forward the same "
                f"port: ssh -L {self.port}:127.0.0.1:{self.port} MACHINE"
            )
        if method not in ("GET", "HEAD", "POST"):
            return 405, "only GET, HEAD and POST are served"
        if headers.get("origin", f"http://{headers['host']}") != f"http://{headers['host']}":
            return 403, "a page of another origin may not ask"
        opens = path == "/" and method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not opens:
            return 403, "another page may not ask"
        if method == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                return 415, "a request has the content type application/json"
            if not headers.get("content-length", "0").isdecimal() or int(headers.get("content-length", "0")) > MAX_BODY:
                return 413, f"a request has at most {MAX_BODY} bytes"
        return self._unauthorized(scope, path, headers)

    def _unauthorized(self, scope: Message, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Return the refusal of a request without its key, and note the session of one with a key."""
        key = headers.get("x-polyclinic-key", "")
        if path == "/api/link":
            return None if self.keys.may_link(key) else (401, "this key cannot ask for links")
        if path == "/metrics" and self.keys.may_measure(headers.get("authorization", "")):
            return None
        if (path.startswith("/api/") and path != "/api/login") or path == "/metrics":
            session = self.keys.session(key)
            if session is None:
                return 401, "open the link that the terminal printed"
            scope["polyclinic.role"] = session.role
        return None


def _bounded(receive: Receive) -> Receive:
    """Return ``receive`` that ends a request whose body is longer than it may be."""
    total = 0

    async def bounded() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        return {"type": "http.disconnect"} if total > MAX_BODY else message

    return bounded


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
