"""Jobs of a method: the finite list of requests that it may make of a site. A site refuses all others.

Plain data; this module does not need PyTorch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Job:
    """One kind of request that a method makes.

    Attributes:
        name: Name of the job, compared exactly.
        first: The first round in which it may be requested.
        last: The last round in which it may be requested; None for no limit.
        count: The maximum number of requests in one round at one site.
        per_batch: The number of further requests for each minibatch of the site's training data in a round.
        static: Whether its reply is a statistic of the data alone, the same in every round. Its secure sum is computed
            over one roster in a run.
        at_start: Whether its trees, as far as the evaluation request of the same round has trees of the same names,
            hold the same model: the one at the start of the round.
        sites: The sites of which it may be requested; all training sites if empty.
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
        """Return whether the job may be requested in ``round``."""
        return self.first <= round and (self.last is None or round <= self.last)

    def most(self, batches: int) -> int:
        """Return the maximum number of requests in one round at a site with ``batches`` minibatches per round."""
        return self.count + self.per_batch * batches

    def to_table(self) -> dict[str, Any]:
        """Return the job as a table of plain values."""
        return asdict(self)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> "Job":
        """Build the job from ``table``, the inverse of ``to_table``."""
        return cls(**{**table, "sites": tuple(table["sites"])})


def once(name: str, static: bool = True, **more: Any) -> Job:
    """Return a job of round 0 alone; by default a statistic of the data."""
    return Job(name, last=0, static=static, **more)


def within(jobs: Iterable[Job], rounds: int) -> tuple[Job, ...]:
    """Restrict ``jobs`` to the first ``rounds`` rounds."""
    most = rounds - 1
    return tuple(
        replace(job, last=most if job.last is None else min(job.last, most)) for job in jobs if job.first <= most
    )


def shifted(jobs: Iterable[Job], rounds: int) -> tuple[Job, ...]:
    """Delay ``jobs`` by ``rounds`` rounds, for a method whose round 0 is round ``rounds`` of another."""
    return tuple(
        replace(job, first=job.first + rounds, last=None if job.last is None else job.last + rounds) for job in jobs
    )
