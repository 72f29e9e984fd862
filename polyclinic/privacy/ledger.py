"""Ledger of the privacy budget of one data set at one site, on the site's disk.

The cost of a release is written and forced to the disk before the release. After a crash at any moment the ledger
therefore includes at least all releases: possibly a spend too many, never one too few. Every entry is bound to all
earlier ones, and a second file holds the last entry's hash, so that a changed line or a missing end is detected. A
person with write access can replace both files by older ones, or delete them. This is detected only with a copy of the
ledger's head in another place (``knows``): a site stores one next to its ledgers, a run one in each of its records.

Entries hold spends as they were released, for the unit to which their noise was calibrated; their cost for the budget's
unit is computed on reading.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.core import atomic
from polyclinic.core.audit_log import FIRST, Broken, Journal, verify
from polyclinic.core.metering import Spend, Unit
from polyclinic.errors import ConfigError, PolicyRefusal
from polyclinic.privacy.accounting import Statement, epsilon, epsilon_rdp, statement
from polyclinic.privacy.privacy_units import UNITS, payable, problems

BEGINNING = b'{"seq":0,"event":"budget",'


class Exhausted(PolicyRefusal, RuntimeError):
    """The budget does not allow a release. Nothing was spent and nothing may leave."""


@dataclass(frozen=True)
class Ledger:
    """A budget and its spends. Safe for concurrent processes, which use a lock.

    Attributes:
        path: The file of entries, JSON lines. ``.head`` and ``.lock`` are next to it.
    """

    path: Path

    def begin(self, *, site: str, data: str, unit: str, epsilon: float, delta: float) -> None:
        """Create the ledger.

        Args:
            site: Name of the site.
            data: Name of the data set.
            unit: The unit of protection: ``record``, ``patient`` or ``site``.
            epsilon: The budget, without expiry.
            delta: δ, less than one over the number of units.

        Raises:
            ValueError: If the ledger or another file already exists, or the budget is invalid.
        """
        if not (0 < epsilon < math.inf and 0 < delta < 1 and unit in UNITS):
            raise ConfigError(
                "a budget has a finite epsilon above 0, delta between 0 and 1, and the unit record, patient or site"
            )
        with locked(self.lock):
            if self.path.exists() and not _begins_as_one(self.path):
                raise ValueError(f"{self.path}: another file exists in the place of the ledger")
            if self.begun:
                raise ConfigError(f"{self.path}: the ledger already exists, and a budget cannot be reset")
            self._append("budget", {"site": site, "data": data, "unit": unit, "epsilon": epsilon, "delta": delta})

    def raise_budget(self, epsilon: float, reason: str) -> None:
        """Set another budget by a person's decision, which is recorded with its reason in the ledger.

        Raises:
            ValueError: If the budget is invalid or no reason is given.
        """
        if not reason.strip() or not 0 < epsilon < math.inf:
            raise ConfigError("a new budget needs a finite epsilon above 0 and a reason")
        with locked(self.lock):
            list(self._entries())
            self._append("raised", {"epsilon": epsilon, "reason": reason})

    def reserve(self, spends: Iterable[Spend], about: Mapping[str, Any] | None = None) -> float:
        """Spend before a release. When this returns, the spend is on the disk.

        Args:
            spends: The cost of the release.
            about: Its purpose, such as run and round. No personal names, no paths.

        Returns:
            The total ε including this spend, by Rényi accounting: fast and slightly too large. See also ``spent``.

        Raises:
            Exhausted: If it would exceed the budget. Nothing is spent.
            Broken: If the ledger was changed or truncated, or is missing.
        """
        given = list(spends)
        with locked(self.lock):
            budget, before = self._read(self._entries())
            chosen, quick = self._affordable(budget, before, given)
            self._append("spend", {"spends": [dict(spend._asdict()) for spend in chosen], "about": dict(about or {})})
        return quick

    def check(self, spends: Iterable[Spend]) -> None:
        """Check that ``reserve`` would allow the spends now. Nothing is spent.

        Raises:
            Exhausted: If it would not.
            Broken: If the ledger was changed or truncated, or is missing.
        """
        given = list(spends)
        with locked(self.lock):
            self._affordable(*self._read(self._entries()), given)

    def _affordable(self, budget: dict[str, Any], before: list[Spend], given: list[Spend]) -> tuple[list[Spend], float]:
        """Return those of the ``given`` spends that are charged, and the Rényi ε that includes them."""
        name, unit, delta = self.path.name, budget["unit"], budget["delta"]
        if wrong := [problem for spend in given for problem in problems(spend)]:
            raise Exhausted(f"{name}: this release cannot be accounted for, so nothing leaves: {'; '.join(wrong)}")
        if not (chosen := payable(given, unit)):
            raise Exhausted(f"{name}: this budget protects every {unit}, which nothing in this release does")
        total = [*before, *chosen]
        # Rényi accounting never gives too small an ε, so if it fits, the tight ε fits as well.
        if (quick := epsilon_rdp(total, delta, unit)) > budget["epsilon"]:
            after = epsilon(total, delta, unit)
            if not after <= budget["epsilon"]:
                now = epsilon(before, delta, unit)
                raise Exhausted(
                    f"{name}: the budget of ε = {budget['epsilon']:g} (δ = {delta:g}) for every {unit} of "
                    f"{budget['data']} is used up: {now:.3f} is spent, and this would make it {after:.3f}. Nothing "
                    "was released"
                )
        return chosen, quick

    def spent(self) -> Statement:
        """Compute the total spending.

        Raises:
            Broken: If the ledger was changed or truncated, or is missing.
        """
        with locked(self.lock):
            budget, spends = self._read(self._entries())
        return statement(spends, budget["delta"], budget["unit"])

    def spends(self) -> tuple[Spend, ...]:
        """Return the spends, release by release, each for the unit to which its noise was calibrated.

        Raises:
            Broken: If the ledger was changed or truncated, or is missing.
        """
        with locked(self.lock):
            return tuple(self._read(self._entries())[1])

    def budget(self) -> dict[str, Any]:
        """Return ``site``, ``data``, ``unit``, ``epsilon`` and ``delta``."""
        with locked(self.lock):
            return self._read(self._entries())[0]

    def head(self) -> str:
        """Return the hash of the last entry. A copy in another place reveals removed entries."""
        with locked(self.lock):
            return str(list(self._entries())[-1]["hash"])

    def knows(self, head: str) -> bool:
        """Return whether the ledger contains ``head``, an earlier head; if not, it was replaced or rolled back.

        Raises:
            Broken: If the ledger was changed or truncated, or is missing.
        """
        with locked(self.lock):
            return any(entry["hash"] == head for entry in self._entries())

    def note_members(self, details: Mapping[str, Any]) -> None:
        """Bind the list of the data that the ledger counts, which is in another file, to the chain. See ``members``."""
        with locked(self.lock):
            self._read(self._entries())
            self._append("members", details)

    def members(self) -> dict[str, Any] | None:
        """Return the details of the last ``note_members``; None if there was none."""
        with locked(self.lock):
            bound = [entry for entry in self._entries() if entry["event"] == "members"]
        return bound[-1] if bound else None

    @property
    def begun(self) -> bool:
        """Whether the ledger exists. An incomplete first line was never acknowledged and does not count."""
        if self._head.exists() or not self.path.exists():
            return self._head.exists()
        return b"\n" in self.path.read_bytes()

    @property
    def lock(self) -> Path:
        """The lock file of concurrent processes."""
        return self.path.with_name(self.path.name + ".lock")

    @property
    def _head(self) -> Path:
        return self.path.with_name(self.path.name + ".head")

    def _entries(self) -> Iterator[dict[str, Any]]:
        """Yield all entries after verifying that none was changed and none is missing at the end.

        An entry without its head results from a crash between the two writes, and counts. A head without its entry is a
        truncation.
        """
        if not self.path.exists():
            raise Broken(
                f"{self.path}: the ledger is missing"
                + (
                    ", although its head exists: nothing can be released. Restore it from a copy"
                    if self._head.exists()
                    else ": create one with the budget that this site allows"
                )
            )
        if not _begins_as_one(self.path):
            raise Broken(f"{self.path}: this is not a ledger: its first line sets no budget")
        Journal(self.path).close()  # removes an incomplete last line, which was never acknowledged
        entries = list(verify(self.path))
        known = self._head.read_text().strip() if self._head.exists() else FIRST
        if not entries or known not in ([FIRST] if len(entries) == 1 else []) + [e["hash"] for e in entries[-2:]]:
            raise Broken(
                f"{self.path}: the ledger and its head do not agree: entries or the head were removed, so nothing "
                "can be released. Restore both from a copy"
            )
        if known != entries[-1]["hash"]:
            atomic.write(self._head, entries[-1]["hash"].encode() + b"\n")  # the write that a crash interrupted
        yield from entries

    def _read(self, entries: Iterator[dict[str, Any]]) -> tuple[dict[str, Any], list[Spend]]:
        budget: dict[str, Any] = {}
        spends: list[Spend] = []
        for entry in entries:
            match entry["event"]:
                case "budget" if not budget:
                    budget = {key: entry[key] for key in ("site", "data", "unit", "epsilon", "delta")}
                case "raised" if budget:
                    budget["epsilon"] = entry["epsilon"]
                case "members" if budget:
                    pass
                case "spend" if budget:
                    spends += [self._spend(spend, budget["unit"]) for spend in entry["spends"]]
                case event:
                    raise Broken(f"{self.path}: {event!r} is not a valid ledger entry, or is out of order")
        return budget, spends

    def _append(self, event: str, details: Mapping[str, Any]) -> None:
        journal = Journal(self.path)
        try:
            head = journal.write(event, details)
        finally:
            journal.close()
        atomic.write(self._head, head.encode() + b"\n")

    def _spend(self, given: dict[str, Any], unit: Unit) -> Spend:
        """Read a spend from an entry."""
        try:
            spend = Spend(**given)
            wrong = problems(spend)
        except TypeError as error:
            spend, wrong = Spend(0.0), [str(error)]
        if not wrong and not payable([spend], unit):
            wrong = [f"it does not protect a {unit}"]
        if wrong:
            raise Broken(f"{self.path}: an entry cannot be accounted for: {'; '.join(wrong)}")
        return spend


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at ``path`` exclusively within the context.

    Raises:
        OSError: If this system has no file locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise OSError(
            "a privacy ledger needs file locks, which this system does not have: use Linux or macOS"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _begins_as_one(path: Path) -> bool:
    """Return whether the file can be a ledger, so that no other file is modified. Its first line may be incomplete."""
    with path.open("rb") as opened:
        return BEGINNING.startswith(opened.read(len(BEGINNING)))
