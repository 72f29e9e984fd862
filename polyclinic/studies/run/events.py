"""What a study's run is made of, arm by arm, and what is told of it while it runs."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from polyclinic.data.splits import Fold
from polyclinic.evaluation.records.record_schema import arm_name
from polyclinic.studies.config.schema import MethodSpec


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Attributes:
        what: ``data`` (sites are ready), ``trial`` (a setting was tried), ``arm`` (one begins), ``round`` (one is
            complete), ``tested`` (an arm ends).
        label: Which method, and ``seed`` which seed, ``fold`` which fold; None where there are none.
        round: How many rounds of ``rounds`` are complete.
        scores: The primary metric by site: on validation data after a round, on test data at the end.
        bytes: What all sites sent and received in the round.
        lost: Sites that sent nothing usable in the round, each with the reason.
        notes: Sentences for people.
        epsilon: The largest ε that a site has spent so far; None where nothing is paid for. ``protects``: whom it
            protects, in a few words.
    """

    what: str
    label: str = ""
    seed: int = 0
    round: int = 0
    rounds: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)
    bytes: int = 0
    lost: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    fold: int | None = None
    epsilon: float | None = None
    protects: str = ""


@dataclass(frozen=True)
class Job:
    """Which arm: a method, a seed, and a fold where there are folds; ``trial`` where it is a search's, never tested."""

    method: MethodSpec
    seed: int
    fold: Fold | None = None
    trial: int | None = None

    @property
    def _fold(self) -> int | None:
        return None if self.fold is None else self.fold.index

    @property
    def who(self) -> dict[str, Any]:
        """What marks its records."""
        fold = {} if self.fold is None else {"fold": self.fold.index}
        trial = {} if self.trial is None else {"trial": self.trial}
        return {"method": self.method.called, "seed": self.seed, **fold, **trial}

    @property
    def name(self) -> str:
        """Its folder's name."""
        return arm_name(self.method.called, self.seed, self._fold)

    def event(self, what: str, **facts: Any) -> Event:
        """Something that happened to it."""
        return Event(what, self.method.called, self.seed, fold=self._fold, **facts)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
