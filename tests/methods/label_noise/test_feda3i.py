"""FedA3I: losses at edges, weights of quality and layers against the published ones; enlarged masks are found."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation, binary_erosion, distance_transform_edt
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.aggregates import WEIGHT, PerSiteUniform, Reply
from polyclinic.core.site import Site
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.objectives.distillation_loss import answers
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.label_noise.boundary_losses import boundary_losses
from polyclinic.methods.label_noise.feda3i import FedA3I, quality
from tests.conftest import Rows, segmentation_sites
from tests.support.agreement import agree
from tests.support.few_labels import run

TASK = Segmentation(Network("unet", (1, 16, 16), 2, (("width", 2), ("norm", "batch"))))


@pytest.mark.parametrize("dims", [2, 3])
def test_losses_at_edges_are_the_published_ones(dims: int) -> None:
    """Signed distances to the edge, as far as both sides reach, and the mean over images, in NumPy and SciPy."""
    task = Segmentation(Network("unet", (1, *[16] * dims), 2, (("width", 2), ("norm", "batch"))))
    rng = torch.Generator().manual_seed(0)
    grid = torch.stack(torch.meshgrid(*[torch.arange(16)] * dims, indexing="ij")).float()
    masks = torch.stack([((grid - 7).square().sum(0) < r**2).long() for r in (3.0, 5.0, 0.0)])  # the last is empty
    data, params = Rows(torch.randn(3, 1, *[16] * dims, generator=rng), masks), task.first()
    z, _ = answers(task, params, data)
    loss = F.binary_cross_entropy_with_logits(z[:, 1] - z[:, 0], masks.float(), reduction="none").double().numpy()
    rows = []
    for image, each in zip(masks.numpy(), loss, strict=True):
        if image.sum() < 1:
            continue
        signed = distance_transform_edt(1 - image) - distance_transform_edt(image)
        far = min(-signed.min(), signed.max())
        rows.append([each[(image == 1) & (signed >= -far)].mean(), each[(image == 0) & (signed <= far)].mean()])
    assert np.allclose(boundary_losses(task, params, data).numpy(), np.mean(rows, 0), rtol=1e-5)


def test_quality_is_the_published_weight() -> None:
    """Within each group the weights fall linearly with the difference of both losses; groups weigh the same."""
    table = torch.tensor([[0.9, 0.1], [0.8, 0.1], [1.0, 0.15], [0.1, 0.8], [0.12, 0.9], [0.1, 0.7]]).double()
    gap = (table[:, 0] - table[:, 1]).numpy()
    expected = np.zeros(6)
    for group, sign in ((np.arange(3), 1), (np.arange(3, 6), -1)):
        excess = sign * gap[group]
        w = 1 - (excess - excess.min()) / (excess.max() - excess.min())
        expected[group] = 0.5 * w / w.sum()
    assert np.allclose(quality(table, 0.5).numpy(), expected)
    assert quality(table[:1], 0.5).tolist() == [1.0]
    two = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert quality(two, 0.3).tolist() == pytest.approx([0.3, 0.7])


def test_weights_change_from_size_to_quality_from_layer_to_layer() -> None:
    method, start = FedA3I(TASK, 10, LocalTraining()), TASK.first()
    known, sizes = {"a": 0.1, "b": 0.2, "c": 0.7}, {"a": 10.0, "b": 20.0, "c": 10.0}
    state = method.init(start)._replace(round=3, quality=known)
    rng = torch.Generator().manual_seed(0)
    changes = {s: {n: torch.randn(x.shape, generator=rng) for n, x in start.items()} for s in known}
    sent = {s: {**c, WEIGHT: torch.tensor(sizes[s])} for s, c in changes.items()}
    found = method.server_update(state, Reply({"update": PerSiteUniform(sent)}), Site("server"))
    places = list(dict.fromkeys(n.rpartition(".")[0] for n in start))
    expected = {}
    for n, leaf in start.items():
        a = np.linspace(0, 1, len(places))[places.index(n.rpartition(".")[0])]
        weights = {s: a * known[s] + (1 - a) * sizes[s] / 40 for s in known}
        expected[n] = leaf + sum(w * changes[s][n] for s, w in weights.items())
    agree(found.params, expected)
    assert found.round == 4


def test_enlarged_and_shrunken_masks_are_told_apart() -> None:
    sites = segmentation_sites(4)
    for k, (name, site) in enumerate(sites.items()):
        data = site.data["train"]
        change: Any = binary_dilation if k < 2 else binary_erosion
        masks = np.stack([change(m, iterations=1) for m in data.y.numpy() > 0])
        sites[name] = Site(name, {"train": Rows(data.x, torch.from_numpy(masks).long())})
    method = FedA3I(TASK, 20, LocalTraining(5, 5, "adam", 0.01), warmup=0.1)
    step, _ = run(method, sites, TASK.first(), 3)
    weights = step.state.quality
    assert weights["site-0"] + weights["site-1"] == pytest.approx(0.5)
    assert tree.finite(step.state.params)
    with pytest.raises(ConfigError, match="warmup must be a share"):
        FedA3I(TASK, 20, warmup=1.0)
