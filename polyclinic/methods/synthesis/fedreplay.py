"""FedReplay: sites send generators of their data, and the server trains on generated examples.

Qu, Balachandar, Zhang and Rubin, "Handling data heterogeneity with generative replay in collaborative learning for
medical imaging", Medical Image Analysis 2022. https://doi.org/10.1016/j.media.2022.102424.

The full text was not available; this follows the abstract. Each site trains an auxiliary generative model, here a
conditional variational autoencoder, and sends its generator and its number of examples of each class. The server draws
examples with equal class probabilities, each from the sites that have the class, and trains the primary model on them.
One round is the paper's single exchange; in further ones sites continue training their generators.

No gradient of real data reaches the server, but a generator can reproduce memorized examples: this is not privacy.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.method import Capabilities, Method, Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.generative import Replay
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.tasks.data_sums import count_up
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import State


@dataclass(frozen=True)
class FedReplay(Method[State]):
    """The server trains on generated examples with balanced classes.

    Attributes:
        local: The server's training of the primary model in a round.
        examples: Number of examples that the server draws for a round.
        epochs: Epochs of a site's generator over its data in a round.
        lr: Step size of the generator's Adam.
        latent: Dimension of the latent space.
        width: Width of the generator.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    examples: int = 256
    epochs: int = 10
    lr: float = 2e-3
    latent: int = 16
    width: int = 16

    capabilities = Capabilities(needs_each_reply=True)

    @property
    def replay(self) -> Replay:
        """The auxiliary model."""
        return Replay(self.task.network.inputs, self.task.network.outputs, self.latent, self.width)

    def init(self, params: Tree) -> State:
        return State(0, params)

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        begin = memory.get("replay", self.replay.first())
        learn = LocalTraining(self.epochs, self.local.batch_size, "adam", self.lr)
        end = learn.fit(self.replay, begin, site, request.round, slot="replay")
        counts = count_up(site.data["train"], self.task.label_count)["classes"]
        sent = {**tree.select(end, _generates), "classes": counts}
        return Reply({"generator": PerSite({site.name: sent})}), {**memory, "replay": end}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        drawn = self._draw(reply.gather("generator"), server, state.round)
        return State(state.round + 1, self.local.fit(self.task, state.params, server, state.round, data=drawn))

    def _draw(self, generators: Trees, server: Site, round: int) -> "Drawn":
        """Return examples with y uniform over the existing classes, and sites in proportion to their examples of y."""
        rng, fixed = server.rng(round, "replay"), self.replay.first()
        counts = torch.stack([sent["classes"] for sent in generators.values()]).clamp_min(0)  # [sites, classes]
        present = (counts.sum(0) > 0).double()
        if not present.any():  # no site has an example, if they are honest
            return Drawn(torch.zeros(0, *self.task.network.inputs), torch.zeros(0, dtype=torch.long))
        y = torch.multinomial(present, self.examples, replacement=True, generator=rng)
        origin = torch.multinomial(counts.T[y], 1, generator=rng).squeeze(1)
        x = torch.zeros(self.examples, *self.task.network.inputs)
        for k, sent in enumerate(generators.values()):
            model = cached_model(self.replay, {**fixed, **tree.select(sent, _generates)}, server.device).eval()
            if bool((chosen := origin == k).any()):
                x[chosen] = self.replay.generate(model, y[chosen].to(server.device), rng).cpu()
        return Drawn(x, y)


@dataclass(frozen=True)
class Drawn:
    """Examples in memory."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor) -> Batch:
        return self.x[index], self.y[index]


def _generates(name: str) -> bool:
    return name.startswith("decoder.")
