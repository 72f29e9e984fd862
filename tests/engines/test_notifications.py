"""Notifications: to the recipients in notify.toml only, once for each condition, within the limit for an hour."""

import http.server
import json
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polyclinic.engines import notifications
from polyclinic.engines.flare.client.agent_status import Conditions
from polyclinic.engines.flare.client.reviews import REFUSED, Reviews
from polyclinic.engines.notifications import Notifier, read, send_now
from polyclinic.errors import ConfigError
from tests.engines.flare.test_approval import survey
from tests.support.local_deployment import hospital


class Received:
    """A relay and a web server on this machine, and what they received."""

    def __init__(self) -> None:
        self.mails: list[str] = []
        self.posts: list[tuple[str, Any]] = []
        received = self

        class Relay(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.wfile.write(b"220 relay\r\n")
                while line := self.rfile.readline():
                    word = line[:4].upper()
                    if word == b"DATA":
                        self.wfile.write(b"354 go on\r\n")
                        lines = []
                        while (part := self.rfile.readline()) != b".\r\n":
                            lines.append(part)
                        received.mails.append(b"".join(lines).decode())
                    self.wfile.write(b"221 bye\r\n" if word == b"QUIT" else b"250 ok\r\n")
                    if word == b"QUIT":
                        return

        class Hook(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                received.posts.append((self.path, json.loads(body)))
                self.send_response(302 if self.path == "/away" else 204)
                if self.path == "/away":
                    self.send_header("location", "/elsewhere")
                self.end_headers()

            do_GET = do_POST  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self.relay = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Relay)
        self.hook = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
        for server in (self.relay, self.hook):
            threading.Thread(target=server.serve_forever, daemon=True).start()

    def write(self, folder: Path, path: str = "/hook", more: str = "") -> None:
        mail = f'to = ["it@hospital.org"]\nfrom = "polyclinic@hospital.org"\nsmtp = "127.0.0.1:{self.relay.server_address[1]}"'
        hook = f'url = "http://127.0.0.1:{self.hook.server_address[1]}{path}"'
        (folder / "notify.toml").write_text(f"[mail]\n{mail}\n[webhook]\n{hook}\n{more}")


@pytest.fixture
def received() -> Iterator[Received]:
    made = Received()
    yield made
    for server in (made.relay, made.hook):
        server.shutdown()
        server.server_close()


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def test_a_message_goes_to_the_mailbox_and_the_webhook_of_the_file(received: Received, tmp_path: Path) -> None:
    received.write(tmp_path)
    assert send_now(tmp_path, "study spots waits") == []
    (mail,) = received.mails
    assert "To: it@hospital.org" in mail
    assert "Subject: Polyclinic: study spots waits" in mail
    assert received.posts == [("/hook", {"text": "Polyclinic: study spots waits"})]


def test_a_name_cannot_add_a_header(received: Received, tmp_path: Path) -> None:
    received.write(tmp_path)
    assert send_now(tmp_path, "x\r\nBcc: evil@example.org\r\n\r\nbody") == []
    headers = received.mails[0].partition("\r\n\r\n")[0]
    assert not any(line.startswith("Bcc") for line in headers.splitlines())


def test_a_redirect_is_not_followed(received: Received, tmp_path: Path) -> None:
    received.write(tmp_path, "/away")
    (failure,) = send_now(tmp_path, "text")
    assert "302" in failure
    assert [path for path, _ in received.posts] == ["/away"]


def test_one_way_that_fails_does_not_prevent_the_others(received: Received, tmp_path: Path) -> None:
    received.write(tmp_path, more='[desktop]\ncommand = ["/no/such/command"]\n')
    (failure,) = send_now(tmp_path, "text")
    assert failure.startswith("desktop: FileNotFoundError")
    assert len(received.mails) == len(received.posts) == 1


def test_each_condition_is_sent_once_while_it_lasts_and_reminded_of_later(received: Received, tmp_path: Path) -> None:
    received.write(tmp_path)
    clock = Clock()
    notifier = Notifier(tmp_path, clock)

    def sent(**conditions: str) -> list[str]:
        texts = notifier.look(conditions)
        notifier.wait()
        return texts

    assert sent(a="A") == ["A"]
    assert sent(a="A") == []
    assert Notifier(tmp_path, clock).look({"a": "A"}) == []  # a restart sends nothing again
    assert sent(a="A", b="B") == ["B"]
    clock.now += 23 * 3600
    assert sent(a="A", b="B") == []
    clock.now += 3600 + 1
    assert sent(a="A", b="B") == ["A", "B"]
    assert sent(b="B") == []
    assert sent(a="A", b="B") == ["A"]  # it ended, and began again


def test_a_flood_of_studies_is_limited(received: Received, tmp_path: Path) -> None:
    received.write(tmp_path, more="[limits]\nper_hour = 3\n")
    clock = Clock()
    notifier = Notifier(tmp_path, clock)
    total = 0
    for i in range(30):
        total += len(notifier.look({f"study {i} {j}": "x" for j in range(5)}))
        notifier.wait()
        clock.now += 60
    assert total == 3
    clock.now += 3600
    assert len(notifier.look({"real": "y"})) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[mail]\n", "mail.to: is missing"),
        ('[mail]\nto = ["a@b"]\nfrom = "c@d"\nsmtp = "relay"\n', "mail.smtp"),
        ('[mail]\nto = ["a@b, e@f"]\nfrom = "c@d"\nsmtp = "localhost:25"\n', "no address"),
        ('[mail]\nto = "a@b"\nfrom = "c@d"\nsmtp = "localhost:25"\n', "mail.to: must be a list"),
        ('[mail]\nto = ["a@b"]\nfrom = "c@d\\nBcc: x@y"\nsmtp = "localhost:25"\n', "mail.from: must be a text"),
        ('[mail]\nto = ["a@b"]\nfrom = "c@d"\nsmtp = "r.org:25"\nstarttls = false\nuser = "u"\n', "encrypted"),
        ('[mail]\nto = ["a@b"]\nfrom = "c@d"\nsmtp = "r.org:25"\nuser = "u"\n', "password_file"),
        ('[webhook]\nurl = "http://chat.org/x"\n', "webhook.url"),
        ('[webhook]\nurl = "http://localhost.evil.org/x"\n', "webhook.url"),
        ('[webhook]\nurl = "file:///etc/passwd"\n', "webhook.url"),
        ("[webhook]\n", "webhook.url"),
        ("[desktop]\ncommand = []\n", "desktop.command"),
        ("[limits]\nper_hour = 0\n", "limits"),
        ("[limits]\nper_hour = true\n", "limits.per_hour: must be a whole number"),
        ("[sms]\n", "sms: there is no such table"),
        ("mail = 3\n", "mail: must be a table"),
        ("x = [", "notify.toml: "),
        ("[webhook]\nurl = 3\ntoken = 1\n", "webhook.token: unknown"),
    ],
)
def test_an_invalid_file_says_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "notify.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        read(tmp_path)
    assert words.replace("a text", "text") in str(error.value) or words in str(error.value)
    notifier = Notifier(tmp_path)
    assert notifier.look({"a": "A"}) == []  # and ends nothing
    assert notifier.problem


def test_without_a_file_nothing_is_sent(tmp_path: Path) -> None:
    assert read(tmp_path).ways == ()
    assert Notifier(tmp_path).look({"a": "A"}) == []
    assert not (tmp_path / notifications.SENT).exists()


def test_a_changed_file_counts_at_once(received: Received, tmp_path: Path) -> None:
    notifier = Notifier(tmp_path)
    assert notifier.look({"a": "A"}) == []
    received.write(tmp_path)
    assert notifier.look({"a": "A"}) == ["A"]
    notifier.wait()
    assert len(received.mails) == 1


def test_a_slow_relay_does_not_hold_up_a_site(tmp_path: Path) -> None:
    import socket

    with socket.socket() as silent:  # accepts and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        smtp = f'smtp = "127.0.0.1:{silent.getsockname()[1]}"'
        (tmp_path / "notify.toml").write_text(f'[mail]\nto = ["a@b"]\nfrom = "c@d"\n{smtp}\n')
        begun = time.monotonic()
        assert Notifier(tmp_path).look({"a": "A"}) == ["A"]
        assert time.monotonic() - begun < 1


def test_what_people_at_a_site_are_notified_of(tmp_path: Path) -> None:
    home = hospital(tmp_path, count=1)["site-0"]
    conditions = Conditions(home)
    assert conditions.now() == {}
    review = Reviews(home.reviews).offer(survey(), ())
    ((key, text),) = conditions.now().items()
    assert text == (
        f"The study spots waits for a decision at site-0 (request {review.what.hash[:16]}): polyclinic site review spots"
    )
    assert conditions.now() == {key: text}
    Reviews(home.reviews).decide("spots-survey", REFUSED, "", "no")
    assert conditions.now() == {}
