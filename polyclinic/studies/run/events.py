"""The method runs of a study, and the events of its execution."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from polyclinic.data.splits import Fold
from polyclinic.evaluation.records.method_runs import arm_name
from polyclinic.studies.config.schema import MethodSpec


@dataclass(frozen=True)
class Event:
    """An event of a run.

    Attributes:
        what: ``data`` (sites are ready), ``trial`` (a setting was tried), ``arm`` (a method run begins), ``round`` (a
            round is complete), ``tested`` (a method run ends).
        label: Label of the method.
        seed: Seed of the method run.
        round: Number of complete rounds.
        rounds: Number of all rounds.
        scores: The primary metric by site: on validation data after a round, on test data at the end.
        external: The sites in ``scores`` that do not train, which the mean over sites leaves out.
        bytes: Bytes that all sites sent and received in the round.
        lost: Sites without a usable reply in the round, each with the reason.
        notes: Sentences for the reader.
        fold: Index of the fold; None without folds.
        epsilon: The largest ε that a site has spent so far; None without a budget.
        protects: The unit that ε protects, in a few words.
    """

    what: str
    label: str = ""
    seed: int = 0
    round: int = 0
    rounds: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)
    external: tuple[str, ...] = ()
    bytes: int = 0
    lost: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    fold: int | None = None
    epsilon: float | None = None
    protects: str = ""


@dataclass(frozen=True)
class Job:
    """A method run: a method with a seed and a fold; or the trial number ``trial`` of a search, which is not tested."""

    method: MethodSpec
    seed: int
    fold: Fold | None = None
    trial: int | None = None

    @property
    def _fold(self) -> int | None:
        return None if self.fold is None else self.fold.index

    @property
    def who(self) -> dict[str, Any]:
        """The fields that identify its records."""
        fold = {} if self.fold is None else {"fold": self.fold.index}
        trial = {} if self.trial is None else {"trial": self.trial}
        return {"method": self.method.called, "seed": self.seed, **fold, **trial}

    @property
    def name(self) -> str:
        """The name of its folder."""
        return arm_name(self.method.called, self.seed, self._fold)

    def event(self, what: str, **facts: Any) -> Event:
        """Return an event of this method run."""
        return Event(what, self.method.called, self.seed, fold=self._fold, **facts)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
