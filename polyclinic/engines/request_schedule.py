"""The schedule: from an approved order, the finite list of what may be asked of one site, and what was answered of it.

A site answers a schedule, not a shape. Every request is named by its round and its job; each is answered for one
content, ever, and nothing outside of the list is answered at all. Nothing here needs PyTorch.

```
round      0          1          2    ...   rounds - 1     rounds
train      x          x          x          x                        each job of the method, as often as it declares
score/val             x          x          x              x         every `score_every` rounds, and at the end
tests                                                      x         once: the model of a scored round, or the last
```
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from polyclinic.core.job_enumeration import Job

SCORE, PREDICT_VALIDATION = "score/val", "predict/val"
TESTS = ("score/test", "predict/test", PREDICT_VALIDATION)
TESTS_OF: Mapping[str, tuple[str, ...]] = {"": (), "score/test": ("score/test",), "predict/test": TESTS}
MOST_MARKS = 64


class OrderLike(Protocol):
    """What a schedule reads of an order. See ``engines.flare.protocol.run_request.RunRequest``."""

    @property
    def plan(self) -> dict[str, Any]: ...
    @property
    def mode(self) -> str: ...
    @property
    def score_every(self) -> int: ...
    @property
    def test(self) -> str: ...
    @property
    def best(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Request:
    """One request as its message describes it.

    Attributes:
        round: Its round. ``job``: its job. ``content``: SHA-256 of its file.
        look: Whether the site is to answer with the memory that it kept for the best model.
    """

    round: int
    job: str
    content: str
    look: bool = False


@dataclass(frozen=True)
class Progress:
    """What a site has been asked in a run so far.

    Attributes:
        contents: The contents of which execution began, by round and job.
    """

    contents: Mapping[tuple[int, str], frozenset[str]]

    @property
    def reached(self) -> int:
        """The round that the run has reached here: no new content of an earlier one is answered."""
        return max((round for round, job in self.contents if job not in TESTS), default=0)

    @property
    def complete(self) -> int:
        """How many rounds are complete, as far as this site can tell: the final model is not of an earlier one."""
        rounds = (round if job == SCORE else round + 1 for round, job in self.contents if job not in TESTS)
        return max(rounds, default=0)

    @property
    def scored(self) -> frozenset[int]:
        """The rounds whose model was scored on validation data."""
        return frozenset(round for round, job in self.contents if job == SCORE)

    @property
    def tested(self) -> int | None:
        """The round whose model was tested; None before the test."""
        return next((round for round, job in self.contents if job in TESTS), None)

    def of(self, round: int, job: str) -> frozenset[str]:
        """The contents of one round's job."""
        return self.contents.get((round, job), frozenset())


@dataclass(frozen=True)
class Schedule:
    """What may be asked of one site in one run.

    Attributes:
        jobs: The training jobs that may come to this site; none where it does not train.
        batches: How many minibatches a round has here, for jobs that come once for each of them.
        rounds: How many rounds were approved.
        score_every: After every how many rounds the model is scored on validation data; 0 for never.
        test: The test that was approved; empty where none was.
        best: Whether the model of a scored round may be tested, rather than the last one alone.
    """

    jobs: tuple[Job, ...]
    batches: int
    rounds: int
    score_every: int = 0
    test: str = ""
    best: bool = False

    @classmethod
    def of(cls, order: OrderLike, jobs: Sequence[Job], site: str, batches: int = 0) -> "Schedule":
        """The schedule that follows from ``order`` for ``site``.

        Args:
            jobs: What the approved method declares; of a survey, the description alone.
            batches: How many minibatches of training data the site has in a round.
        """
        trains = site in order.plan["sites"] or order.mode == "survey"
        mine = tuple(job for job in jobs if trains and (not job.sites or site in job.sites))
        if order.mode == "survey":
            return cls(mine, batches, 1)
        best = bool(order.best) and order.score_every > 0
        return cls(mine, batches, int(order.plan["rounds"]), order.score_every, order.test, best)

    def job(self, name: str, round: int) -> Job | None:
        """The training job called ``name`` that may come in ``round``, if there is one."""
        here = 0 <= round < self.rounds
        return next((job for job in self.jobs if here and job.name == name and job.comes_in(round)), None)

    def problem(self, asked: Request, progress: Progress) -> str | None:
        """Why ``asked`` is not answered, given what was answered before; None where the schedule has it.

        Content that was begun before is not a new request: the same round and job with the same content.
        """
        if asked.content in progress.of(asked.round, asked.job):
            return None
        if asked.look and asked.job not in TESTS:
            return f"{_called(asked)} is not asked with the memory of the best model: only tests are"
        if asked.job == SCORE:
            found = self._score_problem(asked, progress)
        elif asked.job in TESTS:
            found = self._test_problem(asked, progress)
        else:
            found = self._training_problem(asked, progress)
        return None if found is None else f"{_called(asked)} {found}. The schedule: {self}"

    def bound(self, asked: Request) -> tuple[tuple[tuple[str, ...], bool], ...]:
        """Which earlier requests of the same round must have held the same model as ``asked``.

        Returns:
            Pairs of jobs' names and whether all trees must be equal, instead of those that both have.
        """
        training = tuple(dict.fromkeys(job.name for job in self.jobs if job.at_start))
        if not self.score_every:
            return ((TESTS, True),) if asked.job in TESTS else ()
        if asked.job == SCORE:
            return ((training, False),)
        if asked.job in TESTS:
            return ((SCORE, *TESTS), True), (training, False)
        job = self.job(asked.job, asked.round)
        return (((SCORE,), False),) if job is not None and job.at_start else ()

    def _training_problem(self, asked: Request, progress: Progress) -> str | None:
        job = self.job(asked.job, asked.round)
        if job is None:
            return "is not in the schedule"
        if progress.tested is not None:
            return "comes after the test, and nothing is trained any more"
        if (ended := self._ended(progress)) is not None and asked.round >= ended:
            return f"comes after the last round was scored, which was round {ended}"
        return self._late(asked, progress) or _another(asked, progress, job.most(self.batches))

    def _score_problem(self, asked: Request, progress: Progress) -> str | None:
        if not self.score_every or not 1 <= asked.round <= self.rounds:
            return "is not in the schedule"
        if progress.tested is not None:
            return "comes after the test"
        if (ended := self._ended(progress)) is not None and asked.round > ended:
            return f"comes after the last round was scored, which was round {ended}"
        return self._late(asked, progress) or _another(asked, progress, 1)

    def _test_problem(self, asked: Request, progress: Progress) -> str | None:
        if asked.job not in TESTS_OF[self.test] or not 1 <= asked.round <= self.rounds:
            return "is not in the schedule"
        if progress.tested not in (None, asked.round):
            return f"is a second test: the model of round {progress.tested} was tested"
        last = asked.round >= progress.complete
        if not last and not (self.best and (self.regular(asked.round) or asked.round in progress.scored)):
            return (
                "is neither of the last round nor of one whose model was scored"
                if self.best
                else (f"is not of the last round, and {progress.complete} rounds are complete")
            )
        if asked.job == PREDICT_VALIDATION and not progress.of(asked.round, "predict/test"):
            return "comes only after predict/test, for the thresholds of its report"
        return _another(asked, progress, 1)

    def _late(self, asked: Request, progress: Progress) -> str | None:
        if asked.round < progress.reached:
            return f"comes too late: round {progress.reached} was reached, and rounds never go back"
        return None

    def regular(self, round: int) -> bool:
        """Whether ``round`` is one of those whose model is scored as the order says."""
        return self.score_every > 0 and (round % self.score_every == 0 or round == self.rounds)

    def _ended(self, progress: Progress) -> int | None:
        """The round at which a method ended before the last one that was planned; its model is scored, too."""
        return next((round for round in sorted(progress.scored) if not self.regular(round)), None)

    def __str__(self) -> str:
        parts = []
        for job in self.jobs:
            last = self.rounds - 1 if job.last is None else min(job.last, self.rounds - 1)
            rounds = f"round {job.first}" if job.first == last else f"rounds {job.first} to {last}"
            most = job.most(self.batches)
            parts.append(f"{job.name!r} in {rounds}" + (f", {most} times each" if most > 1 else ""))
        if self.score_every:
            every = "every round" if self.score_every == 1 else f"every {self.score_every} rounds"
            parts.append(f"{SCORE!r} after {every} and at the end of {self.rounds}")
        parts += [f"{job!r} once, at the end" for job in TESTS_OF[self.test]]
        return "; ".join(parts) or "nothing"


def _called(asked: Request) -> str:
    return f"the job {asked.job!r} in round {asked.round}"


def _another(asked: Request, progress: Progress, most: int) -> str | None:
    """Why a further content of the same round and job is not answered, where ``most`` are."""
    if len(progress.of(asked.round, asked.job)) < most:
        return None
    times = "once" if most == 1 else f"{most} times"
    return f"was asked with other content before, and is answered {times}"


def marks_problem(marks: Mapping[str, str], known: Mapping[str, str], whole: bool) -> str | None:
    """Why a request with the trees ``marks`` does not hold the model of an earlier one with the trees ``known``.

    Args:
        marks: Digests of trees, by name.
        known: The same of the earlier request.
        whole: Whether all trees must be equal, instead of those that both have.
    """
    names = marks.keys() | known.keys() if whole else marks.keys() & known.keys()
    other = sorted(name for name in names if marks.get(name) != known.get(name))
    if not other:
        return None
    return f"it holds another model than was sent for this round before ({other[0][:80]!r} differs)"


def marked(names: Sequence[str]) -> tuple[str, ...]:
    """Of which trees digests are kept: at most 64, the model first."""
    return tuple(sorted(names, key=lambda name: (name != "params", name))[:MOST_MARKS])
