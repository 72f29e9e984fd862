"""Masked image modeling: what is hidden stays hidden, patches are the transformer's own, and it can be learned."""

from typing import Any

import pytest
import torch

from polyclinic.core.site import Site
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.objectives.contrastive import extended
from polyclinic.learning.objectives.masked_modeling import Masked
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.training.local import LocalTraining
from tests.conftest import Rows

VIT = (("hidden_size", 12), ("mlp_dim", 24), ("num_heads", 2), ("num_layers", 1), ("patch_size", 4))
TASKS = {
    "vector": Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2)))),
    "volume": Classification(Network("cnn", (2, 6, 8, 8), 2, (("width", 4), ("depth", 2)))),
    "table": Classification(Network("mlp", (9,), 2)),
    "map": Segmentation(Network("unet", (1, 16, 16), 2, (("width", 2), ("norm", "batch")))),
    "transformer": Classification(Network("vit", (1, 16, 16), 2, VIT)),
    "transformer of volumes": Classification(Network("vit", (2, 8, 8, 8), 2, VIT)),
}


def examples(task: Any, n: Any = 32) -> Any:
    """Images with structure: a plane wave each."""
    shape, rng = task.network.inputs, Site("s").rng("waves")
    if len(shape) == 1:
        return torch.randn(n, 1, generator=rng) * torch.linspace(-1, 1, shape[0])
    axes = torch.stack(torch.meshgrid(*[torch.arange(s).float() for s in shape[1:]], indexing="ij"))
    k = torch.rand(n, len(axes), generator=rng)
    return torch.einsum("nd,d...->n...", k, axes).sin()[:, None].repeat(1, shape[0], *[1] * len(axes))


@pytest.mark.parametrize("kind", TASKS)
def test_it_learns_without_a_target(kind: Any) -> None:
    task = TASKS[kind]
    masked = Masked(task, share=0.5, grid=4, width=8)
    data = Rows(examples(task), torch.full((32,), -1))
    site, start = Site("s", {"train": data}), extended(masked, task.first(1))
    end = LocalTraining(epochs=12, batch_size=8, lr=3e-3, optimizer="adam").fit(masked, start, site, 0)

    def loss(params: Any) -> Any:
        torch.manual_seed(0)
        with torch.no_grad():
            return masked.loss(cached_model(masked, params), (data.x, data.y)).item()

    assert loss(end) < 0.9 * loss(start)
    heads = [
        name for name in start if name.startswith("backbone.") and task.network.in_head(name.removeprefix("backbone."))
    ]
    assert heads
    assert all(torch.equal(start[name], end[name]) for name in heads)


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_as_much_is_hidden_as_is_said(share: float) -> None:
    masked = Masked(TASKS["vector"], share=share, grid=4)
    hidden, cells = masked.hide(torch.zeros(5, 1, 8, 8))
    assert cells.shape == (5, 1, 4, 4)
    assert torch.allclose(hidden.float().mean((1, 2, 3)), torch.full((5,), share))
    assert hidden.view(5, 4, 2, 4, 2).float().std((2, 4)).max() == 0  # whole cells
    columns, _ = masked.hide(torch.zeros(5, 8))
    assert torch.allclose(columns.float().mean(1), torch.full((5,), share))


@pytest.mark.parametrize("kind", ["transformer", "transformer of volumes"])
def test_patches_are_in_the_transformers_order(kind: str) -> None:
    task = TASKS[kind]
    model, x = task.model(), examples(task, 2)
    cut = Masked(task).patches(x)
    conv = model.get_submodule("patch_embedding.patch_embeddings")
    own = conv(x).flatten(2).transpose(1, 2)
    assert torch.allclose(cut @ conv.get_parameter("weight").flatten(1).T + conv.get_parameter("bias"), own, atol=1e-4)


def test_what_is_hidden_does_not_reach_the_transformer() -> None:
    """The prediction, made from visible patches alone, does not change when hidden ones do."""
    task = TASKS["transformer"]
    masked, said = Masked(task, share=0.5, width=8), []
    model, x = masked.model().eval(), examples(task, 2)
    model.get_submodule("extra").register_forward_hook(lambda m, given, out: said.append((given[1], out)))
    torch.manual_seed(3)
    masked.loss(model, (x, x))
    visible = said[0][0]
    changed = masked.patches(x)
    for i in range(2):
        hidden = sorted(set(range(16)) - set(visible[i].tolist()))
        changed[i, hidden] += 5
    other = changed.view(2, 4, 4, 4, 4).permute(0, 1, 3, 2, 4).reshape(2, 1, 16, 16)
    assert not torch.equal(other, x)
    torch.manual_seed(3)
    masked.loss(model, (other, other))
    assert torch.allclose(said[0][1], said[1][1], atol=1e-5)


def test_what_is_hidden_does_not_reach_other_networks() -> None:
    task = TASKS["vector"]
    masked, seen = Masked(task, share=0.5, grid=4), []
    model, x = masked.model().eval(), examples(task, 3)
    model.get_submodule("backbone").register_forward_hook(lambda m, given, out: seen.append(given[0]))
    torch.manual_seed(1)
    hidden, _ = masked.hide(x)
    torch.manual_seed(1)
    masked.loss(model, (x, x))
    assert torch.equal(seen[0][hidden], torch.zeros(int(hidden.sum())))  # the learned value begins at 0
    assert torch.equal(seen[0][~hidden], x[~hidden])
