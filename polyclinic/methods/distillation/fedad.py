"""FedAD: one exchange, of what finished models say of public images and where they look.

Gong, Sharma, Karanam, Wu, Chen, Doermann and Innanje, "Ensemble Attention Distillation for Privacy-Preserving Federated
Learning", ICCV 2021, https://openaccess.thecvf.com/content/ICCV2021/html/Gong_Ensemble_Attention_Distillation_for_
Privacy-Preserving_Federated_Learning_ICCV_2021_paper.html, and "Preserving Privacy in Federated Learning with Ensemble
Cross-Domain Knowledge Distillation", AAAI 2022, https://doi.org/10.1609/aaai.v36i11.21446. The formulas were not all at
hand. Our reading: sites train to the end of the study's budget; each sends, for each public image, its probabilities in
100 steps, and its attention; a site counts for a class by how many examples of it it has; the server's student learns
the weighted probabilities, and the mean attention by squared distance, where the paper compares with what all sites
attend to and what any does. No weights are ever shared. Noise on what is sent, if any, is not calibrated.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from polyclinic.core.aggregates import ElementwiseMean, Reply, WeightedMean
from polyclinic.core.method import Job, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.objectives.distillation_loss import divergence, look
from polyclinic.learning.tasks.example_pool import Untargeted, public
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining


@savable("fedad.State", 1)
class State(NamedTuple):
    """The student, before and after the one exchange."""

    round: int
    params: Tree


@dataclass(frozen=True)
class FedAD(Method[State]):
    """Sites finish their training, say once what they think of public images, and the server's model learns from that.

    Needs the role ``public``, the same images at every site and at the server. One round, whatever the study plans:
    its budget of rounds becomes epochs at the sites.

    Attributes:
        local: How a site trains, in all.
        distil: How the server's student trains.
        attention: What the distance to the mean attention counts.
        levels: In how many steps probabilities are sent; 100. ``noise``: the deviation of normal noise on them.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    distil: LocalTraining = LocalTraining()
    attention: float = 1.0
    levels: int = 100
    noise: float = 0.0

    def init(self, params: Tree) -> State:
        return State(0, params)

    @property
    def jobs(self) -> tuple[Job, ...]:
        return (Job("train", last=0),)

    def request(self, state: State) -> Request | None:
        return None if state.round else Request(0, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        images, train = public(site.data, site.name, "fedad"), site.data["train"]
        end = self.local.fit(self.task, request.trees["params"], site, request.round)
        logits, where = self._seen(end, images, site.device)
        p = (logits.softmax(1) * self.levels).round() / self.levels
        if self.noise:
            p = (p + self.noise * site.secret_rng().normal(*p.shape).to(p)).clamp(0, 1)
        targets = torch.cat([train[chunk][1] for chunk in torch.arange(len(train)).split(256)])
        count = targets.bincount(minlength=p.shape[1]).to(p).expand_as(p).contiguous()
        scores = ElementwiseMean.of({"p": p}, {"p": count})
        return Reply({"scores": scores, "attention": WeightedMean.of({"where": where}, float(len(train)))}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        images = public(server.data, "the server", "fedad")
        # q_c ∝ Σ_k n_k,c p_k,c / Σ_k n_k,c
        wanted = reply.leaf_mean("scores").value["p"].clamp_min(1 / (10 * self.levels)).log()
        where = reply.mean("attention").value["where"]

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            z, seen = look(model, batch[0])
            i = batch[1].cpu()
            distance = (seen - where[i].to(seen)).square().sum(1).mean()
            return divergence(self.task.kind, z, wanted[i].to(z)) + self.attention * distance

        return State(1, self.distil.fit(self.task, state.params, server, 0, data=images, loss=loss))

    def _seen(self, params: Tree, images: Untargeted, device: str) -> tuple[Tensor, Tensor]:
        """What the model says of each image, and where it looks."""
        model = cached_model(self.task, params, device).eval()
        with torch.no_grad():
            parts = [look(model, images[chunk][0].to(device)) for chunk in torch.arange(len(images)).split(64)]
        return torch.cat([z.cpu() for z, _ in parts]), torch.cat([where.cpu() for _, where in parts])


def fedad(
    task: Task,
    local: LocalTraining,
    rounds: int,
    *,
    distil_epochs: int = 0,
    attention: float = 1.0,
    levels: int = 100,
    noise: float = 0.0,
) -> FedAD:
    """One exchange after all training; the student takes ``distil_epochs``, as many as a site where that is 0.

    Args:
        distil_epochs: The student's passes over the public images; as many as a site's over its own where 0.
    """
    whole = replace(local, epochs=local.epochs * rounds, steps=local.steps and local.steps * rounds)
    student = replace(local, epochs=distil_epochs or whole.epochs, steps=None)
    return FedAD(task, whole, student, attention, levels, noise)
