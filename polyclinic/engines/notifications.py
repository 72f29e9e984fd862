"""Notifications by e-mail, webhook and desktop, as ``notify.toml`` in a folder says. Without the file, none are sent.

```toml
[mail]
to = ["imaging-it@hospital.org"]
from = "polyclinic@hospital.org"
smtp = "localhost:25"            # the organization's own relay
starttls = true                  # required by default, except on this machine
user = "polyclinic"
password_file = "/etc/polyclinic/smtp"

[webhook]
url = "https://chat.hospital.org/hooks/abc"    # receives {"text": ..., "key": ...} by POST

[desktop]
command = ["notify-send", "Polyclinic"]        # the text is the last argument

[limits]
per_hour = 6
remind_after_h = 24.0
```

A message names a site, a study and a hash, and no count and nothing else of a patient. Where it goes is written in this
file alone, so that a server cannot choose it. A server that offers studies again and again causes at most ``per_hour``
messages an hour. Requires no PyTorch.
"""

import json
import logging
import smtplib
import ssl
import subprocess
import threading
import time
import tomllib
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from polyclinic.core.atomic import write_private
from polyclinic.errors import ConfigError

log = logging.getLogger(__name__)
FILE, SENT = "notify.toml", "notified.json"
PATIENCE = 15.0
MAX_TEXT, MAX_FILE = 500, 2**16
LOCAL = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Mail:
    """E-mail.

    Attributes:
        to: The recipients. ``sender``: the address that sends.
        host: The relay. ``port``: its port.
        starttls: Whether the connection is encrypted, with the relay's certificate checked.
        user: Name for the relay, if it asks for one. ``password_file``: file with the password.
    """

    to: tuple[str, ...]
    sender: str
    host: str
    port: int
    starttls: bool
    user: str = ""
    password_file: str = ""

    def send(self, text: str) -> None:
        """Send ``text``."""
        message = EmailMessage()
        message["From"], message["To"], message["Subject"] = (
            self.sender,
            ", ".join(self.to),
            f"Polyclinic: {text[:120]}",
        )
        message.set_content(f"{text}\n")
        with smtplib.SMTP(self.host, self.port, timeout=PATIENCE) as relay:
            if self.starttls:
                relay.starttls(context=ssl.create_default_context())
            if self.user:
                relay.login(self.user, Path(self.password_file).read_text(encoding="utf-8").strip())
            relay.send_message(message)


@dataclass(frozen=True)
class Webhook:
    """A web address that receives each message as JSON, by POST. Redirects are not followed."""

    url: str

    def send(self, text: str) -> None:
        """Send ``text``."""
        body = json.dumps({"text": f"Polyclinic: {text}"}).encode()
        request = urllib.request.Request(self.url, body, {"content-type": "application/json"})
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=PATIENCE):
            return


@dataclass(frozen=True)
class Desktop:
    """A command that shows a message; the text is its last argument."""

    command: tuple[str, ...]

    def send(self, text: str) -> None:
        """Send ``text``."""
        subprocess.run([*self.command, text], check=True, timeout=PATIENCE, capture_output=True)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, so that a message reaches the configured address only."""

    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        """Return no new request."""
        return None


@dataclass(frozen=True)
class Settings:
    """The content of ``notify.toml``."""

    ways: tuple[Mail | Webhook | Desktop, ...] = ()
    per_hour: int = 6
    remind_after_h: float = 24.0


def read(folder: Path) -> Settings:
    """Return the settings in ``folder``; no ways if there is no file.

    Raises:
        ConfigError: If the file is invalid. The message lists every problem.
    """
    path = folder / FILE
    if not path.is_file():
        return Settings()
    try:
        text = path.read_bytes()[: MAX_FILE + 1]
        table = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None
    problems: list[str] = []
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    for key in table.keys() - {"mail", "webhook", "desktop", "limits"}:
        problems.append(f"{key}: there is no such table; there are mail, webhook, desktop and limits")
    problems += [f"{key}: must be a table" for key in table.keys() - tables.keys()]
    ways = [
        maker(tables[key], problems)
        for key, maker in (("mail", _mail), ("webhook", _webhook), ("desktop", _desktop))
        if key in tables
    ]
    per_hour, remind = _limits(tables.get("limits", {}), problems)
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    return Settings(tuple(ways), per_hour, remind)


def _take(table: Mapping[str, Any], name: str, kinds: Mapping[str, type], problems: list[str]) -> dict[str, Any]:
    """Return the values of a table, and note those that are unknown or of the wrong type."""
    for key in table.keys() - kinds.keys():
        problems.append(f"{name}.{key}: unknown; known are {', '.join(kinds)}")
    found = {}
    for key, kind in kinds.items():
        if key in table and not _is(table[key], kind):
            problems.append(f"{name}.{key}: must be a {_WORDS[kind]}")
        elif key in table:
            found[key] = table[key]
    return found


_WORDS = {str: "text", bool: "true or false", int: "whole number", float: "number", list: "list of texts"}


def _is(value: Any, kind: Any) -> bool:
    if kind is list:
        return isinstance(value, list) and bool(value) and all(_is(one, str) for one in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return (
        isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) and (kind is not str or _plain(value))
    )


def _plain(text: str) -> bool:
    return bool(text) and text.isprintable()


def _mail(table: Mapping[str, Any], problems: list[str]) -> Mail:
    kinds = {"to": list, "from": str, "smtp": str, "starttls": bool, "user": str, "password_file": str}
    given = _take(table, "mail", kinds, problems)
    problems += [f"mail.{key}: is missing" for key in ("to", "from", "smtp") if key not in table]
    host, _, port = str(given.get("smtp", "localhost:25")).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        problems.append('mail.smtp: must name a host and a port, such as "localhost:25"')
        host, port = "localhost", "25"
    addresses = [*given.get("to", ()), given.get("from", "a@b")]
    problems += [f"mail: {a!r} is no address" for a in addresses if a.count("@") != 1 or "," in a or " " in a]
    encrypted = given.get("starttls", host not in LOCAL)
    if given.get("user") and not encrypted and host not in LOCAL:
        problems.append("mail.starttls: a password is sent only over an encrypted connection")
    if given.get("user") and not Path(given.get("password_file", "")).is_file():
        problems.append("mail.password_file: must name a file with the password of mail.user")
    keys = {"user": given.get("user", ""), "password_file": given.get("password_file", "")}
    return Mail(tuple(given.get("to", ())), given.get("from", ""), host, int(port), encrypted, **keys)


def _webhook(table: Mapping[str, Any], problems: list[str]) -> Webhook:
    url = _take(table, "webhook", {"url": str}, problems).get("url", "")
    local = any(url.startswith(f"http://{host}{end}") for host in LOCAL for end in (":", "/"))
    if not url.startswith("https://") and not local:
        problems.append("webhook.url: must begin with https://, or with http:// and name this machine")
    return Webhook(url)


def _desktop(table: Mapping[str, Any], problems: list[str]) -> Desktop:
    command = _take(table, "desktop", {"command": list}, problems).get("command", ["notify-send", "Polyclinic"])
    return Desktop(tuple(command))


def _limits(table: Mapping[str, Any], problems: list[str]) -> tuple[int, float]:
    given = _take(table, "limits", {"per_hour": int, "remind_after_h": float}, problems)
    per_hour, remind = given.get("per_hour", 6), given.get("remind_after_h", 24.0)
    if not 1 <= per_hour <= 1000 or not 0.1 <= remind <= 10_000:
        problems.append("limits: per_hour is from 1 to 1000, and remind_after_h from 0.1 to 10000")
    return per_hour, remind


class Notifier:
    """Sends each condition once while it lasts, and a reminder later. What was sent survives a restart."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        """Use ``notify.toml`` in ``folder``, which is read again whenever it changes."""
        self.folder, self._clock = folder, clock
        self.problem = ""
        self._settings, self._stamp = Settings(), -1
        self._thread: threading.Thread | None = None

    def look(self, conditions: Mapping[str, str]) -> list[str]:
        """Send what is due, in a thread of its own, and return the texts.

        Args:
            conditions: What is the case now, by a key that stays the same as long as it lasts.
        """
        self._read()
        if not self._settings.ways or (self._thread is not None and self._thread.is_alive()):
            return []
        now, sent = self._clock(), self._sent()
        kept = {key: at for key, at in sent["keys"].items() if key in conditions}
        recent = [at for at in sent["times"] if 0 <= now - at < 3600]
        late = self._settings.remind_after_h * 3600
        due = [key for key in conditions if key not in kept or not 0 <= now - kept[key] < late]
        room = self._settings.per_hour - len(recent)
        chosen = due[: max(0, room)]
        if kept != sent["keys"] or chosen:
            kept |= dict.fromkeys(chosen, now)
            facts = {"keys": kept, "times": [*recent, *[now] * len(chosen)]}
            write_private(self.folder / SENT, json.dumps(facts), durable=False)
        texts = [_one_line(conditions[key]) for key in chosen]
        if texts:
            self._thread = threading.Thread(target=send, args=(self._settings, texts), daemon=True)
            self._thread.start()
        return texts

    def wait(self) -> None:
        """Wait until everything is sent, or has failed."""
        if self._thread is not None:
            self._thread.join(3 * PATIENCE)

    def _read(self) -> None:
        path = self.folder / FILE
        stamp = path.stat().st_mtime_ns if path.is_file() else 0
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._settings, self.problem = read(self.folder), ""
        except (ConfigError, OSError) as error:
            self._settings, self.problem = Settings(), str(error)

    def _sent(self) -> dict[str, Any]:
        try:
            table = json.loads((self.folder / SENT).read_bytes())
            keys = {str(key): float(at) for key, at in table["keys"].items()}
            return {"keys": keys, "times": [float(at) for at in table["times"]]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {"keys": {}, "times": []}


def send(settings: Settings, texts: list[str]) -> list[str]:
    """Send each text by every way, and return what failed. One failure does not prevent the others."""
    failures = []
    for text in texts:
        for way in settings.ways:
            try:
                way.send(text)
            except Exception as error:  # a relay or a command may fail in any way
                failures.append(f"{type(way).__name__.lower()}: {type(error).__name__}: {error}")
                log.warning("a notification could not be sent by %s", failures[-1])
    return failures


def send_now(folder: Path, text: str) -> list[str]:
    """Send ``text`` as ``notify.toml`` in ``folder`` says, and return what failed.

    Raises:
        ConfigError: If the file is invalid.
    """
    return send(read(folder), [_one_line(text)])


def _one_line(text: str) -> str:
    """Return ``text`` without control characters, which could forge a header, and not longer than ``MAX_TEXT``."""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:MAX_TEXT]
