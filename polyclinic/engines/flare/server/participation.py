"""Participation of the sites in a run: contributions and reasons for their absence, for the server's status and the
run.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyclinic.engines.flare.protocol.messages import printable


@dataclass
class Participation:
    """State of the sites of one run.

    Attributes:
        contributed: The sites with at least one used answer.
        reasons: Last reason why each other site did not contribute.
        trained: The sites whose answers the last exchange used. ``asked``: the sites that it called.
        lost: The sites that the last exchange lost, each with the reason.
        missing: The sites that do not take part in this attempt, each with the reason.
    """

    contributed: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, records: Path, length: int, missing: Mapping[str, str]) -> "Participation":
        """Build from the first ``length`` bytes of a run's records and from the sites ``missing`` in this attempt."""
        participation = cls()
        lines = records.read_bytes()[:length].splitlines() if records.exists() else []
        for line in lines:
            fact = json.loads(line)
            if fact["kind"] == "round":
                participation.step(fact["asked"], fact["lost"])
        participation.missing = {site: printable(reason, 300) for site, reason in missing.items()}
        participation.reasons |= participation.missing
        return participation

    def step(self, asked: Sequence[str], lost: Mapping[str, str]) -> None:
        """Add the results of one exchange."""
        self.asked = sorted({*asked, *lost})
        self.lost = {site: printable(reason, 300) for site, reason in lost.items()}
        self.trained = sorted(set(asked) - lost.keys())
        self.contributed |= set(self.trained)
        self.reasons |= self.lost

    def without(self, sites: Sequence[str]) -> dict[str, str]:
        """Return those of ``sites`` that never contributed, each with its last reason."""
        return {s: self.reasons.get(s, "it was never called") for s in sorted(sites) if s not in self.contributed}

    def facts(self) -> dict[str, Any]:
        """Return the fields of ``status.json``."""
        return {
            "trained": self.trained,
            "asked": self.asked,
            "lost": self.lost,
            "missing": self.missing,
            "contributed": sorted(self.contributed),
        }
