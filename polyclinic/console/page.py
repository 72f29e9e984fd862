"""What the three pages of the console have in common: reading, watching, acting and measuring."""

import json
import logging
import math
import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from polyclinic.errors import PolyclinicError

log = logging.getLogger(__name__)
Events = list[tuple[str, Any]]


class Sample(NamedTuple):
    """One value for Prometheus. Names and labels contain no name of a patient, a person or a study.

    Attributes:
        name: Name without the prefix ``polyclinic_``.
        value: The number.
        labels: Labels and their values.
        help: What it measures.
    """

    name: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()
    help: str = ""


class Refused(PolyclinicError):
    """An action that the page cannot carry out. ``status`` is the status of the response."""

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


class Changed(Refused):
    """What was shown is no longer what is there; the page must be read again."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 409)


class Watcher(Protocol):
    """One open stream of events, with what it has sent already."""

    def updates(self) -> Events:
        """Return the events since the last call, in order."""
        ...


class Page(Protocol):
    """One kind of page over one folder. All methods are called under ``lock`` and may read files."""

    kind: str
    title: str
    lock: threading.RLock

    @property
    def pace(self) -> float:
        """Seconds between two readings while somebody watches."""
        ...

    def look(self) -> bool:
        """Read what is new, and return whether anything is."""
        ...

    def watch(self, query: Mapping[str, str]) -> Watcher:
        """Return a new watcher, for the part of the page that ``query`` names."""
        ...

    def act(self, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out the action ``name``, and return what the page shows of it.

        Raises:
            Refused: If it cannot be carried out.
        """
        ...

    def reads(self) -> frozenset[str]:
        """Return the names of the actions that change nothing, which a viewer may ask for."""
        ...

    def opened(self, role: str) -> None:
        """Record that a browser has opened the console."""
        ...

    def metrics(self) -> Iterable[Sample]:
        """Return the current measurements."""
        ...

    def close(self) -> None:
        """End what the page has open. Runs, sites and servers continue."""
        ...


class WholeState:
    """Watcher of a page that sends its whole state at every change."""

    def __init__(self, page: "StatePage") -> None:
        self.page, self._seen = page, -1

    def updates(self) -> Events:
        """Return the state if it has changed since the last call."""
        version, state = self.page.version, self.page.state
        if version == self._seen:
            return []
        self._seen = version
        return [("state", state())]


class StatePage(Protocol):
    """A page with one state."""

    version: int

    def state(self) -> dict[str, Any]:
        """Return everything that the page shows."""
        ...


def text_of(body: Mapping[str, Any], key: str, most: int = 500) -> str:
    """Return the text ``key`` of a request.

    Raises:
        Refused: If it is missing, not text, or too long.
    """
    value = body.get(key)
    if not isinstance(value, str) or len(value) > most:
        raise Refused(f"{key!r} must be text of at most {most} characters", 400)
    return value


def encoded(value: Any) -> bytes:
    """Return ``value`` as JSON. Numbers that are not finite, which a browser cannot read, become null."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    except ValueError:
        return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def exposition(samples: Iterable[Sample]) -> str:
    """Return the measurements in Prometheus' text format, version 0.0.4."""
    lines, seen = list[str](), set[str]()
    for sample in samples:
        name = f"polyclinic_{sample.name}"
        if name not in seen:
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP {name} {sample.help}"] if sample.help else []
            lines.append(f"# TYPE {name} {kind}")
            seen.add(name)
        labels = ",".join(f'{key}="{_escaped(value)}"' for key, value in sample.labels)
        lines.append(f"{name}{{{labels}}} {sample.value:g}" if labels else f"{name} {sample.value:.17g}")
    return "".join(f"{line}\n" for line in lines)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
