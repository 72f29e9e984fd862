"""The privacy budget of one data set at one site, on the site's own disk.

What a release costs is written, and forced to the disk, before it leaves. So after a crash at any moment the ledger
has counted at least what was released: perhaps a spend too many, never one too few. Every entry is bound to all before
it, and a second file holds the last entry's hash, so that neither a changed line nor a missing end goes unnoticed.
Whoever can delete both files can begin anew: print the ledger's head where others keep it (run, report and journal do).

Give the ledger the data set's name and not a hash of its contents: one patient more must not buy a new budget.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from polyclinic.core.journal import FIRST, Broken, Journal, verify
from polyclinic.core.metering import Spend, Unit
from polyclinic.core.state import write_bytes
from polyclinic.transforms.accounting import Statement, epsilon, epsilon_rdp, statement

UNITS: Final[tuple[Unit, ...]] = ("record", "patient", "site")  # each holds those before it


class Exhausted(RuntimeError):
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
            ValueError: Where there is one already, or the budget makes no sense.
        """
        if not (epsilon > 0 and 0 < delta < 1 and unit in UNITS):
            raise ValueError(
                "a budget has epsilon above 0, delta between 0 and 1, and the unit record, patient or site"
            )
        with self._alone():
            if self.path.exists() or self._head.exists():
                raise ValueError(f"{self.path}: there is a ledger already, and a budget does not begin anew")
            self._append("budget", {"site": site, "data": data, "unit": unit, "epsilon": epsilon, "delta": delta})

    def raise_budget(self, epsilon: float, reason: str) -> None:
        """Sets another budget, as a person decided; who and why stays in the ledger.

        Raises:
            ValueError: Where no reason is given.
        """
        if not reason.strip() or not epsilon > 0:
            raise ValueError("a new budget needs an epsilon above 0 and a reason")
        with self._alone():
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
        with self._alone():
            budget, before = self._read(self._entries())
            if not (spends := payable(spends, budget["unit"])):
                raise Exhausted(f"{self.path.name}: this budget protects every {budget['unit']}, and nothing in what "
                                "was asked does")  # fmt: skip
            total = [*before, *spends]
            # Rényi's bound is never too small, so where it fits, so does the other
            if (quick := epsilon_rdp(total, budget["delta"])) > budget["epsilon"]:
                after = epsilon(total, budget["delta"])
                if after > budget["epsilon"]:
                    now = epsilon(before, budget["delta"])
                    raise Exhausted(
                        f"{self.path.name}: the budget of ε = {budget['epsilon']:g} (δ = {budget['delta']:g}) for "
                        f"every {budget['unit']} of {budget['data']} is used up: {now:.3f} is spent, and this would "
                        f"make it {after:.3f}. Nothing was released"
                    )
            entries = [dict(spend._asdict()) for spend in spends]
            self._append("spend", {"spends": entries, "about": dict(about or {})})
        return quick

    def spent(self) -> Statement:
        """What was spent so far.

        Raises:
            Broken: Where the ledger was changed or cut, or is missing.
        """
        with self._alone():
            budget, spends = self._read(self._entries())
        return statement(spends, budget["delta"])._replace(unit=budget["unit"])

    def spends(self) -> tuple[Spend, ...]:
        """What was spent, release by release, for whoever keeps an account while it grows.

        Raises:
            Broken: Where the ledger was changed or cut, or is missing.
        """
        with self._alone():
            return tuple(self._read(self._entries())[1])

    def budget(self) -> dict[str, Any]:
        """``site``, ``data``, ``unit``, ``epsilon`` and ``delta``."""
        with self._alone():
            return self._read(self._entries())[0]

    def head(self) -> str:
        """The hash of the last entry. Kept elsewhere, it proves that nothing was taken away."""
        with self._alone():
            return str(list(self._entries())[-1]["hash"])

    @property
    def _head(self) -> Path:
        return self.path.with_name(self.path.name + ".head")

    def _entries(self) -> Iterator[dict[str, Any]]:
        """All entries, once it is certain that none was changed and none is missing at the end.

        An entry without its head is a crash between the two writes: it counts. A head without its entry is a cut.
        """
        if not self.path.exists():
            raise Broken(f"{self.path}: the ledger is missing" + (
                ", though its head is here: nothing can be released. Restore it from a copy" if self._head.exists()
                else ": begin one, with the budget that this site allows"))  # fmt: skip
        if not _begins_as_one(self.path):
            raise Broken(f"{self.path}: this is not a ledger: its first line sets no budget")
        Journal(self.path).close()  # cuts off a torn last line: it was never acknowledged, so nothing was released
        entries = list(verify(self.path))
        known = self._head.read_text().strip() if self._head.exists() else FIRST
        if not entries or known not in ([FIRST] if len(entries) == 1 else []) + [e["hash"] for e in entries[-2:]]:
            raise Broken(f"{self.path}: the ledger and its head do not agree, so entries were taken away, or the head "
                         "was: nothing can be released. Restore both from a copy")  # fmt: skip
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
                case "spend" if budget:
                    spends += [Spend(**spend) for spend in entry["spends"]]
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

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other process reads or writes this ledger."""
        try:
            import fcntl
        except ImportError as error:
            raise OSError("a privacy ledger needs file locks, which this system does not have: use Linux or macOS"
                          ) from error  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def payable(spends: Iterable[Spend], unit: Unit) -> list[Spend]:
    """What a budget for every ``unit`` pays of some spends that together made one release.

    Noise that hides a whole site hides each of its patients, and noise that hides a patient hides each record. Where
    noise of several kinds was added one upon the other, each protects by itself, and the finest that is fine enough
    is paid; so patients' privacy costs the same whether or not the site is hidden as well.
    """
    of, given = UNITS[UNITS.index(unit)], list(spends)
    for enough in UNITS[UNITS.index(unit) :]:
        if found := [Spend(s.multiplier, s.rate, s.steps, of, s.pure) for s in given if s.unit == enough]:
            return found
    return []


def _begins_as_one(path: Path) -> bool:
    """Whether the file could be a ledger, so that nothing is cut off another. A first line may be torn."""
    with path.open("rb") as opened:
        first = opened.readline(2**16)
    return not first or (first.startswith(b"{") and (b'"event":"budget"' in first or not first.endswith(b"\n")))
