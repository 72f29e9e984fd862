"""FedReplay: the autoencoder's loss by hand, whose generators are asked, and sites that have one class each."""

import numpy as np
import pytest
import torch

from polyclinic.core import tree
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.generative import Replay
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.synthesis.fedreplay import FedReplay
from tests.conftest import Rows


@pytest.mark.parametrize("inputs", [(5,), (2, 8, 8), (1, 9, 6), (1, 4, 6, 8)])
def test_generators_make_what_they_were_made_for(inputs: tuple[int, ...]) -> None:
    replay = Replay(inputs, 3, latent=4, width=4)
    model = replay.model()
    made = replay.generate(model, torch.tensor([0, 1, 2, 2]), torch.Generator().manual_seed(0))
    assert made.shape == (4, *inputs)
    loss = replay.loss(model, (torch.randn(4, *inputs), torch.tensor([0, 1, 2, 2])))
    assert loss.isfinite()


def test_the_loss_by_hand() -> None:
    replay, x, y = Replay((3,), 2, latent=2, width=2), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    model = replay.model()
    torch.manual_seed(1)
    rebuilt, mean, log_var = (t.detach().double().numpy() for t in model(x, y))
    torch.manual_seed(1)
    found = float(replay.loss(model, (x, y)).detach())
    error = ((rebuilt - x.numpy()) ** 2).sum() / (2 * 0.3**2)
    kl = 0.5 * (mean**2 + np.exp(log_var) - log_var - 1).sum()
    assert found == pytest.approx((error + kl) / 12, rel=1e-5)


def test_only_sites_that_have_a_class_are_asked_for_it(
    task: Classification, local: LocalTraining, sites: dict[str, Site]
) -> None:
    method = FedReplay(task, local, examples=400)
    decoder = tree.select(method.replay.first(), lambda n: n.startswith("decoder."))
    dark, bright = ({**tree.zeros(decoder), "decoder.layers.7.bias": torch.tensor([v])} for v in (-5.0, 5.0))
    counts = [torch.tensor(c, dtype=torch.float64) for c in ([30.0, 0.0], [10.0, 7.0])]
    sent = {"a": {**dark, "classes": counts[0]}, "b": {**bright, "classes": counts[1]}}
    drawn = method._draw(sent, Site("server"), 0)
    first, second = drawn.x[drawn.y == 0].flatten(1)[:, 0], drawn.x[drawn.y == 1].flatten(1)[:, 0]
    assert set(second.tolist()) == {5.0}  # only b has the second class
    assert float((first < 0).float().mean()) == pytest.approx(0.75, abs=0.08)  # 30 of 40 are at a
    assert len(first) == pytest.approx(200, abs=40)  # classes are as likely as one another


@pytest.mark.parametrize(("hostile", "expected"), [(-9.0, {0}), (0.0, {0}), (1e30, {0, 1})])
def test_counts_that_no_honest_site_has_stop_no_round(
    hostile: float, expected: set[int], task: Classification, local: LocalTraining
) -> None:
    method = FedReplay(task, local, examples=20)
    decoder = tree.select(method.replay.first(), lambda n: n.startswith("decoder."))
    counts = [torch.tensor(c, dtype=torch.float64) for c in ([3.0, 0.0], [hostile, hostile])]
    both = {name: {**decoder, "classes": c} for name, c in zip("ab", counts, strict=True)}
    assert set(method._draw(both, Site("server"), 0).y.tolist()) == expected
    alone = method._draw({"b": both["b"]}, Site("server"), 0)
    assert len(alone) == (20 if hostile > 0 else 0)


@pytest.mark.slow
def test_sites_of_one_class_each_teach_both() -> None:
    """No site has seen two classes; the server, which has seen no example, tells them apart."""
    rng, sites = torch.Generator().manual_seed(0), {}
    for k in range(2):
        x = torch.randn(80, 4, generator=rng) * 0.5
        x[:, 0] += 2 * k - 1
        sites[f"s{k}"] = Site(f"s{k}", {"train": Rows(x, torch.full((80,), k))})
    task = Classification(Network("mlp", (4,), 2))
    method = FedReplay(task, LocalTraining(epochs=3, lr=0.1), epochs=30)
    state = method.init(task.first())
    for step in train(method, InProcess(method, sites), state, rounds=2):
        state = step.state
    model = cached_model(task, state.params).eval()
    right = [(model(s.data["train"].x).argmax(1) == s.data["train"].y).float().mean() for s in sites.values()]
    assert min(right) > 0.85


def test_the_encoder_stays(task: Classification, local: LocalTraining, sites: dict[str, Site]) -> None:
    method = FedReplay(task, local, epochs=1)
    reply, memory = method.site_update(method.request(method.init(task.first())), {}, sites["site-0"])
    sent = reply.gather("generator")["site-0"]
    assert all(n.startswith("decoder.") or n == "classes" for n in sent)
    assert any(n.startswith("encoder.") for n in memory["replay"])
