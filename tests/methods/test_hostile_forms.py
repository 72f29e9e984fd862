"""One site that sends tensors of another form stops no round, at any method that sees what each site sends."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from polyclinic.attacks.adversaries import Attack
from polyclinic.attacks.poisoning import Poisoned
from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, PerSiteUniform, Reply
from polyclinic.core.method import Request
from polyclinic.core.pipeline import send_through
from polyclinic.core.reply_validation import ReplyValidator
from polyclinic.core.rounds import train
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.registry import Setting, build
from polyclinic.methods.robust.robust_method import State as RobustState
from tests.conftest import little_sites
from tests.methods.robust.test_robust_method import SumsOnly

NAMES = (
    "fedce",
    "auto-fedavg",
    "pfa",
    "gossip",
    "swarm",
    "afl",
    "prop-ffl",
    "dynamic-fusion",
    "q-ffl",
    "fedmix-weights",
    "mime",
    "feddyn",
    "fedgma",
    "ida",
    "guided-gradient",
    "median",
    "multi-krum",
    "dos",
    "centered-clipping",
    "fedawa",
    "fedlws",
    "feddg-ga",
    "fedism",
    "fednoro",
    "fedcorr",
    "fedrdn",
)


@dataclass(frozen=True)
class Longer(Attack):
    """One tensor with a number too many."""

    def update(self, own: Any, known: Any, alone: Any, together: Any) -> Any:
        name = next(iter(own))
        return {**own, name: torch.cat([own[name].reshape(-1), torch.ones(1, dtype=own[name].dtype)])}


@dataclass(frozen=True)
class Renamed(Attack):
    """A tensor that nobody asked for."""

    def update(self, own: Any, known: Any, alone: Any, together: Any) -> Any:
        name = next(iter(own))
        return {**own, f"{name}.more": torch.ones(3)}


@pytest.mark.parametrize(("name", "attack"), [*((n, Longer()) for n in NAMES), *((n, Renamed()) for n in NAMES[::5])])
def test_another_form_is_named_and_left_out(name: str, attack: Any, task: Classification) -> None:
    sites, local = little_sites(count=4), LocalTraining(steps=1)
    method = Poisoned(build(name, Setting(task, local, tuple(sites), 3)), ("site-2",), attack)
    state, lost = method.init(task.first(0)), set()
    for step in train(method, InProcess(method, sites), state, rounds=2):
        state = step.state
        lost |= set(step.lost)
    if isinstance(state.inner, RobustState):
        lost |= {site for site, note in state.inner.notes.items() if "other tensors" in note.excluded}
    assert lost == {"site-2"}
    assert tree.finite(state.params)


def test_only_gathers_that_say_so_must_be_alike() -> None:
    def replies(kind: Any) -> Any:
        return {f"s{k}": Reply({"x": kind({f"s{k}": {"a": torch.zeros(2 + (k == 1))}})}) for k in range(3)}

    request = Request(0, {})
    assert ReplyValidator().refuse(request, replies(PerSite)) == {}
    assert list(ReplyValidator().refuse(request, replies(PerSiteUniform))) == ["s1"]
    merged = replies(PerSiteUniform)["s0"] + replies(PerSiteUniform)["s2"]
    assert isinstance(merged.parts["x"], PerSiteUniform)
    assert merged.gather("x").keys() == {"s0", "s2"}


@pytest.mark.parametrize(
    "name",
    [
        "fedce",
        "auto-fedavg",
        "pfa",
        "prr-fl",
        "gossip",
        "swarm",
        "split",
        "u-split",
        "afl",
        "prop-ffl",
        "dynamic-fusion",
        "ida",
        "guided-gradient",
        "krum",
        "watched",
        "fedawa",
        "fedlws",
        "feddg-ga",
        "fedism",
        "fednoro",
        "feda3i",
        "fedcorr",
        "adain",
        "fedrdn",
    ],
)
def test_who_must_see_each_site_is_refused_under_secure_summation(
    name: str, task: Classification, local: LocalTraining
) -> None:
    method = build(name, Setting(task, local, ("a", "b", "c"), 3))
    with pytest.raises(ValueError, match="needs each site's reply"):
        send_through(method, SumsOnly())


@pytest.mark.parametrize(
    "name",
    [
        *("fedmix-weights", "loss-weighted", "fedgma", "fedsld", "feddyn", "mime", "q-ffl", "fedbuff"),
        *("fedcostwavg", "fedpidavg", "fedexp", "fedcm", "fedspeed", "ccvr", "fedproto", "fedrod", "fedala", "fedsoup"),
        *("fedfa", "mixstyle"),
    ],
)
def test_sums_are_enough_for_the_others(name: str, task: Classification, local: LocalTraining) -> None:
    """And what they ask says that nothing but a sum may be sent."""
    method = send_through(build(name, Setting(task, local, ("a", "b", "c"), 3)), SumsOnly())
    request = method.request(method.init(task.first(0)))
    assert request is not None
    assert request.secure
