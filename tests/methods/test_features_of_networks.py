"""Methods that use features train on them with every kind of network, and not only with convolutional ones."""

import pytest
import torch

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks import latent
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.objectives.contrastive import Contrast
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.registry import Setting, build
from tests.conftest import little_sites
from tests.support.few_labels import half_labeled

VIT = (("hidden_size", 12), ("mlp_dim", 24), ("num_heads", 2), ("num_layers", 2), ("patch_size", 4))
NETWORKS = {
    "cnn, batch": (Network("cnn", (1, 8, 8), 2, (("width", 6), ("depth", 2))), 12),
    "cnn, batch, 3-D": (Network("cnn", (1, 8, 8, 8), 2, (("width", 6), ("depth", 2))), 12),
    "cnn, group": (Network("cnn", (1, 8, 8), 2, (("width", 8), ("depth", 2), ("norm", "group"))), 16),
    "cnn, group, 3-D": (Network("cnn", (1, 8, 8, 8), 2, (("width", 8), ("depth", 2), ("norm", "group"))), 16),
    "vit": (Network("vit", (1, 8, 8), 2, VIT), 12),
    "vit, 3-D": (Network("vit", (1, 8, 8, 8), 2, VIT), 12),
    "attention-mil": (Network("attention-mil", (6, 5), 2, (("width", 12), ("attention", 4))), 12),
    "densenet121": (Network("densenet121", (1, 32, 32), 2), 1024),
    "unet": (Network("unet", (1, 32, 32), 2, (("width", 2),)), 16),
}
METHODS = ("fedmoco", "fcl", "fedharmony", "fed-align", "fl-mrcm", "fedcy", "moon")


@pytest.mark.parametrize("name", NETWORKS)
def test_features_tell_inputs_apart(name: str) -> None:
    """LayerNorm sets the mean over the features of a token to 0, so that an average over them tells nothing."""
    network, width = NETWORKS[name]
    torch.manual_seed(0)
    model, x = network().eval(), torch.randn(4, *network.inputs)
    with torch.no_grad():
        h = latent.encoded(network, model, x)
    assert h.shape == (4, width)
    assert latent.encoded_width(network) == width
    assert float(h.std(0).mean()) > 1e-4
    if not network.parts.encoder:
        with torch.no_grad():
            head = next(m for n, m in model.named_modules() if network.in_head(f"{n}."))
            inputs = []
            head.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
            model(x)
        torch.testing.assert_close(h, inputs[0].flatten(2).mean(2) if inputs[0].ndim > 2 else inputs[0])


def test_projections_of_a_transformer_differ() -> None:
    contrast = Contrast(Classification(NETWORKS["vit"][0]))
    torch.manual_seed(0)
    with torch.no_grad():
        q = contrast.embed(contrast.model().eval(), torch.randn(8, 1, 8, 8))
    assert float((q @ q.T).min()) < 0.999


@pytest.mark.parametrize("kind", ["vit", pytest.param("vit, 3-D", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_on_the_features_of_a_transformer(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    pooled = latent.pooled

    def record(h: torch.Tensor) -> torch.Tensor:
        seen.append(pooled(h).detach())
        return pooled(h)

    monkeypatch.setattr(latent, "pooled", record)
    task = Classification(NETWORKS[kind][0])
    sites: dict[str, Site] = little_sites(task.network.inputs)
    sites = half_labeled(labeled=1, sites=sites) if name == "fedcy" else sites
    for site in sites.values():
        for data in site.data.values():
            data.videos = torch.arange(len(data)) // 4
            data.positions = torch.arange(len(data)) / max(len(data), 1)
    local = LocalTraining(epochs=1, batch_size=8, lr=0.05)
    method = build(name, Setting(task, local, tuple(sites), rounds=4))
    engine, state = InProcess(method, sites), method.init(task.first())
    for step in train(method, engine, state, rounds=2):
        assert not step.lost
        state = step.state
    assert all(leaf.isfinite().all() for leaf in state.params.values())
    batches = [h for h in seen if len(h) > 2]
    assert batches
    assert {h.shape[1] for h in batches} == {12}
    assert min(float(h.std(0).mean()) for h in batches) > 1e-3
