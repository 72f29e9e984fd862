"""Local training by a function of an installed package, or of the program that runs the study.

A package provides it as an entry point of ``polyclinic.trainings``: a function of a module, a data set, the round and a
generator, which trains the module in place. A loop of one's own, or the trainer of another library, becomes the local
training of the methods in ``METHODS``, which send what training gives. Methods that change the steps of training
(FedProx, SCAFFOLD, ...) or repeat it with other settings are refused, because such a function does not offer them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyclinic.core import extensions
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.model_tree import cached_model, params_of
from polyclinic.learning.training.local import LocalTraining, Trainable
from polyclinic.learning.training.seeding import seeded

METHODS = (
    *("local", "pooled", "cross", "fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "fedbn", "silobn"),
    *("fedper", "lg-fedavg", "krum", "median", "trimmed-mean", "data-vectors", "fisher-merging", "regmean"),
)
"""The methods whose sites train in the usual way."""


class Items(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """A site's examples as a map-style data set of PyTorch, with items (input, target)."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        x, y = self.data[torch.tensor([i % len(self)])]
        return x[0], y[0]


@dataclass(frozen=True)
class OwnTraining(LocalTraining):
    """Local training by a function.

    Attributes:
        loop: The name of the function: ``(module, data set, round, generator) -> None``. PyTorch's global generators
            are seeded before it is called, so that it repeats itself if it draws from these or from the generator.
    """

    loop: str = ""

    def fit(
        self,
        task: Trainable,
        start: Tree,
        site: Site,
        round: int,
        *,
        role: str = "train",
        data: Any = None,
        slot: str = "",
        **hooks: Any,
    ) -> Tree:
        """Return the parameters after training from ``start`` by the function. ``LocalTraining.fit`` has the arguments.

        Raises:
            ConfigError: If the method needs to change the steps of training.
        """
        if changed := sorted(name for name, hook in hooks.items() if hook is not None):
            raise ConfigError(f"training.loop: {self.loop!r} does not offer {changed[0]}, which the method needs")
        examples = Items(site.data[role] if data is None else data)
        model, rng = cached_model(task, start, site.device, slot), site.rng(round, "train", role, slot)
        with seeded(rng, site.device):
            extensions.load("trainings", self.loop)(model, examples, round, rng)
        model.zero_grad(set_to_none=True)
        return params_of(model)
