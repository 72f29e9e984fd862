"""Data vectors: sites fine-tune a common model at any time, and the server sums their changes.

Tian, Xu, Yin, Wang and Yue, arXiv 2408.13038, 2024, https://arxiv.org/abs/2408.13038: a vector is ``τ_j = θ_j − θ_pre``
and the merged model ``θ_pre + Σ_j τ_j``, after which a restoration realigns batch normalization. The full text was not
available; this follows its abstract. Additions: the scale λ, since the sum overshoots if sites agree; TIES, DARE and
lengths by layer as options; restoration by forward passes alone; late sites; and removal.

The merge is computed from all vectors, in name order, whenever one arrives. It therefore depends only on the set of
sites: the order of arrival has no effect, and removing a site gives the model without it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.method import Capabilities, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import InRunningStatistics, Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.one_shot.merging import Merging, merged, total


@savable("data-vectors.State", 1)
class State(NamedTuple):
    """The server state.

    Attributes:
        round: Number of merges. ``base``: θ_pre. ``params``: the merged model.
        sent: By site, in name order: ``vector.*`` and ``running.*``, its statistics of batch normalization.
    """

    round: int
    base: Tree
    params: Tree
    sent: Mapping[str, Tree]


@dataclass(frozen=True)
class DataVectors(Method[State]):
    """One message from each site, at any time: the change of fine-tuning the common model. The server merges.

    If the server has labeled examples (role ``val``), they determine λ; these or its unlabeled ones (role ``public``)
    re-estimate batch normalization. Without either, λ is 1/K and running statistics are the mean of the sites', which
    is one round of FedAvg with equal weights. With ``train_async`` vectors are merged as they arrive.

    Attributes:
        sites: The sites whose vectors are expected; a site sends the same vector each time. If empty, one reply
            suffices.
        scale: λ; if 0, searched on the server's labeled examples, or that of the mean without any.
        ties: The fraction of each vector's largest entries that TIES keeps; 0 for the plain sum.
        by_layer: Whether each layer of the sum is rescaled to the mean norm of the sites'.
        tune: Epochs over the server's labeled examples at the end, at a tenth of the learning rate.
        dare: The fraction of each vector's entries that DARE drops at random.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    sites: tuple[str, ...] = ()
    scale: float = 0.0
    ties: float = 0.0
    by_layer: bool = False
    tune: int = 0
    dare: float = 0.0

    capabilities = Capabilities(needs_each_reply=True)

    def __post_init__(self) -> None:
        _ = self.merging  # refuses impossible options

    @property
    def merging(self) -> Merging:
        """How vectors become one model."""
        return Merging(self.scale or None, self.ties, self.by_layer, self.tune, self.dare)

    def init(self, params: Tree) -> State:
        return State(0, params, params, {})

    def request(self, state: State) -> Request | None:
        done = state.sent.keys() >= set(self.sites) if self.sites else bool(state.sent)
        return None if done else Request(state.round, {"params": state.base})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        base = request.trees["params"]
        end = self.local.fit(self.task, base, site, 0)  # round 0: the same vector at any time
        running = InRunningStatistics(self.task)
        change = {name: leaf for name, leaf in tree.sub(end, base).items() if not running(name)}
        own = {**tree.prefixed("vector", change), **tree.prefixed("running", tree.select(end, running))}
        return Reply({"vector": PerSite({site.name: own})}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        sent = dict(sorted({**state.sent, **reply.gather("vector")}.items()))
        return self._merged(state._replace(round=state.round + 1, sent=sent), server)

    def without(self, state: State, site: str, server: Site = Site("server")) -> State:
        """Return the state as if ``site`` had never sent a vector, bit-identical except for the count of merges."""
        if site not in state.sent:
            raise ConfigError(f"there is no vector of {site!r}; there are {', '.join(state.sent) or 'none'}")
        return self._merged(state._replace(sent={k: v for k, v in state.sent.items() if k != site}), server)

    def evaluation_request(self, state: State) -> Request:
        # Not as ``params``, which is the common model that sites train from.
        return Request(state.round, {"merged": state.params})

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return request.trees["merged"]

    def _merged(self, state: State, server: Site) -> State:
        if not state.sent:
            return state._replace(params=state.base)
        vectors = {name: tree.under("vector", leaves) for name, leaves in state.sent.items()}
        means = [tree.under("running", leaves) for leaves in state.sent.values()]
        statistics = tree.scale(total(means), 1 / len(means))
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
