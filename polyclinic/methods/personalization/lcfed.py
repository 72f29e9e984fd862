"""LC-Fed: site-specific channel selection, and heads calibrated where sites disagree.

Wang, Jin and Wang, "Personalizing Federated Medical Image Segmentation via Local Calibration", ECCV 2022, Algorithm 1.
https://arxiv.org/abs/2207.04655. After the published code (https://github.com/jcwang123/FedLC): the first steps of a
round train the head alone, and the others the whole network. Departures: its two stages are run in every round instead
of one after the other, so that the second head is trained on fixed features after each round. Channel selection is
trained and averaged, as in the paper; the published code keeps it in a list that no optimizer and no average sees. Both
modules are added to the study's network, and probabilities are a softmax over classes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.latent import bottleneck, encoded_width, head_input, head_width
from polyclinic.learning.tasks.task import InHead, Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted
from polyclinic.methods.personalization.lcfed_network import Calibrated, ChannelSelected


@savable("lc-fed.State", 1)
class State(NamedTuple):
    """The network with its channel selection, as unseen sites have it, and every site's head, flattened."""

    round: int
    params: Tree
    heads: Trees


@dataclass(frozen=True)
class LCFed(SizeWeighted[State]):
    """FedAvg of the body; heads stay at the sites but all sites see them, and a second head learns from disagreement.

    Attributes:
        task: The study's task.
        sites: The training sites, in order.
        head_steps: Number of steps at the start of a round in which only the head is trained; 10 in the published code.
            At most half of the round's steps, so that the other layers are trained at sites with few images.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    sites: tuple[str, ...]
    local: LocalTraining = LocalTraining()
    head_steps: int = 10
    uniform: bool = True

    needs_each_reply = True

    def __post_init__(self) -> None:
        inputs = tuple(self.task.network.inputs)
        if (entering := head_input(self.task.network)[1:]) != inputs[1:]:
            raise ConfigError(
                f"lc-fed multiplies the features that enter the head with maps of the image, and in "
                f"{self.task.network.name} they have the size {list(entering)}, not {list(inputs[1:])}: choose another "
                "network, such as unet"
            )

    @property
    def selecting(self) -> Task:
        """The task with the channel-selecting network."""
        size = encoded_width(self.task.network)
        return self.task.with_network(
            ChannelSelected(self.task.network, bottleneck(self.task.network), size, len(self.sites))
        )

    @property
    def prediction_task(self) -> Task:
        task, features = self.selecting, head_width(self.task.network)
        return task.with_network(Calibrated(task.network, features, len(self.sites)))

    def init(self, params: Tree) -> State:
        begun = {**self.selecting.first(), **params}
        head = {"head": tree.flatten(tree.select(begun, InHead(self.task)))}
        return State(0, begun, dict.fromkeys(self.sites, head))

    def request(self, state: State) -> Request:
        heads = {"heads": torch.stack([state.heads[name]["head"] for name in self.sites])}
        return Request(state.round, {"params": state.params, "heads": heads})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        head, task = InHead(self.task), self.selecting
        own_site = {"site": torch.tensor([float(name == site.name) for name in self.sites])}
        begin = {**request.trees["params"], **memory.get("own", {}), **own_site}
        left = min(self.head_steps, self.local.count(site.data["train"]) // 2)

        def head_first(name: str, gradient: Tensor) -> Tensor | None:
            return gradient if left <= 0 or head(name) else None

        def count(_: nn.Module) -> None:
            nonlocal left
            left -= 1

        end = self.local.fit(task, begin, site, request.round, gradient_hook=head_first, after_step=count)
        calibrate = memory["calibrate"] if "calibrate" in memory else self._fresh()
        whole: Tree = {**tree.prefixed("net", end), **calibrate, **request.trees["heads"], "use": torch.ones(())}
        whole = self.local.fit(self.prediction_task, whole, site, request.round, trainable=_second, slot="calibrate")
        own = tree.select(end, head)
        shared = {n: leaf - begin[n] for n, leaf in end.items() if n not in own and n != "site"}
        update = WeightedMean.of(shared, self.site_weight(site))
        kept = {"own": {**own, **own_site}, "calibrate": tree.select(whole, _second)}
        return Reply({"update": update, "head": PerSite({site.name: {"head": tree.flatten(own)}})}), {**memory, **kept}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        heads = {**state.heads, **reply.gather("head")}
        params = reply.mean("update").apply_to(state.params)
        like = tree.select(params, InHead(self.task))  # an unseen site predicts with the mean of all heads
        mean = torch.stack([heads[name]["head"] for name in self.sites]).mean(0)
        return State(state.round + 1, {**params, **tree.unflatten(mean, like)}, heads)

    def site_model(self, request: Request, memory: Trees) -> Tree:
        net = tree.prefixed("net", {**request.trees["params"], **memory.get("own", {})})
        calibrate, use = memory.get("calibrate"), torch.tensor(float("calibrate" in memory))
        return {**net, **(self._fresh() if calibrate is None else calibrate), **request.trees["heads"], "use": use}

    def _fresh(self) -> Tree:
        return tree.select(self.prediction_task.first(), _second)


def _second(name: str) -> bool:
    return name.startswith("calibrate.")
