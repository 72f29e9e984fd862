"""RegMean: one message; each linear layer of the merged model predicts what the sites' layers predict on their data.

Xisen Jin, Xiang Ren, Daniel Preotiuc-Pietro and Pengxiang Cheng, "Dataless Knowledge Fusion by Merging Weights of
Language Models", ICLR 2023, section 3, https://arxiv.org/abs/2212.09849: the layer with the least squared difference
from all sites' layers on their own inputs X_j is ``W = (Σ_j G_j)⁻¹ Σ_j G_j W_j`` with ``G_j = X_jᵀ X_j``, whose entries
off the diagonal are multiplied by α. All other parameters are averaged. Departures: convolutions that are not grouped
are linear layers of their patches; layers with more than ``largest`` inputs are averaged; the pseudo-inverse takes the
place of the inverse; sites send changes from the common model, which gives the same result. All sums are over sites, so
that secure aggregation applies. A G_j of few examples discloses much about them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import chunks
from polyclinic.learning.networks.model_tree import cached_model, trainable
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.one_shot.one_message import OneMessage
from polyclinic.methods.optimization.fedavg import State

GRAM, PRODUCT = "gram.", "product."


@dataclass(frozen=True)
class RegMean(OneMessage):
    """One message from each site: its fine-tuned model, with the second moments of the inputs of its linear layers.

    Attributes:
        alpha: α; 0 ignores correlations between inputs, 1 takes them as they are.
        largest: The largest number of inputs of a layer that is merged by regression.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    alpha: float = 0.9
    largest: int = 2048
    uniform: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"regmean: alpha must be from 0 to 1, not {self.alpha}")

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        end, weight = self.local.fit(self.task, start, site, 0), self.site_weight(site)
        change, sums = tree.sub(end, start), dict[str, Tensor]()
        for name, gram in self.moments(end, site).items():
            scaled = self.alpha * gram + (1 - self.alpha) * gram.diag().diag()
            sums[GRAM + name] = scaled.float()
            sums[PRODUCT + name] = (scaled @ change[name].flatten(1).double().T).float()
        return Reply({"update": WeightedMean.of(change, weight), "sums": WeightedMean.of(sums, weight)}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        change, sums = dict(reply.mean("update").value), reply.mean("sums").value
        for name in [key.removeprefix(GRAM) for key in sums if key.startswith(GRAM)]:
            # ΔW = (Σ G_j)⁻¹ Σ G_j ΔW_j, transposed
            gram, product = sums[GRAM + name].double(), sums[PRODUCT + name].double()
            solved = torch.linalg.pinv(gram, rtol=1e-6, hermitian=True) @ product
            change[name] = solved.T.reshape(change[name].shape).to(change[name].dtype)
        return State(1, tree.shift(state.params, change))

    def moments(self, params: Tree, site: Site) -> dict[str, Tensor]:
        """Return ``Xᵀ X`` per example of each layer's inputs in double precision, by the name of its weights."""
        data = site.data["train"]
        model = cached_model(self.task, params, site.device).eval()
        found: dict[str, Tensor] = {}
        with torch.no_grad(), _watched(self._layers(model), found):
            for chunk in chunks(data, 64):
                model(data[chunk][0].to(site.device))
        return {name: gram / len(data) for name, gram in found.items()}

    def _layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the layers that are merged by regression, by the name of their weights."""
        trained = trainable(model)
        return {
            f"{name}.weight": layer
            for name, layer in model.named_modules()
            if f"{name}.weight" in trained and _inputs_of(layer) in range(1, self.largest + 1)
        }


@contextmanager
def _watched(layers: Mapping[str, nn.Module], found: dict[str, Tensor]) -> Iterator[None]:
    """Add the second moments of everything that ``layers`` are given to ``found``."""

    def hook(name: str) -> Any:
        def add(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = _rows(layer, given[0]).double()
            gram = (rows.T @ rows).cpu()
            found[name] = found[name] + gram if name in found else gram

        return add

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def _inputs_of(layer: nn.Module) -> int:
    """Return the number of inputs of a linear layer, or of a convolution as one; 0 of any other layer."""
    if type(layer) is nn.Linear:
        return layer.in_features
    plain = type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros"
    if plain and not isinstance(layer.padding, str):
        assert isinstance(layer, nn.Conv2d)
        return layer.weight[0].numel()
    return 0


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the inputs of a layer as rows [n, inputs]: of a convolution, the patches of all images."""
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return patches.transpose(1, 2).flatten(0, 1)
    return x.flatten(0, -2)
