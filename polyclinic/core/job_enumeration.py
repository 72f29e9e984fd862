"""The jobs that a method may ask of a site: a finite enumeration, from which a site derives what it will answer.

Plain data; nothing here needs PyTorch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Job:
    """One kind of request that a method makes of a site.

    Attributes:
        name: The job's name, compared exactly.
        first: The first round in which it may come.
        last: The last round in which it may come; every later one where None.
        count: How often at most it comes in one round at one site.
        per_batch: How many times more for every minibatch of the site's training data in a round.
        static: Whether its reply is a statistic of the data alone, the same whenever it is asked. A secure sum of it is
            made over one roster in a run.
        at_start: Whether its trees, as far as the evaluation request of the same round has trees of the same names,
            hold the same model: the one with which the round begins.
        sites: The sites of which it may be asked; all that train where empty.
    """

    name: str = "train"
    first: int = 0
    last: int | None = None
    count: int = 1
    per_batch: int = 0
    static: bool = False
    at_start: bool = True
    sites: tuple[str, ...] = ()

    def comes_in(self, round: int) -> bool:
        """Whether it may come in ``round``."""
        return self.first <= round and (self.last is None or round <= self.last)

    def most(self, batches: int) -> int:
        """How often at most it comes in one round at a site that has ``batches`` minibatches a round."""
        return self.count + self.per_batch * batches

    def to_table(self) -> dict[str, Any]:
        """The job as a table of plain values."""
        return asdict(self)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> "Job":
        """The job in ``table``."""
        return cls(**{**table, "sites": tuple(table["sites"])})


def once(name: str, static: bool = True, **more: Any) -> Job:
    """A job of round 0 alone; by default a statistic of the data."""
    return Job(name, last=0, static=static, **more)


def within(jobs: Iterable[Job], rounds: int) -> tuple[Job, ...]:
    """``jobs`` as far as they come in the first ``rounds`` rounds."""
    most = rounds - 1
    return tuple(
        replace(job, last=most if job.last is None else min(job.last, most)) for job in jobs if job.first <= most
    )


def shifted(jobs: Iterable[Job], rounds: int) -> tuple[Job, ...]:
    """``jobs`` of a method whose round 0 is round ``rounds`` of another."""
    return tuple(
        replace(job, first=job.first + rounds, last=None if job.last is None else job.last + rounds) for job in jobs
    )
