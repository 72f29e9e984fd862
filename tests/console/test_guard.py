"""What reaches the console, and what does not: other hosts, other pages, other methods, wrong keys, large bodies."""

import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra [console] is not installed")

from polyclinic.console.app import Console
from polyclinic.console.guard import IDLE_SECONDS, MAX_BODY, POLICY, TICKET_SECONDS, TOKEN_SECONDS, VIEWER, Keys
from polyclinic.console.page import Changed, Events, Refused, Sample, exposition
from tests.support.console import HOST, PORT, request


class Little:
    """A page with one action that reads and one that changes something."""

    kind, title, pace = "runs", "Test", 1.0

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.done: list[str] = []

    def look(self) -> bool:
        return False

    def watch(self, query: Mapping[str, str]) -> Any:
        return self

    def updates(self) -> Events:
        return []

    def reads(self) -> frozenset[str]:
        return frozenset({"read"})

    def act(self, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        self.done.append(name)
        match name:
            case "changed":
                raise Changed("it changed")
            case "bug":
                raise ZeroDivisionError("secret")
            case "read" | "write":
                return {"said": name}
            case "file":
                return {"file": body["path"]}
        raise Refused("no", 404)

    def opened(self, role: str) -> None:
        self.done.append(f"opened {role}")

    def metrics(self) -> Iterator[Sample]:
        yield Sample("things", 3, (("state", 'a "b"\n\\c'),), help="Things.")

    def close(self) -> None:
        pass


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def page() -> Little:
    return Little()


@pytest.fixture
def keys(clock: Clock) -> Keys:
    return Keys("m" * 32, clock)


@pytest.fixture
def app(page: Little, keys: Keys) -> Any:
    return Console(page, keys).app(PORT)


def key(keys: Keys, role: str = "operator") -> dict[str, str]:
    made = keys.exchange(keys.token(role))
    assert made
    return {"x-polyclinic-key": made[0]}


@pytest.mark.parametrize("host", [HOST, f"localhost:{PORT}", f"[::1]:{PORT}", f"LOCALHOST:{PORT}"])
def test_loopback_names_with_the_port_are_served(app: Any, host: str) -> None:
    assert request(app, "GET", "/healthz", host=host).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.org", f"evil.org:{PORT}", "127.0.0.1", "127.0.0.1:1", f"127.0.0.1.evil.org:{PORT}", f"0.0.0.0:{PORT}", ""],
)
def test_a_host_name_that_was_made_to_point_here_is_refused(app: Any, host: str) -> None:
    """DNS rebinding: the page of another site calls this machine by its own name."""
    answer = request(app, "GET", "/", host=host)
    assert answer.status == 421
    assert "ssh -L" in answer.json["error"]


def test_a_request_without_a_host_or_with_two_is_refused(app: Any) -> None:
    assert request(app, "GET", "/", headers={"host": None}).status == 421  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/api/act", {"origin": "http://evil.org"}, 403),
        ("POST", "/api/act", {"origin": "null"}, 403),
        ("POST", "/api/act", {"origin": f"http://127.0.0.1:{PORT + 1}"}, 403),
        ("POST", "/api/act", {"origin": f"https://{HOST}"}, 403),
        ("POST", "/api/act", {"sec-fetch-site": "cross-site"}, 403),
        ("POST", "/api/act", {"sec-fetch-site": "same-site"}, 403),
        ("GET", "/api/events", {"sec-fetch-site": "cross-site"}, 403),
        ("GET", "/static/x/main.js", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ("POST", "/api/act", {"content-type": "text/plain"}, 415),
        ("POST", "/api/act", {"content-type": "application/x-www-form-urlencoded"}, 415),
        ("POST", "/api/act", {"content-type": "multipart/form-data; boundary=application/json"}, 415),
        ("POST", "/api/act", {"content-length": str(MAX_BODY + 1)}, 413),
        ("POST", "/api/act", {"content-length": "-1"}, 413),
        ("PUT", "/api/act", {}, 405),
        ("DELETE", "/", {}, 405),
        ("OPTIONS", "/api/act", {"access-control-request-method": "POST"}, 405),
        ("POST", "/api/act", {"x-polyclinic-key": ""}, 401),
        ("POST", "/api/act", {"x-polyclinic-key": "wrong"}, 401),
        ("POST", "/api/act", {"x-polyclinic-key": "\xff\xfe"}, 401),
        ("GET", "/api/events", {"x-polyclinic-key": "wrong"}, 401),
        ("GET", "/metrics", {"x-polyclinic-key": "wrong"}, 401),
        ("GET", "/metrics", {"authorization": "Bearer wrong", "x-polyclinic-key": ""}, 401),
        ("GET", "/metrics", {"authorization": f"Basic {'m' * 32}", "x-polyclinic-key": ""}, 401),
        ("POST", "/api/link", {}, 401),
        ("GET", "/api/unknown", {}, 404),
    ],
)
def test_what_is_refused(
    app: Any, keys: Keys, page: Little, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    body = {"act": "write"} if method == "POST" else None
    assert request(app, method, path, body, headers={**key(keys), **headers}).status == status
    assert "write" not in page.done


def test_an_allowed_action_is_carried_out(app: Any, keys: Keys, page: Little) -> None:
    """So that the refusals above have their reason in what they change."""
    answer = request(app, "POST", "/api/act", {"act": "write"}, headers=key(keys))
    assert (answer.status, answer.json) == (200, {"said": "write"})
    assert page.done == ["write"]


def test_a_long_body_without_its_length_is_refused(app: Any, keys: Keys, page: Little) -> None:
    body = json.dumps({"act": "write", "more": "x" * (MAX_BODY + 1)}).encode()
    headers = {**key(keys), "content-length": None}
    assert request(app, "POST", "/api/act", body, headers=headers).status == 404  # type: ignore[arg-type]
    assert page.done == [""]


@pytest.mark.parametrize("path", ["/", "/static/x/main.js", "/healthz", "/api/events", "/nothing", "/report/x"])
def test_every_response_has_the_headers(app: Any, path: str) -> None:
    headers = request(app, "GET", path).headers
    assert headers["content-security-policy"] == POLICY
    for name, value in {
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "x-frame-options": "DENY",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
    }.items():
        assert headers[name] == value
    assert "set-cookie" not in headers
    assert "access-control-allow-origin" not in headers
    assert "unsafe" not in headers["content-security-policy"]


@pytest.mark.parametrize(
    "path",
    [
        "@/../guard.py",
        "@/../../report/style.css",
        "@/../../guard.py",
        "@//etc/passwd",
        "@/vendor/README.md",
        "@/index.html",
        "@/%00",
        "@/",
        "@/x.js",
        "/static/main.js",
        "/static/0000000000000000/main.js",
    ],
)
def test_only_the_pages_own_files_are_served(page: Little, keys: Keys, path: str) -> None:
    console = Console(page, keys)
    app = console.app(PORT)
    assert request(app, "GET", f"{console.files}/main.js").status == 200
    assert f"{console.files}/runs.js" in request(app, "GET", "/").body.decode()
    assert request(app, "GET", path.replace("@", console.files)).status == 404


def test_a_link_works_once_and_for_ten_minutes(app: Any, keys: Keys, clock: Clock, page: Little) -> None:
    token = keys.token()
    answer = request(app, "POST", "/api/login", {"token": token})
    assert answer.status == 200
    assert page.done == ["opened operator"]
    mine = {"x-polyclinic-key": answer.json["key"]}
    assert request(app, "POST", "/api/act", {"act": "read"}, headers=mine).status == 200
    assert request(app, "POST", "/api/login", {"token": token}).status == 403
    old = keys.token()
    clock.now += TOKEN_SECONDS + 1
    assert request(app, "POST", "/api/login", {"token": old}).status == 403


def test_a_key_ends_after_twelve_idle_hours(app: Any, keys: Keys, clock: Clock) -> None:
    mine = key(keys)
    clock.now += IDLE_SECONDS - 1
    assert request(app, "POST", "/api/act", {"act": "read"}, headers=mine).status == 200
    clock.now += IDLE_SECONDS - 1
    assert request(app, "POST", "/api/act", {"act": "read"}, headers=mine).status == 200
    clock.now += IDLE_SECONDS + 1
    assert request(app, "POST", "/api/act", {"act": "read"}, headers=mine).status == 401


def test_after_ten_wrong_tokens_nobody_logs_in_for_a_minute(app: Any, keys: Keys, clock: Clock) -> None:
    mine = key(keys)
    for i in range(10):
        assert request(app, "POST", "/api/login", {"token": f"guess {i}"}).status == 403
    token = keys.token()
    assert request(app, "POST", "/api/login", {"token": token}).status == 429
    assert request(app, "POST", "/api/act", {"act": "read"}, headers=mine).status == 200  # who is in stays in
    clock.now += 61
    assert request(app, "POST", "/api/login", {"token": token}).status == 200


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'{"token": 5}', b"{", b"[" * 9999, b"\xff"])
def test_a_strange_login_is_refused(app: Any, body: bytes) -> None:
    assert request(app, "POST", "/api/login", body).status == 403


def test_a_viewer_reads_and_changes_nothing(app: Any, keys: Keys, page: Little) -> None:
    mine = key(keys, VIEWER)
    assert request(app, "POST", "/api/act", {"act": "read"}, headers=mine).status == 200
    answer = request(app, "POST", "/api/act", {"act": "write"}, headers=mine)
    assert answer.status == 403
    assert "--viewer" in answer.json["error"]
    assert page.done == ["read"]


def test_another_link_needs_the_key_in_the_accounts_own_file(app: Any, keys: Keys) -> None:
    answer = request(app, "POST", "/api/link", {"role": "viewer"}, headers={"x-polyclinic-key": keys.link})
    assert answer.status == 200
    assert request(app, "POST", "/api/login", {"token": answer.json["token"]}).json["role"] == "viewer"
    assert request(app, "POST", "/api/act", {"act": "read"}, headers={"x-polyclinic-key": keys.link}).status == 401


def test_the_key_for_metrics_opens_nothing_else(app: Any) -> None:
    bearer = {"authorization": f"Bearer {'m' * 32}"}
    answer = request(app, "GET", "/metrics", headers=bearer)
    assert answer.status == 200
    assert request(app, "GET", "/api/events", headers=bearer).status == 401
    assert request(app, "GET", "/metrics", headers={**bearer, "host": "evil.org"}).status == 421


def test_without_a_key_for_metrics_an_empty_one_opens_nothing(page: Little) -> None:
    app = Console(page, Keys()).app(PORT)
    assert request(app, "GET", "/metrics", headers={"authorization": "Bearer "}).status == 401


def test_metrics_are_in_the_format_of_prometheus() -> None:
    text = exposition([Sample("a", 1.5, help="A."), Sample("a", 2, (("x", 'q"\n\\'),)), Sample("b_total", 3.0)])
    assert text == (
        "# HELP polyclinic_a A.\n# TYPE polyclinic_a gauge\npolyclinic_a 1.5\n"
        'polyclinic_a{x="q\\"\\n\\\\"} 2\n# TYPE polyclinic_b_total counter\npolyclinic_b_total 3\n'
    )
    parser = pytest.importorskip("prometheus_client.parser", reason="not installed")
    assert list(parser.text_string_to_metric_families(text))


def test_errors_say_what_happened_and_a_bug_says_nothing_of_its_inside(app: Any, keys: Keys) -> None:
    mine = key(keys)
    assert request(app, "POST", "/api/act", {"act": "changed"}, headers=mine).status == 409
    assert request(app, "POST", "/api/act", {"act": "nothing"}, headers=mine).status == 404
    answer = request(app, "POST", "/api/act", {"act": "bug"}, headers=mine)
    assert answer.status == 500
    assert b"secret" not in answer.body


def test_a_report_is_shown_once_within_a_minute_in_a_sandbox(app: Any, keys: Keys, clock: Clock, tmp_path: Any) -> None:
    file = tmp_path / "report.html"
    file.write_text("<script>alert(1)</script>")
    mine = key(keys)

    def ticket() -> str:
        answer = request(app, "POST", "/api/act", {"act": "file", "path": str(file)}, headers=mine)
        return str(answer.json["ticket"])

    one = ticket()
    answer = request(app, "GET", f"/report/{one}")
    assert answer.status == 200
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox allow-popups;")
    assert "script" not in policy
    assert "default-src 'none'" in policy
    assert request(app, "GET", f"/report/{one}").status == 403
    late = ticket()
    clock.now += TICKET_SECONDS + 1
    assert request(app, "GET", f"/report/{late}").status == 403
    assert request(app, "GET", "/report/wrong").status == 403


def test_old_keys_make_room(keys: Keys, clock: Clock) -> None:
    first = key(keys)["x-polyclinic-key"]
    for _ in range(70):
        clock.now += 1
        key(keys)
    assert keys.session(first) is None


def test_the_metrics_key_is_made_private_and_a_weak_one_is_refused(tmp_path: Any) -> None:
    from polyclinic.console.serve import _metrics_key
    from polyclinic.errors import ConfigError

    file = tmp_path / "metrics.key"
    key = _metrics_key(file)
    assert len(key) >= 40
    assert file.stat().st_mode & 0o777 == 0o600
    assert _metrics_key(file) == key
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        _metrics_key(file)
    file.chmod(0o600)
    file.write_text("short")
    with pytest.raises(ConfigError, match="at least 20"):
        _metrics_key(file)


def test_a_port_in_use_is_told_from_a_free_one() -> None:
    import socket

    from polyclinic.console.serve import _listening
    from polyclinic.errors import ConfigError

    with _listening(0) as line:
        address, port = line.getsockname()
        line.listen()
        assert address == "127.0.0.1"  # never another interface
        with pytest.raises(ConfigError, match=f"--port {port}"), _listening(port):
            pass
        with socket.socket() as other, pytest.raises(OSError, match="refused"):
            other.connect(("127.0.0.2", port))
    with pytest.raises(ConfigError, match="--port 99999"), _listening(99999):
        pass
