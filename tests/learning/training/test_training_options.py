"""Schedules, Nesterov momentum, kept optimizer states and layouts of local training, against torch.optim."""

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from polyclinic.core.site import Compute, Site
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.learning.training.optimizers import optimizer_memory
from polyclinic.learning.training.seeding import seeded
from tests.support.agreement import KINDS, place


def schedule_of(local: LocalTraining, rounds: int, steps: int) -> list[float]:
    return [local.rate(r, k / steps) for r in range(rounds) for k in range(steps)]


def torchs(make: Any, steps: int, lr: float = 0.1) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_the_polynomial_schedule_is_pytorchs_over_all_steps() -> None:
    local = LocalTraining(lr=0.1, schedule="poly", schedule_rounds=6, power=0.9)
    theirs = torchs(lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 30, 0.9), 30)
    assert schedule_of(local, 6, 5) == pytest.approx(theirs, rel=1e-6)
    assert local.rate(6) > 0  # beyond the last round


def test_milestones_are_pytorchs() -> None:
    local = LocalTraining(lr=0.1, milestones=(2, 5), milestone_factor=0.3)
    theirs = torchs(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5], 0.3), 8)
    assert [local.rate(r) for r in range(8)] == pytest.approx(theirs, rel=1e-6)


def test_a_schedule_needs_its_number_of_rounds() -> None:
    with pytest.raises(ConfigError, match="needs schedule_rounds"):
        LocalTraining(schedule="poly").rate(0)


def test_the_distance_is_the_sum_of_rates() -> None:
    local = LocalTraining(lr=0.1, schedule="poly", schedule_rounds=3)
    assert local.distance(1, 4) == pytest.approx(math.fsum(local.rate(1, k / 4) for k in range(4)))
    plain = LocalTraining(lr=0.1, lr_decay=0.9)
    assert plain.distance(2, 7) == 7 * plain.rate(2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        (
            {"momentum": 0.99, "nesterov": True, "weight_decay": 3e-5, "keep_optimizer": True},
            lambda p: torch.optim.SGD(p, 0.05, momentum=0.99, nesterov=True, weight_decay=3e-5),
        ),
        (
            {"optimizer": "adamw", "weight_decay": 0.01, "keep_optimizer": True},
            lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.01),
        ),
    ],
)
def test_rounds_with_a_kept_optimizer_are_one_training_of_pytorch(
    options: dict[str, Any], theirs: Any, kind: str
) -> None:
    """Three rounds of four steps of one site, with the polynomial schedule, against 12 steps of torch.optim."""
    task, sites = place(kind)
    local = LocalTraining(steps=4, batch_size=5, lr=0.05, schedule="poly", schedule_rounds=3, **options)
    site, start, memory = sites["site-1"], task.first(0), dict[str, Any]()
    params = start
    with optimizer_memory(memory):
        for round in range(3):
            params = local.fit(task, params, site, round)
    model = task.model()
    model.load_state_dict(start, strict=False)
    model.train()
    optimizer, k = theirs(model.parameters()), 0
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, 12, 0.9)
    for round in range(3):
        rng = site.rng(round, "train", "train", "")
        torch.randint(2**62, (), generator=rng)  # what seeds dropout
        for batch in local.batches(site.data["train"], rng):
            optimizer.zero_grad()
            task.loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            k += 1
    assert k == 12
    for name, leaf in model.named_parameters():
        assert torch.allclose(params[name], leaf, atol=1e-6), name
    alone = start
    for round in range(3):
        alone = local.fit(task, alone, site, round)  # without a memory: reset each round
    assert any(not torch.allclose(alone[name], params[name], atol=1e-4) for name in params)


def test_momentum_of_at_least_095_is_kept_by_default() -> None:
    assert LocalTraining(momentum=0.95).keeps_optimizer
    assert not LocalTraining(momentum=0.9).keeps_optimizer
    assert not LocalTraining(optimizer="adam", momentum=0.99).keeps_optimizer
    assert not LocalTraining(momentum=0.99, keep_optimizer=False).keeps_optimizer
    assert LocalTraining(keep_optimizer=True).keeps_optimizer


def test_what_is_kept_must_fit_and_single_steps_keep_nothing(task: Classification, sites: dict[str, Site]) -> None:
    local, memory = LocalTraining(momentum=0.9, keep_optimizer=True, batch_size=8), dict[str, Any]()
    with optimizer_memory(memory):
        local.fit(task, task.first(0), sites["site-0"], 0)
        (key,) = memory
        name = next(iter(memory[key]))
        memory[key] = {**memory[key], name: torch.zeros(99)}
        with pytest.raises(ConfigError, match="set keep_optimizer = false"):
            local.fit(task, task.first(0), sites["site-0"], 1)
    with pytest.raises(ConfigError, match="individual training steps"):
        local.stepper(task.model())


def test_seeding_gives_the_bits_of_torchs_own() -> None:
    with seeded(torch.Generator().manual_seed(3)):
        ours = torch.rand(5)
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(3)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        assert torch.equal(ours, torch.rand(5))


def test_channels_last_trains_the_same_and_leaves_contiguous_parameters(
    task: Classification, sites: dict[str, Site]
) -> None:
    local = LocalTraining(epochs=2, batch_size=8, momentum=0.9, keep_optimizer=True)
    plain = local.fit(task, task.first(0), sites["site-1"], 0)
    memory = dict[str, Any]()
    with optimizer_memory(memory):
        site = replace(sites["site-1"], compute=Compute(channels_last=True))
        last = local.fit(task, task.first(0), site, 0)
    assert all(torch.allclose(plain[name], last[name], atol=1e-5) for name in plain)
    assert all(leaf.is_contiguous() for tree in (last, *memory.values()) for leaf in tree.values())


@pytest.mark.slow
def test_a_compiled_network_trains_the_same() -> None:
    """In a process of its own: the compiler stays loaded."""
    script = (
        "import torch\nfrom dataclasses import replace\nfrom polyclinic.core.site import Compute\n"
        "from polyclinic.learning.networks.network_catalog import Network\n"
        "from polyclinic.learning.tasks.classification import Classification\n"
        "from polyclinic.learning.training.local import LocalTraining\nfrom tests.conftest import little_sites\n"
        "task = Classification(Network('cnn', (1, 8, 8), 2, (('width', 4), ('depth', 2), ('norm', 'group'))))\n"
        "site, local = little_sites()['site-1'], LocalTraining(epochs=2, batch_size=8)\n"
        "plain = local.fit(task, task.first(0), site, 0)\n"
        "fast = local.fit(task, task.first(0), replace(site, compute=Compute(compile=True)), 0)\n"
        "print('torch._inductor' in __import__('sys').modules,"
        " all(torch.allclose(plain[n], fast[n], atol=1e-4) for n in plain))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
