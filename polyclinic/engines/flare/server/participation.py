"""Who contributed to a run, who did not, and why: for the status of the server, and for the run's last word."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyclinic.engines.flare.protocol.messages import printable


@dataclass
class Participation:
    """What is known of the sites of one run.

    Attributes:
        contributed: The sites of which at least one answer was used.
        reasons: Why each other site last contributed nothing.
        trained: The sites whose answers the last exchange used. ``asked``: whom it asked.
        lost: The sites that the last exchange lost, each with the reason.
        missing: The sites that take no part in this attempt, each with the reason.
    """

    contributed: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, records: Path, length: int, missing: Mapping[str, str]) -> "Participation":
        """From the first ``length`` bytes of a run's records, and who is ``missing`` in this attempt."""
        found = cls()
        lines = records.read_bytes()[:length].splitlines() if records.exists() else []
        for line in lines:
            fact = json.loads(line)
            if fact["kind"] == "round":
                found.step(fact["asked"], fact["lost"])
        found.missing = {site: printable(reason, 300) for site, reason in missing.items()}
        found.reasons |= found.missing
        return found

    def step(self, asked: Sequence[str], lost: Mapping[str, str]) -> None:
        """Adds what one exchange did."""
        self.asked = sorted({*asked, *lost})
        self.lost = {site: printable(reason, 300) for site, reason in lost.items()}
        self.trained = sorted(set(asked) - lost.keys())
        self.contributed |= set(self.trained)
        self.reasons |= self.lost

    def without(self, sites: Sequence[str]) -> dict[str, str]:
        """Those of ``sites`` that never contributed, each with the last reason."""
        return {s: self.reasons.get(s, "it was never asked") for s in sorted(sites) if s not in self.contributed}

    def facts(self) -> dict[str, Any]:
        """As ``status.json`` holds it."""
        return {
            "trained": self.trained,
            "asked": self.asked,
            "lost": self.lost,
            "missing": self.missing,
            "contributed": sorted(self.contributed),
        }
