"""FL-MRCM: without alignment it is FedAvg over the sources; with it, features come nearer to the target's."""

from typing import Any

import pytest
import torch

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.latent import encode_all, encoded, encoded_width
from polyclinic.learning.networks.model_tree import cached_model, load, params_of
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.domain_adaptation.mrcm import MRCM
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.testing import close
from tests.conftest import Rows, little_sites
from tests.methods.test_features_of_networks import NETWORKS
from tests.support.agreement import KINDS, agree

NAMES = ("site-0", "site-1", "site-2")


def run(method: Any, params: Any, sites: Any, rounds: Any = 2) -> Any:
    state = method.init(params)
    for step in train(method, InProcess(method, sites), state, rounds=rounds):
        state = step.state
    return state


def test_without_alignment_it_is_fedavg_over_the_sources(task: Any, local: Any, sites: dict[str, Site]) -> None:
    ours = run(MRCM(task, NAMES, local, adversarial=0.0), task.first(), sites)
    sources = {name: sites[name] for name in NAMES[:2]}
    assert close(ours.params, run(FedAvg(task, local, uniform=True), task.first(), sources).params)


def test_the_targets_truth_is_never_used(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    method = MRCM(task, NAMES, local, target="site-1")
    state = run(method, task.first(), sites)
    data = sites["site-1"].data["train"]
    blind = Site("site-1", {"train": Rows(data.x, torch.full_like(data.y, -100))})
    assert close(run(method, task.first(), {**sites, "site-1": blind}).params, state.params)


@pytest.mark.parametrize("name", KINDS)
def test_two_steps_are_of_the_summed_loss_with_a_faster_discriminator(name: str) -> None:
    """Written again with PyTorch's optimizers: one step follows both losses, then the discriminator's, at 10 times."""
    network = NETWORKS[name][0]
    task, local, weight = Classification(network), LocalTraining(steps=2, batch_size=8, lr=0.05), 0.3
    site = little_sites(network.inputs)["site-0"]
    method = MRCM(task, NAMES, local, adversarial=weight)
    latent = torch.randn(7, encoded_width(network), generator=torch.Generator().manual_seed(1))
    request = method.request(method.init(task.first())._replace(latent={"z": latent}))
    reply, memory = method.site_update(request, {}, site)

    model, judge = load(task.model(), task.first()).train(), load(method.judge.model(), method.judge.first())
    learn, guess = torch.optim.SGD(model.parameters(), 0.05), torch.optim.SGD(judge.parameters(), 0.5)
    rng = site.rng(0, "train", "train", "")
    torch.randint(2**62, (), generator=rng)  # what `seeded` draws
    bce, kept = torch.nn.functional.binary_cross_entropy_with_logits, {}
    for x, y in local.batches(site.data["train"], rng):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        kept = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
        z = encoded(network, model, x)
        fooled = judge(z)
        learn.zero_grad()
        (loss + weight * bce(fooled, torch.ones_like(fooled))).backward()
        learn.step()
        guess.zero_grad()
        real, fake = judge(latent), judge(z.detach())
        (bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))).backward()
        guess.step()
        for n, b in model.named_buffers():
            if n in kept:
                b.copy_(kept[n])  # the second pass does not count
    found = {n: leaf + task.first()[n] for n, leaf in reply.mean("update").value.items()}
    agree(found, params_of(model))
    agree(memory["judge"], params_of(judge))


@pytest.mark.slow
def test_features_come_nearer_to_the_targets() -> None:
    """The fourth column betrays the scanner; aligned encoders carry less of it."""
    task = Classification(Network("mlp", (4,), 2, (("width", 8),)))
    local, rng, sites = LocalTraining(2, 16, "adam", 0.01), torch.Generator().manual_seed(0), {}
    for k, name in enumerate(NAMES):
        x = torch.randn(80, 4, generator=rng)
        x[:, 3] = 2.0 * (k - 1) + 0.2 * x[:, 3]
        sites[name] = Site(name, {"train": Rows(x, (x[:, 0] > 0).long())})

    def apart(weight: float) -> float:
        state = run(MRCM(task, NAMES, local, adversarial=weight), task.first(), sites, 15)
        model = cached_model(task, state.params)
        h = [encode_all(task.network, model, site.data["train"]) for site in sites.values()]
        spread = torch.cat(h).std(0).square().sum()
        return float(sum((h[k].mean(0) - h[2].mean(0)).square().sum() for k in (0, 1)) / spread)

    assert apart(1.0) < 0.6 * apart(0.0)


def test_a_target_that_is_no_site_is_refused(task: Classification, local: LocalTraining) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        MRCM(task, NAMES, local, target="elsewhere")
    with pytest.raises(ValueError, match="two or more"):
        MRCM(task, ("alone",), local)
