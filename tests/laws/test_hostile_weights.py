"""One table of every method: weights that are no weights stop no round, and never reach a model."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import WEIGHT, ElementwiseMean, PerSite, Reply, Stat, WeightedMean
from polyclinic.core.method import Method, Request
from polyclinic.core.reply_validation import ReplyValidator
from polyclinic.core.rounds import Arrival, train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.errors import PolyclinicError
from polyclinic.methods.catalog import METHODS
from polyclinic.methods.registry import Setting, build
from polyclinic.methods.robust.robust_method import State as RobustState
from tests.conftest import finding_sites, little_sites, segmentation_sites
from tests.laws.test_methods import FEW_STEPS, FINDINGS, IMAGES, LOCAL, MASKS, held_by_server

NONE = (0.0, -1.0, math.nan, math.inf)
HUGE = 1e300
GATE = ReplyValidator(weight_ratio=10, norm_ratio=100)  # the limits of a deployment
CLAIMS = (WEIGHT, "/")
"""The ends of names of leaves that state a weight; the second is that of robust rules, one for each part."""
CHOOSES = ("cyclic", "fedcorr")
"""Methods that ask single sites, for which a study says that a round may go on without a reply."""
QUICK = (
    *("fedavg", "scaffold", "fedcm", "ifca", "fisher-merging", "mime", "local", "fedmix-weights", "fedpid", "cyclic"),
    *("flora", "flexlora", "fedawa", "fedlws", "feda3i", "fednoro", "auto-fedavg", "swarm", "feddf", "fedperl"),
    *("prop-ffl", "watched", "krum", "fedcorr", "dynamic-fusion", "afl", "rolora"),
)


def weighted(stat: Stat, value: float) -> Stat:
    """What a site would send that states the weight ``value``."""
    if isinstance(stat, WeightedMean):
        return WeightedMean(stat.total, value)
    if isinstance(stat, ElementwiseMean):
        return ElementwiseMean(stat.total, {n: like(x, value) for n, x in stat.weight.items()})
    items = {
        site: {n: like(x, value) if n.endswith(CLAIMS) else x for n, x in leaves.items()}
        for site, leaves in stat.items.items()
    }
    return type(stat)(items)


def like(leaf: torch.Tensor, value: float) -> torch.Tensor:
    """A tensor of one value."""
    return torch.full(leaf.shape, value, dtype=torch.float64).to(leaf.dtype)


class Hostile(InProcess):
    """An engine in which some sites state weights of their choice."""

    def __init__(self, method: Method[Any], sites: dict[str, Site], hostile: Sequence[str], value: float) -> None:
        """Create the engine, in which the sites ``hostile`` state the weight ``value``."""
        super().__init__(method, sites, server_data=held_by_server(sites))
        self.hostile, self.value, self.changed = hostile, value, False

    def _execute(self, request: Request, name: str, deadline: float | None) -> Arrival:
        arrival = super()._execute(request, name, deadline)
        if name not in self.hostile or arrival.reply is None:
            return arrival
        parts = {part: weighted(stat, self.value) for part, stat in arrival.reply.parts.items()}
        self.changed |= any(stat is not arrival.reply.parts[part] for part, stat in parts.items() if states(stat))
        return arrival._replace(reply=Reply(parts))


def states(stat: Stat) -> bool:
    """Whether a site states one weight in it."""
    if isinstance(stat, PerSite):
        return any(name.endswith(CLAIMS) for leaves in stat.items.values() for name in leaves)
    return isinstance(stat, WeightedMean)


def case(name: str) -> tuple[Method[Any], Any, dict[str, Site]]:
    """The method called ``name``, its task, and four sites of images; robust rules need three honest ones."""
    kinds = METHODS[name].tasks
    task, sites = IMAGES, little_sites(count=4)
    if kinds and "classification" not in kinds:
        task, sites = (FINDINGS, finding_sites()) if "multilabel" in kinds else (MASKS, segmentation_sites())  # type: ignore[assignment]
    return build(name, Setting(task, LOCAL, tuple(sites), rounds=5), FEW_STEPS.get(name)), task, sites


NAMED_IF_HUGE = ("fedavg", "scaffold", "flora", "flexlora", "fedawa", "feda3i", "auto-fedavg", "feddf", "prop-ffl")
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


@pytest.mark.parametrize("value", [*NONE, HUGE])
@pytest.mark.parametrize("name", EVERY)
def test_the_others_go_on_without_a_site_that_states_no_weight(name: str, value: float) -> None:
    method, task, sites = case(name)
    bad = max(sites)
    engine = Hostile(method, sites, (bad,), value)
    state, lost = method.init(task.first(0)), dict[str, str]()
    least = 0 if name in CHOOSES else 1
    for step in train(method, engine, state, rounds=3, min_replies=least, gate=GATE):
        state = step.state
        lost |= step.lost
    assert tree.finite(method.shared_model(state))
    if isinstance(state, RobustState):
        lost |= {site: note.excluded for site, note in state.notes.items() if note.excluded}
    assert not [reason for site, reason in lost.items() if site != bad and "norm" not in reason]
    if bad in lost:
        assert "weight" in lost[bad] or "NaN or infinity" in lost[bad]
    # Weights of 0 are those of sites without examples. A huge one is relative, and rules have their own limits.
    assert bad in lost or value in (0.0, HUGE) or not engine.changed
    if value == HUGE and name in NAMED_IF_HUGE:
        assert bad in lost


@pytest.mark.parametrize("value", NONE)
@pytest.mark.parametrize("name", EVERY)
def test_without_any_weight_a_run_goes_on_or_ends_with_a_message(name: str, value: float) -> None:
    method, task, sites = case(name)
    engine, state = Hostile(method, sites, tuple(sites), value), method.init(task.first(0))
    said = ""
    try:
        for step in train(method, engine, state, rounds=3, gate=GATE):
            state = step.state
    except PolyclinicError as error:
        said = str(error)
    if engine.changed:
        assert "weight" in said or "NaN or infinity" in said
        assert len(said) < 1000
    else:
        assert tree.finite(method.shared_model(state))


def test_a_weight_of_zero_hides_no_values() -> None:
    """They would be added to the sum, and no limit on a mean would apply to them."""
    hidden, none = ({"w": torch.full((3,), x)} for x in (1e6, 0.0))
    replies = {
        "a": Reply({"update": WeightedMean(hidden, 0.0)}),
        "b": Reply({"update": WeightedMean(none, 0.0)}),
        "c": Reply({"update": WeightedMean(none, 2.0)}),
    }
    lost, merged = ReplyValidator().merge(Request(0, {}), replies)
    assert lost == {"a": "update: the weight is 0, and the values are not"}
    assert merged.mean("update").weight == 2.0


@pytest.mark.parametrize(("weight", "says"), [(torch.tensor(7.0), "max_weight = 5"), (torch.ones(2), "2 numbers")])
def test_limits_hold_for_weights_that_are_separate_by_site(weight: torch.Tensor, says: str) -> None:
    reply = Reply({"update": PerSite({"a": {"w": torch.ones(3), WEIGHT: weight}})})
    assert says in str(ReplyValidator(max_weight=5.0).refused("a", reply))
