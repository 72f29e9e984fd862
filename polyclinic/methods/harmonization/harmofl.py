"""HarmoFL: one amplitude spectrum for all images, and flat minima for all sites.

Jiang, Wang and Dou, "HarmoFL: Harmonizing Local and Global Drifts in Federated Learning on Heterogeneous Medical
Images", AAAI 2022: amplitude normalization (equations 3 and 4) and weight perturbation (equation 6).
https://arxiv.org/abs/2112.10775.

Departures: sites average their amplitudes in a separate request before training, so that the first round already uses
harmonized images; in the paper they are averaged after it. The running mean starts with the first minibatch and has the
intended decay (the published code rounds it to 0 and so keeps the first minibatch). The window is a share of the
spectrum; the published code's covers one frequency only. Normalization layers are the network's own.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.job_enumeration import once
from polyclinic.core.method import Job, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.fourier import AmplitudeNormalizer, crop, spectrum
from polyclinic.learning.training.local import LocalTraining
from polyclinic.learning.training.sharpness import sharpened
from polyclinic.methods.base.site_weights import SizeWeighted
from polyclinic.methods.harmonization.input_front import fronted, with_front


@savable("harmofl.State", 1)
class State(NamedTuple):
    """The model including its front's amplitude, and whether that amplitude is known."""

    round: int
    params: Tree
    harmonized: bool


@dataclass(frozen=True)
class HarmoFL(SizeWeighted[State]):
    """Sites agree on the mean amplitude spectrum of all images, apply it to every image, and train for flat minima.

    Scanners differ mostly in low-frequency amplitudes; anatomy is encoded in the phase, which is unchanged. The
    gradient is taken at ``θ + α ∇L(θ) / ‖∇L(θ)‖``, which leads to wide minima that suit all sites.

    Attributes:
        window: The share of the spectrum that is normalized, 1 for all of it.
        alpha: α, the length of the perturbation of weights; 0.05 in the paper.
        decay: v, the weight of each new minibatch in the running mean of amplitudes; 0.1 in the paper.
        uniform: Whether all sites have equal weight, as in the paper, instead of in proportion to their examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    window: float = 1.0
    alpha: float = 0.05
    decay: float = 0.1
    uniform: bool = True

    def __post_init__(self) -> None:
        _ = self.prediction_task  # refuses tables and impossible windows

    @property
    def prediction_task(self) -> Task:
        return fronted(self.task, AmplitudeNormalizer(self.task.network.inputs, self.window))

    def init(self, params: Tree) -> State:
        return State(0, with_front(self.prediction_task, params), False)

    @property
    def jobs(self) -> tuple[Job, ...]:
        return once("amplitude"), Job("train")

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params}, "train" if state.harmonized else "amplitude")

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        if request.job == "amplitude":
            return Reply({"amplitude": WeightedMean.of({"low": self._amplitude(site, request.round)})}), memory
        start = request.trees["params"]
        loss = sharpened(self.task.loss, self.alpha) if self.alpha else None
        end = self.local.fit(self.prediction_task, start, site, request.round, loss=loss)
        return Reply({"update": self.update(end, start, site)}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if not state.harmonized:
            amplitude = {"amplitude": reply.mean("amplitude").value["low"]}
            return State(0, with_front(self.prediction_task, state.params, amplitude), True)
        return State(state.round + 1, reply.mean("update").apply_to(state.params), True)

    def _amplitude(self, site: Site, round: int) -> Tensor:
        """Return ``Â ← (1 − v) Â + v · mean A(x)`` over the minibatches of an epoch, low frequencies: [C, *window]."""
        once = replace(self.local, epochs=1, steps=None, augment=None, augmentation=None)
        once, rng = replace(once, balance=0.0, balance_patients=False), site.rng(round, "amplitude")
        running: Tensor | None = None
        for x, _ in once.batches(site.data["train"], rng):
            mean = crop(spectrum(x)[0], self.window).mean(0)
            running = mean if running is None else (1 - self.decay) * running + self.decay * mean
        if running is None:
            raise ConfigError(f"site {site.name!r} has no training images, of which an amplitude could be computed")
        return running
