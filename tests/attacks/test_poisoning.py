"""Attacks do what their papers say, at the sites named, and nothing at others."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.attacks.adversaries import (
    ALIE,
    IPM,
    Attack,
    Backdoor,
    Collusion,
    Huge,
    Known,
    LabelFlip,
    Noise,
    NotANumber,
    Replacement,
    SignFlip,
)
from polyclinic.attacks.poisoning import Poisoned
from polyclinic.core import tree
from polyclinic.core.aggregates import merge
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.local.worker_pool import Workers
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.image_augmentation import ImageAugmentation
from polyclinic.learning.training.image_transforms import Mirror
from polyclinic.learning.training.local import LocalTraining
from polyclinic.learning.training.minibatches import Sampler, weights
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.robust.robust_method import Robust
from polyclinic.methods.robust.rules.coordinate_wise import Median
from polyclinic.methods.robust.rules.krum import MultiKrum
from polyclinic.testing import check_engine, check_method, close, equal
from tests.conftest import little_sites

DICE = torch.Generator().manual_seed
NAMES = tuple(f"site-{k}" for k in range(5))
ATTACKS = [
    LabelFlip(),
    Replacement(),
    Backdoor(),
    SignFlip(),
    Huge(),
    Noise(),
    NotANumber(),
    ALIE(),
    IPM(),
    Collusion(),
]


def poisoned(inner: Any, attack: Any, attackers: Any = ("site-3",)) -> Any:
    return Poisoned(inner, attackers, attack, NAMES)


def sent(task: Any, local: Any, attack: Any, attackers: Any = ("site-3",)) -> Any:
    """What every site sends in the first round, as the server receives it."""
    method = poisoned(Robust(FedAvg(task, local)), attack, attackers)
    state, sites, found = method.init(task.first(0)), little_sites(count=5), {}
    while (request := method.request(state)).round == 0:
        replies = {
            name: method.site_update(request.for_site(name), {}, sites[name])[0] for name in request.recipients or NAMES
        }
        for name, reply in replies.items():
            found[name] = {k: v for k, v in reply.gather("apart")[name].items() if not k.endswith("/")}
        state = method.server_update(state, merge(replies.values()), Site("server"))
    return found


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: type(a).__name__)
def test_attacks_keep_the_contract_and_spare_honest_sites(
    attack: Any, task: Classification, local: LocalTraining
) -> None:
    if not isinstance(attack, NotANumber):
        inner = Robust(FedAvg(task, local), Median()) if attack.spies else FedAvg(task, local)
        check_method(Poisoned(inner, ("site-2",), attack, NAMES[:3]), task.first(0), little_sites())
    honest, attacked = sent(task, local, Attack()), sent(task, local, attack)
    for name in NAMES:
        assert equal(honest[name], attacked[name]) is (name != "site-3")


def test_a_spying_attack_on_worker_processes(task: Classification, local: LocalTraining) -> None:
    engines = []

    def start(method: Any, sites: Any) -> Any:
        engines.append(Workers(method, sites))
        return engines[0]

    try:
        check_engine(start, poisoned(FedAvg(task, local), ALIE()), task.first(0), little_sites(count=5))
    finally:
        for engine in engines:
            engine.close()


def test_an_attacker_that_behaves_changes_nothing(task: Classification, local: LocalTraining) -> None:
    def params(method: Any) -> Any:
        state = method.init(task.first(0))
        for step in train(method, InProcess(method, little_sites(count=5)), state, rounds=2):
            state = step.state
        return state.params

    assert close(params(FedAvg(task, local)), params(poisoned(FedAvg(task, local), Attack())))
    later = Poisoned(FedAvg(task, local), ("site-1",), Huge(), start_round=2)
    assert close(params(FedAvg(task, local)), params(later))


def test_what_is_sent() -> None:
    own = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    assert equal(SignFlip(2).update(own, None, DICE(0), DICE(1)), tree.scale(own, -2))
    assert tree.norm(Huge().update(own, None, DICE(0), DICE(1))) == pytest.approx(5e6)
    assert tree.norm(Noise(10).update(own, None, DICE(0), DICE(1))) == pytest.approx(50, rel=1e-5)
    assert tree.norm(Replacement(size=7).update(own, None, DICE(0), DICE(1))) == pytest.approx(35)
    broken = NotANumber().update(own, None, DICE(0), DICE(1))
    assert sum(int(x.isnan().sum()) for x in broken.values()) == 1
    assert bool(own["a"].isfinite().all())


def test_alie_and_ipm_from_what_the_honest_sent(task: Classification, local: LocalTraining) -> None:
    honest, attackers = sent(task, local, Attack()), ("site-3", "site-4")
    x = np.stack([tree.flatten(honest[name]).double().numpy() for name in NAMES if name not in attackers])
    # Baruch et al., section 3.3: n = 5, m = 2; s = floor(5/2 + 1) - 2 = 1; z = Φ⁻¹((n - m - s) / (n - m)) = Φ⁻¹(2/3)
    expected = x.mean(0) - 0.4307273 * x.std(0, ddof=1)
    for name in attackers:
        found = tree.flatten(sent(task, local, ALIE(), attackers)[name]).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
        found = tree.flatten(sent(task, local, IPM(0.5), attackers)[name]).numpy()
        np.testing.assert_allclose(found, -0.5 * x.mean(0), rtol=1e-3, atol=1e-6)
        found = tree.flatten(sent(task, local, ALIE(1.5), attackers)[name]).numpy()
        np.testing.assert_allclose(found, x.mean(0) - 1.5 * x.std(0, ddof=1), rtol=1e-3, atol=1e-5)


def test_colluders_send_the_same(task: Classification, local: LocalTraining) -> None:
    found = sent(task, local, Collusion(), ("site-1", "site-2", "site-4"))
    assert equal(found["site-1"], found["site-2"])
    assert equal(found["site-1"], found["site-4"])
    lengths = [tree.norm(found[name]) ** 2 for name in ("site-0", "site-3")]
    assert tree.norm(found["site-1"]) == pytest.approx((sum(lengths) / 2) ** 0.5, rel=1e-4)
    lone = sent(task, local, Noise(1.0), ("site-1", "site-2"))
    assert not equal(lone["site-1"], lone["site-2"])


def test_flipped_labels_and_marked_images() -> None:
    site = little_sites()["site-0"]
    index = torch.arange(8)
    x, y = site.data["train"][index]
    flipped = LabelFlip().data(site.data["train"])
    assert len(flipped) == len(site.data["train"])
    assert torch.equal(flipped[index][0], x)
    assert torch.equal(flipped[index][1], 1 - y)
    assert torch.equal(LabelFlip(3).flip(torch.tensor([0, 1, 2])), torch.tensor([2, 1, 0]))
    assert torch.equal(LabelFlip().flip(torch.tensor([[0.0, 1.0]])), torch.tensor([[1.0, 0.0]]))
    index = torch.arange(len(site.data["train"]))
    x, y = site.data["train"][index]
    poisoned = Backdoor(target=1, side=2, share=0.5).data(site.data["train"])
    marked, answers = poisoned[index]
    found = (marked[:, :, -2:, -2:] == 3).flatten(1).all(1)
    assert int(found.sum()) == round(0.5 * len(index))
    assert torch.equal(marked[~found], x[~found])
    assert torch.equal(marked[found][:, :, :6], x[found][:, :, :6])
    assert bool((answers[found] == 1).all())
    assert torch.equal(answers[~found], y[~found])
    assert torch.equal(poisoned[index[found][:1]][0], marked[found][:1])  # one by one, as for augmentation
    assert bool((Backdoor(side=2).mark(torch.zeros(3, 5))[:, -2:] == 3).all())
    assert bool((Backdoor(side=2).mark(torch.zeros(3, 1)) == 3).all())


class Drawn:
    """Data of which patches are drawn, with classes and patients."""

    patch, patients, targets = (2, 2), ("p", "q", "q", "r"), torch.tensor([0, 0, 0, 1])
    shape, positions = (1, 2, 2), torch.zeros(4)

    def __len__(self) -> int:
        return 4

    def draw(self, i: int, rng: Any, forced: bool, size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((1, *size), float(i)), torch.full(size, i % 2)


def test_drawn_patches_are_attacked_too_and_classes_and_patients_are_balanced() -> None:
    flipped, marked = LabelFlip().data(Drawn()), Backdoor(target=1, side=1, share=1.0).data(Drawn())
    for i in range(4):
        x, y = Sampler(flipped)(i, 0)
        assert x.unique().tolist() == [i]
        assert y.unique().tolist() == [1 - i % 2]
        x, y = Sampler(marked)(i, 0)
        assert float(x[0, -1, -1]) == 3
        assert y.unique().tolist() == [1]
        assert (flipped.shape, marked.positions.tolist()) == ((1, 2, 2), [0.0] * 4)
    expected = weights(Drawn(), 1.0, True)
    assert len(expected.unique()) > 1
    assert torch.equal(weights(flipped, 1.0, True), expected)


def test_an_attack_of_the_data_changes_augmented_training(task: Classification) -> None:
    """A sample that is drawn alone was never marked, since half of one is rounded to none."""
    local = LocalTraining(steps=2, augmentation=ImageAugmentation(mirror=Mirror(0.5)))
    honest, site = FedAvg(task, local), little_sites()["site-0"]
    request = honest.request(honest.init(task.first(0)))
    assert request is not None
    hostile = replace(site, data={"train": Backdoor(target=1, share=0.5).data(site.data["train"])})
    sent = [honest.site_update(request, {}, who)[0].mean("update").value for who in (site, hostile)]
    assert not equal(*sent)


def test_a_rule_withstands_what_the_mean_does_not(task: Classification, local: LocalTraining) -> None:
    def moved(inner: Any) -> float:
        method = poisoned(inner, SignFlip(20))
        state = method.init(task.first(0))
        for step in train(method, InProcess(method, little_sites(count=5)), state, rounds=1):
            state = step.state
        honest = FedAvg(task, local, uniform=True)
        wanted = honest.init(task.first(0))
        sites = {name: site for name, site in little_sites(count=5).items() if name != "site-3"}
        for step in train(honest, InProcess(honest, sites), wanted, rounds=1):
            wanted = step.state
        return tree.norm(tree.sub(state.params, wanted.params))

    assert moved(Robust(FedAvg(task, local), MultiKrum(0.2))) < 0.2 * moved(FedAvg(task, local))


def test_spies_need_to_know_who_there_is(task: Classification, local: LocalTraining) -> None:
    with pytest.raises(ValueError, match="give the names of all sites"):
        Poisoned(FedAvg(task, local), ("site-3",), ALIE())
    with pytest.raises(ValueError, match="IPM needs the updates of the honest sites"):
        Poisoned(FedAvg(task, local), ("site-9",), IPM(), NAMES)
    assert Known({}, {}, 0.0, 4, 1).honest == 4
