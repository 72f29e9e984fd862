"""Split learning: the network is divided, and activations and gradients are exchanged instead of the model.

Otkrist Gupta and Ramesh Raskar, "Distributed learning of deep neural network over multiple agents", Journal of Network
and Computer Applications 116 (2018), https://arxiv.org/abs/1810.06060; Vepakomma, Gupta, Swedish and Raskar, "Split
learning for health", 2018, https://arxiv.org/abs/1812.00564 (the U shape); for fundus photographs and chest X-rays
Maarten Poirot and others, 2019, https://arxiv.org/abs/1912.12115. Sites train in turn and pass their layers on.

Plain: a site holds the first layers, the server the rest, and labels are sent. U-shaped: the last layer is also at the
site, and labels are not sent. In both, the activations of every minibatch leave the site, and images can often be
reconstructed from them: dividing a network does not provide privacy.

The simulation shows learning that is bit-identical to training one model on all sites' minibatches, and the number of
messages. It does not show the speed of a network, since a message is a function call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.method import Capabilities, Job, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.objectives.distillation_loss import Said
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.learning.training.seeding import seeded
from polyclinic.methods.topology.network_chain import Piece, first_bend, length


@savable("split.State", 1)
class State(NamedTuple):
    """The model, the site in turn, and the tensors in transit between the parts.

    Attributes:
        params: The server's present layers, and the sites' as they were last passed on.
        at: Position of the site in turn. ``batch``: index of its minibatch. ``job``: the next job.
        sends: Trees that the site receives next. ``keeps``: tensors that the server still needs.
    """

    round: int
    params: Tree
    at: int
    batch: int
    job: str
    sends: Trees
    keeps: Tree


@dataclass(frozen=True)
class Split(Method[State]):
    """One model in parts: the first layers at the site in turn, the rest at the server.

    Attributes:
        sites: The sites in order.
        cut: Number of first layers at the site; if 0, all up to the first nonlinear one.
        u_shaped: Whether the site also holds the last layer, so that labels are not sent.
    """

    task: Task
    sites: tuple[str, ...]
    local: LocalTraining = LocalTraining()
    cut: int = 0
    u_shaped: bool = True

    def __post_init__(self) -> None:
        local, most, problems = self.local, length(self.task) - 2, []
        if local.optimizer != "sgd" or local.momentum or local.penalty or local.clip_norm is not None:
            problems.append(
                "in split learning each part takes its own steps: use plain sgd, with momentum = 0 and "
                "neither a penalty nor clip_norm"
            )
        if local.keep_optimizer:
            problems.append("in split learning optimizers begin anew at each step: set keep_optimizer = false")
        if not 0 <= self.cut <= most:
            problems.append(f"cut must leave the server a layer: 1 to {most}, or 0 to choose, not {self.cut}")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def front(self) -> Piece:
        """The first layers, at a site."""
        return Piece(self.task, 0, self.cut or min(first_bend(self.task), length(self.task) - 2))

    @property
    def body(self) -> Piece:
        """The layers at the server."""
        return Piece(self.task, self.front.stop, length(self.task) - self.u_shaped)

    @property
    def tail(self) -> Piece:
        """The last layers, at a site; none unless U-shaped."""
        return Piece(self.task, self.body.stop, length(self.task))

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(needs_each_reply=True, minibatches=self.local.count)

    def init(self, params: Tree) -> State:
        return State(0, params, 0, 0, "front", {}, {})

    @property
    def jobs(self) -> tuple[Job, ...]:
        front = Job("front", per_batch=1)  # once for every minibatch, and once more to pass the layers on
        return (front, Job("tail", count=0, per_batch=1)) if self.u_shaped else (front,)

    def request(self, state: State) -> Request:
        body, begins = self.body.of(state.params), state.batch == 0 and state.job == "front"
        ends = {name: leaf for name, leaf in state.params.items() if name not in body}
        trees = {**state.sends, "ends": ends} if begins else state.sends
        return Request(state.round, trees, state.job, recipients=(self.sites[state.at],))

    def evaluation_request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        begins = "ends" in request.trees
        ends, b = (request.trees["ends"], 0) if begins else (memory["ends"], int(memory["at"]["batch"]))
        with seeded(site.rng(request.round, request.job, b), site.device):
            if request.job == "tail":
                said, batch = request.trees["said"]["h"], self._batch(b, request.round, site)
                ends, back = self.tail.learn(ends, said, self._against(batch), self.local, request.round, site.device)
                return self._reply(site, {"gradient": back}, ends, b, memory)
            if "gradient" in request.trees:  # of the last minibatch
                x, g = self._batch(b, request.round, site)[0], request.trees["gradient"]["h"].to(site.device)
                ends, _ = self.front.learn(ends, x, lambda h: (h * g).sum(), self.local, request.round, site.device)
                b += 1
        if b == self.local.count(site.data["train"]):
            return Reply({"ends": PerSite({site.name: ends})}), memory
        x, y = self._batch(b, request.round, site)
        with seeded(site.rng(request.round, request.job, b), site.device):
            sent = {"h": self.front.say(ends, x, site.device)}
        return self._reply(site, sent if self.u_shaped else {**sent, "y": y.cpu()}, ends, b, memory)

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if "sent" not in reply.parts:  # the turn is over; a lost site passes nothing on
            ends = next(iter(reply.gather("ends").values())) if reply.parts else {}
            at = (state.at + 1) % len(self.sites)
            return State(state.round + (at == 0), {**state.params, **ends}, at, 0, "front", {}, {})
        (sent,) = reply.gather("sent").values()
        with seeded(server.rng(state.round, state.at, state.batch), server.device):
            if self.u_shaped and state.job == "front":
                said = self.body.say(state.params, sent["h"], server.device)
                return state._replace(job="tail", sends={"said": {"h": said}}, keeps=sent)
            if self.u_shaped:
                x, g = state.keeps["h"], sent["gradient"].to(server.device)
                params, back = self.body.learn(
                    state.params, x, lambda h: (h * g).sum(), self.local, state.round, server.device
                )
            else:
                loss = self._against((sent["h"], sent["y"].to(server.device)))
                params, back = self.body.learn(state.params, sent["h"], loss, self.local, state.round, server.device)
        sends = {"gradient": {"h": back}}
        return State(state.round, params, state.at, state.batch + 1, "front", sends, {})

    def _reply(self, site: Site, sent: Tree, ends: Tree, b: int, memory: Trees) -> tuple[Reply, Trees]:
        kept = {**memory, "ends": ends, "at": {"batch": torch.tensor(b)}}
        return Reply({"sent": PerSite({site.name: sent})}), kept

    def _against(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        return lambda said: self.task.loss(Said(said), batch)

    def _batch(self, b: int, round: int, site: Site) -> Batch:
        """Return the b-th minibatch of the site's turn."""
        batches = self.local.batches(site.data["train"], site.rng(round, "split"), site.device)
        return next(islice(batches, b, None))
