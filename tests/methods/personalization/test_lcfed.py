"""LC-Fed's two parts by hand, its limits, and evaluation inside and outside."""

import numpy as np
import torch
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.latent import represent
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.personalization.lcfed import LCFed
from polyclinic.methods.personalization.lcfed_network import spread
from tests.conftest import segmentation_sites

TASK = Segmentation(Network("unet", (1, 16, 16), 2, (("width", 2), ("norm", "batch"))))
NAMES = ("site-0", "site-1", "site-2")


def test_the_blur_is_a_gaussian_and_never_lowers() -> None:
    attention = torch.rand(2, 1, 40, 41, generator=torch.Generator().manual_seed(0))
    found = spread(attention, 9)
    k = np.exp(-0.5 * (np.arange(-4, 5) / 2**0.5) ** 2)
    kernel = torch.from_numpy(np.outer(k, k) / np.outer(k, k).sum()).float()
    blurred = F.conv2d(attention, kernel[None, None], padding=4)
    for i in range(2):
        b = (blurred[i] - blurred[i].min()) / (blurred[i].max() - blurred[i].min())
        torch.testing.assert_close(found[i], torch.maximum(b, attention[i]), rtol=1e-4, atol=1e-5)
    assert spread(torch.rand(1, 1, 8, 8)).shape == (1, 1, 8, 8)  # a window larger than the image is cut
    assert spread(torch.rand(1, 1, 6, 7, 8)).shape == (1, 1, 6, 7, 8)


def test_the_second_head_by_hand() -> None:
    method = LCFed(TASK, NAMES, LocalTraining())
    state = method.init(TASK.first())
    heads = {"heads": torch.randn(3, method.request(state).trees["heads"]["heads"].shape[1])}
    net = {**state.params, "site": torch.tensor([0.0, 1.0, 0.0])}
    params = {**tree.prefixed("net", net), **heads, **method._fresh(), "use": torch.ones(())}
    model = cached_model(method.prediction_task, params).eval()
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        f, z = represent(method.selecting.network, cached_model(method.selecting, net, slot="alone").eval(), x)
        weight, bias = heads["heads"].split([f.shape[1] * 2, 2], 1)
        said = [F.conv2d(f, w.view(2, -1, 1, 1), b).softmax(1).numpy() for w, b in zip(weight, bias, strict=True)]
        maps = [*np.split(np.std(said, 0, ddof=1), 2, 1), *np.split(z.softmax(1).numpy(), 2, 1)]
        weighed = torch.cat([f * spread(torch.from_numpy(m)) + f for m in maps], 1)
        expected = F.conv2d(weighed, params["calibrate.weight"], params["calibrate.bias"])
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_the_site_decides_the_channels() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        task = Segmentation(Network("unet", (1, 16, 16), 2, (("width", 8), ("norm", "batch"))))
        method, x = LCFed(task, NAMES, LocalTraining()), torch.randn(2, 1, 16, 16)
        model, h = method.selecting.model().eval(), torch.randn(2, 64, 1, 1)
    seen, gates = [], []
    for k in range(3):
        model.get_buffer("site").copy_(torch.eye(3)[k])
        seen.append(model(x))
        gates.append(model.get_submodule("select")(h, torch.eye(3)[k]) / h - 1)
    assert not torch.equal(seen[0], seen[1])
    assert all(0 < float(g.min()) <= float(g.max()) < 1 for g in gates)  # σ(…), between leaving and doubling
    assert float((gates[0] - gates[1]).abs().max()) > 1e-3


def test_heads_are_shown_bodies_are_averaged_and_unseen_sites_get_the_mean() -> None:
    sites, local = segmentation_sites(), LocalTraining(batch_size=5, optimizer="adam", lr=0.03)
    method = Evaluated(LCFed(TASK, NAMES, local, head_steps=2), TASK)
    federation, state, seen = InProcess(method, sites), method.init(TASK.first()), []
    for step in train(method, federation, state, rounds=6):
        assert not step.lost
        assert not any(method.inner.task.network.in_head(name) for name in step.reply.mean("update").total)
        state = step.state
        seen.append(np.mean([float(s["dice"]) for s in evaluate(method, federation, state, list(sites)).values()]))
    assert seen[-1] > seen[0]
    for k, name in enumerate(NAMES):
        memory = federation.memory[name]
        assert memory["own"]["site"].tolist() == torch.eye(3)[k].tolist()
        mine = tree.flatten(tree.select(memory["own"], TASK.network.in_head))
        assert torch.equal(state.heads[name]["head"], mine)
    stranger = InProcess(method, {"elsewhere": Site("elsewhere", sites["site-0"].data)})
    assert "elsewhere" in evaluate(method, stranger, state, ["elsewhere"])
    mean = torch.stack([state.heads[n]["head"] for n in NAMES]).mean(0)
    torch.testing.assert_close(tree.flatten(tree.select(state.params, TASK.network.in_head)), mean)
