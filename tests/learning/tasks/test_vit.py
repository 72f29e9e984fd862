"""The vision transformer is a classifier like the others."""

from typing import Any

import torch

from polyclinic.core.site import Site
from polyclinic.learning.networks.latent import represent
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining

SMALL = (("hidden_size", 12), ("mlp_dim", 24), ("num_heads", 2), ("num_layers", 2), ("patch_size", 4))


def test_it_predicts_and_trains(sites: dict[str, Site]) -> None:
    task = Classification(Network("vit", (1, 8, 8), 2, SMALL))
    model, x = task.model(), torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert model(x).shape == (3, 2)
    h, z = represent(task.network, model, x)
    assert h.shape == (3, 12)
    assert torch.equal(model.get_submodule("classification_head")(h), z)
    start, batch = task.first(0), sites["site-2"].data["train"][torch.arange(22)]
    end = LocalTraining(epochs=10, batch_size=8, lr=0.1).fit(task, start, sites["site-2"], 0)

    def loss(params: Any) -> Any:
        return task.loss(cached_model(task, params).eval(), batch).item()

    assert loss(end) < loss(start)
