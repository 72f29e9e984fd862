"""Data vectors: sites fine-tune one common model whenever they like, and the server adds up what each learned.

Tian, Xu, Yin, Wang and Yue, arXiv 2408.13038, 2024, https://arxiv.org/abs/2408.13038: a vector is
τ_j = θ_j − θ_pre, the merged model θ_pre + Σ_j τ_j, after which a restoration realigns batch normalization. The full
text was not at hand; this is our reading of its summary. Added by us: the scale λ, since the sum overshoots where sites
agree; TIES and lengths by layer as options; restoration by forward passes alone; late sites; and removal.

The merge is made anew from all vectors, in name order, whenever one arrives. So it depends on the set of sites alone:
who comes late changes nothing for the others, and to leave out a site is to have never asked it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.method import Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import InRunningStatistics, Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.one_shot.merging import Merging, merged, total


@savable("data-vectors.State", 1)
class State(NamedTuple):
    """What the server remembers.

    Attributes:
        round: How often it merged. ``base``: θ_pre. ``params``: the merged model.
        sent: By site, in name order: ``vector.*`` and ``running.*``, its statistics of batch normalization.
    """

    round: int
    base: Tree
    params: Tree
    sent: Mapping[str, Tree]


@dataclass(frozen=True)
class DataVectors(Method[State]):
    """One message from each site, at any time: what fine-tuning the common model changed. The server merges.

    Where the server holds labeled examples (role ``val``), they decide λ; those or its unlabeled ones (role
    ``public``) re-estimate batch normalization. Without either λ is 1/K, and running statistics are the mean of the
    sites', which is one round of FedAvg with equal sites. With ``train_async`` sites are merged as they arrive.

    Attributes:
        merging: How vectors become one model.
        sites: Whose vectors are awaited. Asked again, a site sends the same. Where empty, the first answers suffice.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    merging: Merging = Merging()
    sites: tuple[str, ...] = ()

    def init(self, params: Tree) -> State:
        return State(0, params, params, {})

    def request(self, state: State) -> Request | None:
        done = state.sent.keys() >= set(self.sites) if self.sites else bool(state.sent)
        return None if done else Request(state.round, {"params": state.base})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        base = request.trees["params"]
        end = self.local.fit(self.task, base, site, 0)  # the same vector whenever the site is ready
        running = InRunningStatistics(self.task)
        change = {name: leaf for name, leaf in tree.sub(end, base).items() if not running(name)}
        own = {**tree.prefixed("vector", change), **tree.prefixed("running", tree.select(end, running))}
        return Reply({"vector": PerSite({site.name: own})}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        sent = dict(sorted({**state.sent, **reply.gather("vector")}.items()))
        return self._merged(state._replace(round=state.round + 1, sent=sent), server)

    def without(self, state: State, site: str, server: Site = Site("server")) -> State:
        """The state as if ``site`` had never sent a vector, to the bit but for the count of merges."""
        if site not in state.sent:
            raise ConfigError(f"there is no vector of {site!r}; there are {', '.join(state.sent) or 'none'}")
        return self._merged(state._replace(sent={k: v for k, v in state.sent.items() if k != site}), server)

    def evaluation_request(self, state: State) -> Request:
        return Request(
            state.round, {"merged": state.params}
        )  # what sites train from, ``params``, stays the common model

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return request.trees["merged"]

    def _merged(self, state: State, server: Site) -> State:
        if not state.sent:
            return state._replace(params=state.base)
        vectors = {name: tree.under("vector", leaves) for name, leaves in state.sent.items()}
        means = [tree.under("running", leaves) for leaves in state.sent.values()]
        statistics = tree.scale(total(means), 1 / len(means))  # stands unless restored
        params, _ = merged(
            self.merging,
            self.task,
            {**state.base, **statistics},
            vectors,
            self.local,
            server.data.get("val"),
            server.data.get("public"),
            replace(server, name="server"),
        )
        return state._replace(params=params)


def datavectors(
    task: Task,
    local: LocalTraining,
    sites: tuple[str, ...],
    *,
    scale: float = 0.0,
    ties: float = 0.0,
    by_layer: bool = False,
    tune: int = 0,
) -> DataVectors:
    """One message from each site, merged. ``scale`` 0: searched where the server can, else that of the mean.

    Args:
        scale: λ; 0: searched where the server holds labeled examples, else that of the mean.
        ties: The share of each vector's largest entries that TIES keeps; 0 for the plain sum.
        by_layer: Whether each layer of the sum is made as long as the sites' are on average.
        tune: Passes over the server's labeled examples at the end, at a tenth of the learning rate.
    """
    return DataVectors(task, local, Merging(scale or None, ties, by_layer, tune), sites)
