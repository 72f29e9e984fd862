"""FedAD: one exchange, of the predictions and attention of fully trained models on public images.

Gong, Sharma, Karanam, Wu, Chen, Doermann and Innanje, "Ensemble Attention Distillation for Privacy-Preserving Federated
Learning", ICCV 2021, https://openaccess.thecvf.com/content/ICCV2021/html/Gong_Ensemble_Attention_Distillation_for_
Privacy-Preserving_Federated_Learning_ICCV_2021_paper.html, and "Preserving Privacy in Federated Learning with Ensemble
Cross-Domain Knowledge Distillation", AAAI 2022, https://doi.org/10.1609/aaai.v36i11.21446. Not all formulas were
available. Interpretation: sites train to the end of the study's budget; each sends, for each public image, its
probabilities in 100 steps, and its attention; a site's weight for a class is its number of examples of it; the server's
student learns the weighted probabilities, and the mean attention by squared distance, whereas the paper compares with
the intersection and union of the sites' attention. Weights are never shared. Noise on the values sent is not
calibrated.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from polyclinic.core.aggregates import ElementwiseMean, Reply, WeightedMean
from polyclinic.core.method import Capabilities, Job, Method, Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.batch import Batch, chunks, targets_of
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.objectives.distillation_loss import divergence, look
from polyclinic.learning.tasks.example_pool import Untargeted, public
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import State


@dataclass(frozen=True)
class FedAD(Method[State]):
    """Sites finish their training and send predictions on public images once; the server's model learns from these.

    Needs the role ``public``, the same images at every site and at the server. There is one round: the study's budget
    of rounds becomes epochs at the sites.

    Attributes:
        rounds: Number of planned rounds, by which the epochs of ``local`` are multiplied.
        distil_epochs: Epochs of the student over the public images; as many as a site's over its own if 0.
        attention: Weight of the distance to the mean attention.
        levels: Number of steps in which probabilities are sent; 100.
        noise: Standard deviation of normal noise on them.
    """

    task: Task
    rounds: int
    local: LocalTraining = LocalTraining()
    distil_epochs: int = 0
    attention: float = 1.0
    levels: int = 100
    noise: float = 0.0

    capabilities = Capabilities(uniform=False)

    @property
    def whole(self) -> LocalTraining:
        """A site's training in all rounds together."""
        local, rounds = self.local, self.rounds
        return replace(local, epochs=local.epochs * rounds, steps=local.steps and local.steps * rounds)

    @property
    def distil(self) -> LocalTraining:
        """The student's training."""
        return replace(self.local, epochs=self.distil_epochs or self.whole.epochs, steps=None)

    def init(self, params: Tree) -> State:
        return State(0, params)

    @property
    def jobs(self) -> tuple[Job, ...]:
        return (Job("train", last=0),)

    def request(self, state: State) -> Request | None:
        return None if state.round else Request(0, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        images, train = public(site.data, site.name, "fedad"), site.data["train"]
        end = self.whole.fit(self.task, request.trees["params"], site, request.round)
        logits, where = self._seen(end, images, site.device)
        p = (logits.softmax(1) * self.levels).round() / self.levels
        if self.noise:
            p = (p + self.noise * site.secret_rng().normal(*p.shape).to(p)).clamp(0, 1)
        targets = targets_of(train)
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
        """Return the model's logits of each image, and its attention."""
        model = cached_model(self.task, params, device).eval()
        with torch.no_grad():
            parts = [look(model, images[chunk][0].to(device)) for chunk in chunks(images, 64)]
        return torch.cat([z.cpu() for z, _ in parts]), torch.cat([where.cpu() for _, where in parts])
