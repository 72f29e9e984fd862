"""What is decoded on a sum: every method says whether sums are enough for it, and a study is refused before it runs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest

from polyclinic.core.aggregates import PerSite
from polyclinic.core.method import Method
from polyclinic.core.pipeline import UnsuitableTransforms
from polyclinic.core.rounds import Step, train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.plan import Plan
from polyclinic.methods.catalog import METHODS, Entry
from polyclinic.methods.personalization.fedsm import FedSM
from polyclinic.methods.registry import options
from polyclinic.testing import Broken, check_method
from tests.laws.test_methods import FEW_STEPS, LOCAL, case

ROUNDS = 3
SUM = {"name": "secure-sum", "limit": 2.0**14, "bits": 14, "heaviest": 1000.0}
ADAPTIVE = {"name": "adaptive-clip", "start": 1.0}


def planned(name: str, sites: Mapping[str, Site], *uplink: Mapping[str, Any], **given: Any) -> Plan:
    """The plan of the method called ``name``, as the check of a study builds it; sites have equal weight if possible."""
    _, task, _ = case(name)
    equal = {"uniform": True} if "uniform" in options(METHODS[name]) else {}
    return Plan(
        kind=task.kind,
        network=task.network.name,
        inputs=task.network.inputs,
        outputs=task.network.outputs,
        method=name,
        sites=tuple(sites),
        rounds=5,
        network_options=dict(task.network.options),
        training={"epochs": LOCAL.epochs, "batch_size": LOCAL.batch_size, "lr": LOCAL.lr},
        options={**FEW_STEPS.get(name, {}), **equal, **given},
        uplink=uplink,
    )


def places(name: str) -> dict[str, Site]:
    """Sites for the method called ``name``: one, if its data are in one place."""
    _, _, sites = case(name)
    return {"pooled": replace(sites["site-0"], name="pooled")} if METHODS[name].pooled else sites


def steps(method: Method[Any], sites: Mapping[str, Site], params: Any) -> list[Step[Any]]:
    """What ``ROUNDS`` rounds of the method are; the server has images without a hospital."""
    data = {"public": next(iter(sites.values())).data["public"]}
    return list(train(method, InProcess(method, sites, server_data=data), method.init(params), rounds=ROUNDS))


def separate(method: Method[Any], sites: Mapping[str, Site], params: Any) -> bool:
    """Whether a reply had a part that stays separate by site."""
    replies = [step.reply for step in steps(method, sites, params)]
    return any(isinstance(stat, PerSite) for reply in replies for stat in reply.parts.values())


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_declares_is_what_its_replies_are(name: str) -> None:
    sites = places(name)
    plan = planned(name, sites)
    method = plan.build_method()
    assert method.capabilities.needs_each_reply == separate(method, sites, plan.build_task().first(0))


def flags(entry: Entry) -> list[str]:
    """The options of a method that are on or off, except for the one that every method has."""
    return [key for key, option in options(entry).items() if isinstance(option.default, bool) and key != "uniform"]


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in METHODS for option in flags(METHODS[name])])
def test_it_is_true_of_every_option(name: str, option: str) -> None:
    default = options(METHODS[name])[option].default
    sites = places(name)
    plan = planned(name, sites, **{option: not default})
    method = plan.build_method()
    assert method.capabilities.needs_each_reply == separate(method, sites, plan.build_task().first(0))


@pytest.mark.parametrize("over", ["fedsm", "swarm", "fedavg"])
@pytest.mark.parametrize("name", ["fine-tuned", "fedsam"])
def test_a_method_around_another_declares_what_that_one_needs(name: str, over: str) -> None:
    sites = places(name)
    method = planned(name, sites, over=over).build_method()
    assert method.capabilities.needs_each_reply == (over != "fedavg")


@pytest.mark.parametrize("item", [SUM, ADAPTIVE], ids=["secure-sum", "adaptive-clip"])
@pytest.mark.parametrize("name", METHODS)
def test_a_study_is_refused_before_it_runs_or_runs_to_the_end(name: str, item: Mapping[str, Any]) -> None:
    sites = places(name)
    plan = planned(name, sites, item)
    bare = replace(plan, uplink=()).build_method().capabilities
    try:
        method = plan.build_method()
    except UnsuitableTransforms as error:
        said = str(error)
        assert ("needs each site's reply" in said) == bare.needs_each_reply
        assert "remove " in said or "set " in said
        assert item is ADAPTIVE or not METHODS[name].secure_sums
        assert bare.needs_each_reply or item is SUM or not bare.uniform
        return
    assert item is ADAPTIVE or METHODS[name].secure_sums
    assert not bare.needs_each_reply
    taken = steps(method, sites, plan.build_task().first(0))
    assert taken
    assert {site: reason for step in taken for site, reason in step.lost.items()} == {}


def test_an_option_that_shows_single_sites_is_refused_with_sums() -> None:
    sites = places("fedmri")
    with pytest.raises(UnsuitableTransforms, match="needs each site's reply, and SecureSum reveals only sums"):
        planned("fedmri", sites, SUM, others=True).build_method()
    planned("fedmri", sites, SUM).build_method()


@pytest.mark.parametrize(
    "coded",
    [{"name": "int8"}, {"name": "top-k", "fraction": 0.5, "shared": True}, {"name": "power-sgd", "shared": True}],
)
def test_other_encodings_of_separate_replies(coded: Mapping[str, Any]) -> None:
    """What is decoded site by site can be used with every method; what is decoded on a sum cannot."""
    sites = places("fedsm")
    plan = planned("fedsm", sites, coded)
    if coded["name"] == "int8":
        assert len(steps(plan.build_method(), sites, plan.build_task().first(0))) == ROUNDS
        return
    with pytest.raises(UnsuitableTransforms, match=r"needs each site's reply, and \w+ is decoded on a sum"):
        plan.build_method()


def test_a_sum_of_fewer_sites_than_it_needs_is_refused() -> None:
    sites = places("fedavg")
    two = dict(list(sites.items())[:2])
    with pytest.raises(UnsuitableTransforms, match="at least 3 sites, and 2 train: remove SecureSum"):
        planned("fedavg", two, SUM).build_method()
    with pytest.raises(UnsuitableTransforms, match="at least 4 sites, and 3 train"):
        planned("fedavg", sites, {**SUM, "threshold": 4}).build_method()


@dataclass(frozen=True)
class Silent(FedSM):
    """A method that does not declare that it needs each reply."""

    needs_each_reply = False


def test_the_contract_finds_a_method_that_does_not_declare_it() -> None:
    sites = places("fedsm")
    _, task, _ = case("fedsm")
    with pytest.raises(Broken, match=r"needs_each_reply .* \['personal'\]"):
        check_method(Silent(task, tuple(sites), LOCAL), task.first(0), sites)
