"""Any method with a robust rule in place of the mean of its updates, and outlier statistics for every site.

The rules are in ``methods.robust.rules``, each with its paper. The means that a site would have sent are sent as one
update, separate by site (``PerSite``), and are converted to means again at the server, after the rule. A rule therefore
covers everything that a method averages, control variates as well as weights. It needs each update, which secure
summation does not allow.

No site is excluded automatically. The state keeps statistics of each site, ``alarms`` describes outliers, and a person
decides on ``quarantined``. A site in quarantine still receives the model and is still monitored; its updates have no
weight. Only updates that cannot be summed (other shapes, non-finite numbers) are refused automatically, by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import ElementwiseMean, PerSite, Reply, Stat, WeightedMean
from polyclinic.core.method import Capabilities, Method, MethodWrapper, Request
from polyclinic.core.pipeline import transforms_of
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.methods.robust.rules.aggregation_rule import Average, Rule, Updates, faults, median, standings
from polyclinic.methods.robust.rules.fltrust import FLTrust
from polyclinic.methods.robust.rules.outlier_watch import QUARANTINE, Note, alarms

PART, SERVER = "apart", "server"
UNSEEN = (
    "a robust rule needs each site's update, and secure summation shows only sums: leave one of them out, or "
    "limit each site's influence with clipping alone"
)


@savable("robust.State", 1)
class State(NamedTuple):
    """The inner method's state, the last aggregate by job if the rule needs it, and the statistics of every site."""

    inner: Any
    last: Trees
    notes: dict[str, Note]

    @property
    def params(self) -> Tree:
        """The inner method's server model."""
        params: Tree = self.inner.params
        return params

    @property
    def alarms(self) -> tuple[str, ...]:
        """A sentence for each site that should be investigated."""
        return alarms(self.notes)


@dataclass(frozen=True)
class Robust(MethodWrapper[State]):
    """Any method that sends means, under a rule that tolerates some faulty or hostile sites.

    Attributes:
        rule: Aggregates the updates of all sites into one.
        bound: Updates longer than this multiple of the median length are first scaled down to it; 0 for no bound.
        quarantined: The sites whose updates a person has decided to exclude.
    """

    inner: Method[Any]
    rule: Rule = field(default_factory=Average)
    bound: float = 0.0
    quarantined: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        secure = any(t.secure for t in transforms_of(self.inner))
        problems = [UNSEEN] if secure else []
        if not self.bound >= 0:
            problems.append(f"bound is a multiple of the median length, or 0 for none, not {self.bound}")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def capabilities(self) -> Capabilities:
        return replace(self.inner.capabilities, needs_each_reply=True)

    def init(self, params: Tree) -> State:
        return State(self.inner.init(params), {}, {})

    def request(self, state: State) -> Request | None:
        request = self.inner.request(state.inner)
        if request is not None and request.secure:
            raise ConfigError(UNSEEN)
        return request

    def evaluation_request(self, state: State) -> Request:
        return self.inner.evaluation_request(state.inner)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        reply, memory = self.inner.site_update(request, memory, site)
        return apart(reply, site.name), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if PART not in reply.parts:
            return state._replace(inner=self.inner.server_update(state.inner, reply, server))
        request, sent = self.inner.request(state.inner), reply.gather(PART)
        if isinstance(self.rule, FLTrust) and self.rule.root == SERVER and request is not None:
            own, _ = self.inner.site_update(request.for_site(SERVER), {}, server)
            sent = {**sent, SERVER: apart(own, SERVER).gather(PART)[SERVER]}
        refused = _refused(sent)
        values = {site: _values(leaves) for site, leaves in sent.items() if site not in refused}
        weights = {site: _weights(sent[site]) for site in values}
        out = refused | {site: QUARANTINE for site in self.quarantined if site in values}
        if not (counted := values.keys() - out.keys() - {SERVER}):
            raise ConfigError("no update is left: " + "; ".join(f"{site}: {why}" for site, why in sorted(out.items())))
        updates = Updates.of(values, {site: next(iter(w.values())) for site, w in weights.items()})
        job = "" if request is None else request.job
        bounded = self._bounded(updates.only(tuple(site for site in updates.sites if site not in out)))
        aggregate, shares = self.rule.aggregate(bounded, state.last.get(job, {}))
        parts = _means(aggregate, [weights[site] for site in sorted(counted)])
        rest = {part: stat for part, stat in reply.parts.items() if part != PART}
        seen = standings(updates.only(tuple(site for site in updates.sites if site != SERVER)))
        share = dict.fromkeys(updates.sites, 0.0) | dict(shares) if shares is not None else {}
        notes = {
            site: state.notes.get(site, Note()).after(seen.get(site), share.get(site), out.get(site, ""))
            for site in sorted(sent.keys() - {SERVER})
        }
        last = {**state.last, job: aggregate} if self.rule.remembers else {}
        inner = self.inner.server_update(state.inner, Reply({**rest, **parts}), server)
        return State(inner, last, {**state.notes, **notes})

    def _bounded(self, updates: Updates) -> Updates:
        if not self.bound:
            return updates
        longest = self.bound * median(updates.norms)  # min(1, bound · med ‖x‖ / ‖x_i‖) · x_i
        return updates.scaled((longest / updates.norms.clamp_min(1e-300)).clamp_max(1.0))


def apart(reply: Reply, site: str) -> Reply:
    """Return ``reply`` with its means as one update of ``site``; parts that are separate by site stay as they are.

    An update's leaves are named ``part/name``. If the weight of a part is not 1, ``part/`` holds it.

    Raises:
        TypeError: If a part has a weight for every element.
    """
    leaves: dict[str, torch.Tensor] = {}
    for part, stat in reply.parts.items():
        if isinstance(stat, ElementwiseMean):
            raise TypeError(
                f"{part!r} has a weight for every element, which robust rules do not support: "
                "choose another method or another rule"
            )
        if isinstance(stat, WeightedMean):
            leaves |= {f"{part}/{name}": leaf for name, leaf in stat.value.items()}
            if stat.weight != 1.0 or not stat.total:
                leaves[f"{part}/"] = torch.tensor(stat.weight, dtype=torch.float64)
    rest: dict[str, Stat] = {part: stat for part, stat in reply.parts.items() if isinstance(stat, PerSite)}
    return Reply({**rest, PART: PerSite({site: leaves})}) if leaves else reply


def _claim(key: str) -> bool:
    """Return whether a leaf is the stated weight of a part."""
    return not key.partition("/")[2]


def _values(leaves: Tree) -> Tree:
    return tree.select(leaves, lambda key: not _claim(key))


def _weights(leaves: Tree) -> dict[str, float]:
    """Return the stated weight of each part."""
    parts = sorted({key.partition("/")[0] for key in leaves})
    return {part: float(leaves[f"{part}/"]) if f"{part}/" in leaves else 1.0 for part in parts}


def _refused(sent: Mapping[str, Tree]) -> dict[str, str]:
    """Return the sites whose updates cannot be added to the others', each with the reason."""
    found = faults({site: _values(leaves) for site, leaves in sent.items()})
    for site, leaves in sent.items():
        claims = [leaf for key, leaf in leaves.items() if _claim(key)]
        if any(x.numel() != 1 or not bool(x.isfinite().all()) or not float(x) > 0 for x in claims):
            found.setdefault(site, "its stated weight is not a number above 0")
    return dict(sorted(found.items()))


def _means(aggregate: Tree, weights: list[dict[str, float]]) -> dict[str, Stat]:
    """Return the aggregate as means again, each with the sites' median stated weight times their number."""
    parts: dict[str, Stat] = {}
    for part in weights[0]:
        weight = float(median(torch.tensor([w[part] for w in weights], dtype=torch.float64))) * len(weights)
        leaves = {key.partition("/")[2]: leaf for key, leaf in aggregate.items() if key.partition("/")[0] == part}
        parts[part] = WeightedMean.of(leaves, weight)
    return parts
