"""Request schedule: the finite list of requests that an approved run allows for one site, and the record of answers.

A site answers a list of requests, not any request of a valid form. Each is identified by its round and its job, and is
answered for one content only; requests outside the list are not answered. This module does not need PyTorch.

```
round      0          1          2    ...   rounds - 1     rounds
train      x          x          x          x                        each job of the method, up to its declared count
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
    """The fields of a run request that a schedule reads. See ``engines.flare.protocol.run_request.Order``."""

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
        round: Its round.
        job: Its job.
        content: SHA-256 of its file.
        look: Whether the site is to answer with the site state stored for the best model.
    """

    round: int
    job: str
    content: str
    look: bool = False


@dataclass(frozen=True)
class Progress:
    """Record of the requests that a site has answered in a run.

    Attributes:
        contents: The contents whose execution began, by round and job.
    """

    contents: Mapping[tuple[int, str], frozenset[str]]

    @property
    def reached(self) -> int:
        """The round that the run has reached at this site. New content of an earlier round is not answered."""
        return max((round for round, job in self.contents if job not in TESTS), default=0)

    @property
    def complete(self) -> int:
        """Number of completed rounds as far as this site can determine. The final model is of this round or a later."""
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
        """Return the contents of one round's job."""
        return self.contents.get((round, job), frozenset())


@dataclass(frozen=True)
class Schedule:
    """The requests that are allowed for one site in one run.

    Attributes:
        jobs: The training jobs for this site; empty if it does not train.
        batches: Number of minibatches per round at this site, for jobs that are requested once per minibatch.
        rounds: Number of approved rounds.
        score_every: Number of rounds between two scorings of the model on validation data; 0 for never.
        test: The approved test; empty if none.
        best: Whether the model of any scored round may be tested, and not only the last one.
    """

    jobs: tuple[Job, ...]
    batches: int
    rounds: int
    score_every: int = 0
    test: str = ""
    best: bool = False

    @classmethod
    def of(cls, order: OrderLike, jobs: Sequence[Job], site: str, batches: int = 0) -> "Schedule":
        """Derive the schedule of ``site`` from the run request ``order``.

        Args:
            jobs: The jobs that the approved method declares; for a survey, the description alone.
            batches: Number of minibatches of training data per round at the site.
        """
        trains = site in order.plan["sites"] or order.mode == "survey"
        mine = tuple(job for job in jobs if trains and (not job.sites or site in job.sites))
        if order.mode == "survey":
            return cls(mine, batches, 1)
        best = bool(order.best) and order.score_every > 0
        return cls(mine, batches, int(order.plan["rounds"]), order.score_every, order.test, best)

    def job(self, name: str, round: int) -> Job | None:
        """Return the training job ``name`` if it may be requested in ``round``."""
        planned = 0 <= round < self.rounds
        return next((job for job in self.jobs if planned and job.name == name and job.comes_in(round)), None)

    def problem(self, asked: Request, progress: Progress) -> str | None:
        """Return why ``asked`` is not answered after ``progress``; None if the schedule allows it.

        A request with the round, job and content of an earlier one is a repetition and is allowed.
        """
        if asked.content in progress.of(asked.round, asked.job):
            return None
        if asked.look and asked.job not in TESTS:
            return f"{_called(asked)} must not use the site state of the best model: only tests may"
        if asked.job == SCORE:
            found = self._score_problem(asked, progress)
        elif asked.job in TESTS:
            found = self._test_problem(asked, progress)
        else:
            found = self._training_problem(asked, progress)
        return None if found is None else f"{_called(asked)} {found}. The schedule: {self}"

    def bound(self, asked: Request) -> tuple[tuple[tuple[str, ...], bool], ...]:
        """Return the earlier requests of the same round that must have contained the same model as ``asked``.

        Returns:
            Pairs of job names and whether all trees must be equal, instead of the common ones only.
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
            return "comes after the test, after which no training is allowed"
        if (ended := self._ended(progress)) is not None and asked.round >= ended:
            return f"comes after the final scoring, in round {ended}"
        return self._late(asked, progress) or _another(asked, progress, job.most(self.batches))

    def _score_problem(self, asked: Request, progress: Progress) -> str | None:
        if not self.score_every or not 1 <= asked.round <= self.rounds:
            return "is not in the schedule"
        if progress.tested is not None:
            return "comes after the test"
        if (ended := self._ended(progress)) is not None and asked.round > ended:
            return f"comes after the final scoring, in round {ended}"
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
            return f"comes too late: round {progress.reached} was reached, and earlier rounds are closed"
        return None

    def regular(self, round: int) -> bool:
        """Return whether the model is regularly scored after ``round``."""
        return self.score_every > 0 and (round % self.score_every == 0 or round == self.rounds)

    def _ended(self, progress: Progress) -> int | None:
        """Return the round in which a method ended before the last planned round; its model is scored, too."""
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
    """Return why a further content of the same round and job is not answered, if ``most`` contents were."""
    if len(progress.of(asked.round, asked.job)) < most:
        return None
    times = "once" if most == 1 else f"{most} times"
    return f"was requested with other content before, and is answered {times}"


def marks_problem(marks: Mapping[str, str], known: Mapping[str, str], whole: bool) -> str | None:
    """Return why a request with the trees ``marks`` does not contain the model of an earlier one with ``known``.

    Args:
        marks: Digests of trees, by name.
        known: The digests of the earlier request.
        whole: Whether all trees must be equal, instead of the common ones only.
    """
    names = marks.keys() | known.keys() if whole else marks.keys() & known.keys()
    other = sorted(name for name in names if marks.get(name) != known.get(name))
    if not other:
        return None
    return f"it contains a different model from the earlier request of this round ({other[0][:80]!r} differs)"


def marked(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the trees whose digests are stored: at most 64, the model first."""
    return tuple(sorted(names, key=lambda name: (name != "params", name))[:MOST_MARKS])
