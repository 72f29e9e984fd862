"""VAFL: every hospital's images are translated to the style of the site with the lowest variation.

Yan, Wicaksana, Wang, Yang and Cheng, "Variation-Aware Federated Learning With Multi-Source Decentralized Medical Image
Data", IEEE Journal of Biomedical and Health Informatics 2021. https://doi.org/10.1109/JBHI.2020.3040015.

The full text was not available; this follows the abstract. The site of the lowest complexity generates images with a
Wasserstein GAN (without PPWGAN-GP's noise) and shares those that are distinct from every real one; every other site
learns to translate its images into that style with its own CycleGAN; FedAvg then trains on translated images.
Complexity is the mean variance of a pixel over a site's standardized images. All this precedes round 0.

An image is distinct if it is further from the nearest real image than the median distance of real images to their
nearest ones. This does not guarantee privacy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.job_enumeration import once
from polyclinic.core.method import Capabilities, Job, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import DataError
from polyclinic.learning.networks.model_tree import cached_model, initial, params_of
from polyclinic.learning.objectives.style_translation import (
    Cycle,
    Synthesis,
    Translator,
    images_only,
    in_turn,
    standardized,
)
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.preparation import Prepared
from polyclinic.methods.harmonization.input_front import fronted, in_front
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.partial_personalization import Personal


@savable("vafl.State", 1)
class State(NamedTuple):
    """Each site's complexity, the shared images, and whether all other sites have trained their translators."""

    complexity: Trees
    images: Tree
    learned: bool


@dataclass(frozen=True)
class CommonStyle:
    """Trains a translator for each site, from its own style to that of the site with the lowest variation.

    Attributes:
        epochs: Epochs over a site's images for each of the two adversarial trainings.
        lr: Step size of their Adam.
        share: Number of generated images that are shared.
        width: Width of translators, generator and critics.
        cycle: λ, the weight of cycle consistency; 10 in CycleGAN, which takes many more steps.
    """

    task: Task
    epochs: int = 20
    lr: float = 2e-3
    share: int = 32
    width: int = 16
    cycle: float = 1.0
    batch_size: int = 16

    capabilities = Capabilities(needs_each_reply=True)

    def init(self, params: Tree) -> State:
        return State({}, {}, False)

    @property
    def jobs(self) -> tuple[Job, ...]:
        return once("complexity"), once("synthesize", static=False), once("translate", static=False)

    def request(self, state: State) -> Request | None:
        if state.learned:
            return None
        if not state.complexity:
            return Request(0, {}, "complexity")
        target = min(state.complexity, key=lambda name: float(state.complexity[name]["complexity"]))
        if not state.images:
            return Request(0, {}, "synthesize", recipients=(target,))
        return Request(
            0, {"images": state.images}, "translate", recipients=tuple(n for n in state.complexity if n != target)
        )

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        data, sent = site.data["train"], {}
        if request.job == "complexity":
            if len(data) < 2:
                raise DataError(
                    f"vafl compares the variance of a pixel, and site {site.name!r} has {len(data)} training "
                    f"{'image' if len(data) == 1 else 'images'}: it needs at least two"
                )
            sent = {"complexity": standardized(data[torch.arange(len(data))][0]).var(0).mean()}
        elif request.job == "synthesize":
            sent = {"images": self._synthesize(site)}
        else:
            return Reply(), {
                **memory,
                "own": tree.prefixed("front", self._translator(request.trees["images"]["images"], site)),
            }
        return Reply({"found": PerSite({site.name: sent})}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if state.images:
            return state._replace(learned=True)
        found = reply.gather("found")
        if not state.complexity:
            return state._replace(complexity=found)
        return state._replace(images=next(iter(found.values())), learned=len(state.complexity) < 2)

    def front(self, state: State) -> Tree:
        return tree.prefixed("front", initial(Translator(self.task.network.inputs, self.width), 0))

    def _synthesize(self, site: Site) -> Tensor:
        """Return generated images that are distinct from every real one, ordered by the critic's score."""
        gan, rng = Synthesis(self.task.network.inputs, self.width), site.rng(0, "noise")
        model: Any = cached_model(gan, gan.first(), site.device)
        images = site.data["train"][torch.arange(len(site.data["train"]))][0]
        mean, std = images.mean(), images.std().clamp_min(1e-6)  # the generator works in the range it is built for
        in_turn(
            model,
            self._local,
            site,
            "synthesize",
            lambda x: gan.judge(model, (x - mean) / std, rng),
            lambda x: gan.please(model, len(x), rng, site.device),
        )
        with torch.no_grad():
            made = gan.make(model, 4 * self.share, rng, site.device)
            liked = model["judge"](made).flatten(1).mean(1).cpu()
        made, real = made.cpu() * std + mean, images.flatten(1)
        between = torch.cdist(real, real).fill_diagonal_(torch.inf).amin(1)
        distinct = torch.cdist(made.flatten(1), real).amin(1) > between.median()
        last = liked - liked.max() + liked.min() - 1  # those that are not distinct come last
        order = torch.where(distinct, liked, last).argsort(descending=True)
        chosen: Tensor = made[order[: self.share]]
        return chosen

    def _translator(self, images: Tensor, site: Site) -> Tree:
        """Return a translator from this site's style to that of ``images``, trained by cycle consistency."""
        cycle, rng = Cycle(self.task.network.inputs, self.width, self.cycle), site.rng(0, "pairs")
        model: Any = cached_model(cycle, cycle.first(), site.device)

        def against(loss: Any) -> Callable[[Tensor], Tensor]:
            def both(own: Tensor) -> Tensor:
                found: Tensor = loss(model, own, images[torch.randint(len(images), (len(own),), generator=rng)].to(own))
                return found

            return both

        in_turn(model, self._local, site, "translate", against(cycle.judge), against(cycle.translate))
        return tree.under("there", params_of(model))

    @property
    def _local(self) -> LocalTraining:
        return LocalTraining(self.epochs, self.batch_size, "adam", self.lr)


def vafl(
    task: Task,
    local: LocalTraining,
    *,
    epochs: int = 20,
    lr: float = 2e-3,
    share: int = 32,
    width: int = 16,
    cycle: float = 1.0,
    uniform: bool = False,
) -> Prepared:
    """Compose the training of translators with FedAvg on translated images. An unseen site's images are not changed.

    Args:
        epochs: Epochs over a site's images for each of the two adversarial trainings.
        lr: Step size of their Adam.
        share: Number of generated images that are shared.
        width: Width of translators, generator and critics.
        cycle: λ, the weight of cycle consistency; 10 in CycleGAN, which takes many more steps.
    """
    images_only(task.network.inputs)
    found = CommonStyle(task, epochs, lr, share, width, cycle, local.batch_size)
    task = fronted(task, Translator(task.network.inputs, width))
    return Prepared(found, Personal(FedAvg(task, local, uniform=uniform), in_front), task)
