"""A method that asks for more than it declares breaks its promise."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from polyclinic.compression.downlink import received_through
from polyclinic.compression.zstd import Zstd
from polyclinic.core.job_enumeration import Job, shifted
from polyclinic.core.method import Request
from polyclinic.core.pipeline import send_through
from polyclinic.core.site import Site
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import Evaluated
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg, State
from polyclinic.methods.optimization.mime import Mime
from polyclinic.privacy.gaussian import Clip
from polyclinic.testing import Asked, Broken, check_method


@dataclass(frozen=True)
class Declares(FedAvg):
    """FedAvg with other declarations than it keeps."""

    declared: ClassVar[tuple[Job, ...]] = ()

    @property
    def jobs(self) -> tuple[Job, ...]:
        return self.declared


def declares(*jobs: Job) -> type[Declares]:
    return type("Declares", (Declares,), {"declared": jobs})


@pytest.mark.parametrize(
    ("jobs", "why"),
    [
        ((Job("train"),), ""),
        ((Job("train", 0, 1), Job("train", 2)), ""),
        ((Job("train", sites=("site-0", "site-1", "site-2")),), ""),
        ((), "not among"),
        ((Job("train "),), "not among"),
        ((Job("train", last=0),), "'train' in round 1 is not among"),
        ((Job("train", 1),), "'train' in round 0 is not among"),
        ((Job("train", count=0),), "came 1 times at site-0, but jobs declares at most 0"),
        ((Job("train"), Job("train", 1)), "more than once"),
        ((Job("train", sites=("site-0", "site-1")),), "is not for site-2"),
    ],
)
def test_every_ask_is_declared(
    jobs: tuple[Job, ...], why: str, task: Classification, sites: dict[str, Site], local: LocalTraining
) -> None:
    method = declares(*jobs)(task, local)
    if why:
        with pytest.raises(Broken, match=why):
            check_method(method, task.first(), sites)
    else:
        check_method(method, task.first(), sites)


def test_a_job_that_comes_twice_is_counted(task: Classification, sites: dict[str, Site], local: LocalTraining) -> None:
    asked, request = Asked(FedAvg(task, local), sites), Request(1, {})
    asked.note(request, request)
    asked.note(Request(2, {}), request)
    with pytest.raises(Broken, match="'train' in round 2 came 2 times at site-0, but jobs declares at most 1"):
        asked.note(Request(2, {}), request)


def test_a_job_with_another_model_than_the_round_began_with_says_so(
    task: Classification, sites: dict[str, Site], local: LocalTraining
) -> None:
    first = task.first()
    other = {name: leaf + 1 for name, leaf in first.items()}
    trial = Request(1, {"params": first})
    for job, fits in ((Job("train"), False), (Job("train", at_start=False), True)):
        asked = Asked(declares(job)(task, local), sites)
        asked.note(
            Request(0, {"params": other}), Request(0, {"params": first})
        )  # nothing is scored before the first round
        if fits:
            asked.note(Request(1, {"params": other}), trial)
        else:
            with pytest.raises(Broken, match="holds the model that the round begins with"):
                asked.note(Request(1, {"params": other}), trial)


def test_an_evaluation_has_the_number_of_complete_rounds(
    task: Classification, sites: dict[str, Site], local: LocalTraining
) -> None:
    class Behind(FedAvg):
        def evaluation_request(self, state: State) -> Request:
            return replace(super().evaluation_request(state), round=0)

    with pytest.raises(Broken, match="trial has the round of the state"):
        check_method(Behind(task, local), task.first(), sites)


def test_a_method_that_has_finished_is_evaluated_in_the_round_after_its_last(
    task: Classification, sites: dict[str, Site], local: LocalTraining
) -> None:
    @dataclass(frozen=True)
    class Once(FedAvg):
        def request(self, state: State) -> Request | None:  # type: ignore[override]  # FedAvg has no end
            return None if state.round else super().request(state)

    method = Once(task, local)
    check_method(method, task.first(), sites)
    assert method.evaluation_request(method.init(task.first())._replace(round=1)).round == 1


def test_whatever_wraps_a_method_has_its_jobs(task: Classification, local: LocalTraining) -> None:
    mime = Mime(task, replace(local, optimizer="sgd", momentum=0.0))
    assert [job.name for job in mime.jobs] == ["gradient", "train"]
    sent = send_through(mime, Clip(1.0))
    assert Evaluated(received_through(sent, task.first(), Zstd()), task).jobs == sent.jobs == mime.jobs


def test_delayed_jobs_keep_their_length() -> None:
    first, second = shifted([Job("a", first=1, last=2), Job("b")], 3)
    assert (first.first, first.last) == (4, 5)
    assert (second.first, second.last) == (3, None)
