"""The privacy budget of one data set at one site, on the site's own disk.

What a release costs is written, and forced to the disk, before it leaves. So after a crash at any moment the ledger
has counted at least what was released: perhaps a spend too many, never one too few. Every entry is bound to all before
it, and a second file holds the last entry's hash, so that neither a changed line nor a missing end goes unnoticed.
Whoever can write here can replace both files by older ones, or delete them. Only a copy of the ledger's head that is
kept elsewhere shows that (``knows``): a site keeps one beside its ledgers, a run one in each of its records.

Entries hold spends as they were released, for the unit that their noise was calibrated to; what they cost the unit of
the budget is computed when they are read.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.core.audit_log import FIRST, Broken, Journal, verify
from polyclinic.core.metering import Spend, Unit
from polyclinic.core.serialization import write_bytes
from polyclinic.errors import ConfigError, PolicyRefusal
from polyclinic.privacy.accounting import Statement, epsilon, epsilon_rdp, statement
from polyclinic.privacy.privacy_units import UNITS, payable, problems

BEGINNING = b'{"seq":0,"event":"budget",'


class Exhausted(PolicyRefusal, RuntimeError):
    """The budget does not allow what was asked. Nothing was spent and nothing may leave."""


@dataclass(frozen=True)
class Ledger:
    """A budget and what was spent of it. Safe with several processes at once: each takes its turn.

    Attributes:
        path: The file of entries, JSON lines. Beside it lie ``.head`` and ``.lock``.
    """

    path: Path

    def begin(self, *, site: str, data: str, unit: str, epsilon: float, delta: float) -> None:
        """Makes the ledger.

        Args:
            site: Whose it is.
            data: The data set's name.
            unit: Who is protected: ``record``, ``patient`` or ``site``.
            epsilon: The budget, for ever.
            delta: δ, below one in the number of units.

        Raises:
            ValueError: If there is one already, or another file, or the budget makes no sense.
        """
        if not (0 < epsilon < math.inf and 0 < delta < 1 and unit in UNITS):
            raise ConfigError(
                "a budget has a finite epsilon above 0, delta between 0 and 1, and the unit record, patient or site"
            )
        with locked(self.lock):
            if self.path.exists() and not _begins_as_one(self.path):
                raise ValueError(f"{self.path}: another file is in the place of the ledger")
            if self.begun:
                raise ConfigError(f"{self.path}: there is a ledger already, and a budget does not begin anew")
            self._append("budget", {"site": site, "data": data, "unit": unit, "epsilon": epsilon, "delta": delta})

    def raise_budget(self, epsilon: float, reason: str) -> None:
        """Sets another budget, as a person decided; who and why stays in the ledger.

        Raises:
            ValueError: Where no reason is given.
        """
        if not reason.strip() or not 0 < epsilon < math.inf:
            raise ConfigError("a new budget needs a finite epsilon above 0 and a reason")
        with locked(self.lock):
            list(self._entries())
            self._append("raised", {"epsilon": epsilon, "reason": reason})

    def reserve(self, spends: Iterable[Spend], about: Mapping[str, Any] | None = None) -> float:
        """Spends, before anything is released. When this returns, the spend is on the disk.

        Args:
            spends: What the release costs.
            about: What it is for, such as run and round. No names, no paths.

        Returns:
            What was spent in all, this included: Rényi's ε, which is quick and a little too large. ``spent`` says more.

        Raises:
            Exhausted: Where it would exceed the budget. Nothing was spent.
            Broken: Where the ledger was changed or cut, or is missing.
        """
        given = list(spends)
        with locked(self.lock):
            budget, before = self._read(self._entries())
            chosen, quick = self._affordable(budget, before, given)
            self._append("spend", {"spends": [dict(spend._asdict()) for spend in chosen], "about": dict(about or {})})
        return quick

    def check(self, spends: Iterable[Spend]) -> None:
        """Whether ``reserve`` would allow it now. Nothing is spent.

        Raises:
            Exhausted: If it would not.
            Broken: If the ledger was changed or cut, or is missing.
        """
        given = list(spends)
        with locked(self.lock):
            self._affordable(*self._read(self._entries()), given)

    def _affordable(self, budget: dict[str, Any], before: list[Spend], given: list[Spend]) -> tuple[list[Spend], float]:
        """Those of the ``given`` spends that are paid for, and Rényi's ε with them."""
        name, unit, delta = self.path.name, budget["unit"], budget["delta"]
        if wrong := [problem for spend in given for problem in problems(spend)]:
            raise Exhausted(f"{name}: this release cannot be accounted for, so nothing leaves: {'; '.join(wrong)}")
        if not (chosen := payable(given, unit)):
            raise Exhausted(f"{name}: this budget protects every {unit}, and nothing in what was asked does")
        total = [*before, *chosen]
        # Rényi's bound is never too small, so if it fits, so does the other
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
        """What was spent so far.

        Raises:
            Broken: Where the ledger was changed or cut, or is missing.
        """
        with locked(self.lock):
            budget, spends = self._read(self._entries())
        return statement(spends, budget["delta"], budget["unit"])

    def spends(self) -> tuple[Spend, ...]:
        """What was spent, release by release, each for the unit that its noise was calibrated to.

        Raises:
            Broken: Where the ledger was changed or cut, or is missing.
        """
        with locked(self.lock):
            return tuple(self._read(self._entries())[1])

    def budget(self) -> dict[str, Any]:
        """``site``, ``data``, ``unit``, ``epsilon`` and ``delta``."""
        with locked(self.lock):
            return self._read(self._entries())[0]

    def head(self) -> str:
        """The hash of the last entry. Kept elsewhere, it proves that nothing was taken away."""
        with locked(self.lock):
            return str(list(self._entries())[-1]["hash"])

    def knows(self, head: str) -> bool:
        """Whether ``head``, which was kept elsewhere, is one of this ledger's: if not, it was replaced or rolled back.

        Raises:
            Broken: If the ledger was changed or cut, or is missing.
        """
        with locked(self.lock):
            return any(entry["hash"] == head for entry in self._entries())

    def note_members(self, details: Mapping[str, Any]) -> None:
        """Binds the list of whose data these are, which is kept in another file, to the chain. See ``members``."""
        with locked(self.lock):
            self._read(self._entries())
            self._append("members", details)

    def members(self) -> dict[str, Any] | None:
        """What ``note_members`` said last; None if it never did."""
        with locked(self.lock):
            found = [entry for entry in self._entries() if entry["event"] == "members"]
        return found[-1] if found else None

    @property
    def begun(self) -> bool:
        """Whether there is a ledger. A first line that a crash has torn was never acknowledged, and is none."""
        if self._head.exists() or not self.path.exists():
            return self._head.exists()
        return b"\n" in self.path.read_bytes()

    @property
    def lock(self) -> Path:
        """The file by which processes take turns."""
        return self.path.with_name(self.path.name + ".lock")

    @property
    def _head(self) -> Path:
        return self.path.with_name(self.path.name + ".head")

    def _entries(self) -> Iterator[dict[str, Any]]:
        """All entries, once it is certain that none was changed and none is missing at the end.

        An entry without its head is a crash between the two writes: it counts. A head without its entry is a cut.
        """
        if not self.path.exists():
            raise Broken(
                f"{self.path}: the ledger is missing"
                + (
                    ", though its head is here: nothing can be released. Restore it from a copy"
                    if self._head.exists()
                    else ": begin one, with the budget that this site allows"
                )
            )
        if not _begins_as_one(self.path):
            raise Broken(f"{self.path}: this is not a ledger: its first line sets no budget")
        Journal(self.path).close()  # cuts off a torn last line: it was never acknowledged, so nothing was released
        entries = list(verify(self.path))
        known = self._head.read_text().strip() if self._head.exists() else FIRST
        if not entries or known not in ([FIRST] if len(entries) == 1 else []) + [e["hash"] for e in entries[-2:]]:
            raise Broken(
                f"{self.path}: the ledger and its head do not agree, so entries were taken away, or the head "
                "was: nothing can be released. Restore both from a copy"
            )
        if known != entries[-1]["hash"]:
            write_bytes(self._head, entries[-1]["hash"].encode() + b"\n")  # what the crash kept from being done
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
                    raise Broken(f"{self.path}: {event!r} is not an entry of a ledger, or not in its place")
        return budget, spends

    def _append(self, event: str, details: Mapping[str, Any]) -> None:
        journal = Journal(self.path)
        try:
            head = journal.write(event, details)
        finally:
            journal.close()
        write_bytes(self._head, head.encode() + b"\n")

    def _spend(self, given: dict[str, Any], unit: Unit) -> Spend:
        """A spend as it was written."""
        try:
            found = Spend(**given)
            wrong = problems(found)
        except TypeError as error:
            found, wrong = Spend(0.0), [str(error)]
        if not wrong and not payable([found], unit):
            wrong = [f"it does not protect a {unit}"]
        if wrong:
            raise Broken(f"{self.path}: an entry cannot be accounted for: {'; '.join(wrong)}")
        return found


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """While no other process holds the lock file at ``path``.

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
    """Whether the file could be a ledger, so that nothing is cut off another. A first line may be torn."""
    with path.open("rb") as opened:
        return BEGINNING.startswith(opened.read(len(BEGINNING)))
