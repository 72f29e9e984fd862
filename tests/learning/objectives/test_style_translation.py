"""Translators and generators: where they begin, what their losses are, and that they learn a style."""

import numpy as np
import pytest
import torch

from polyclinic.core.site import Site
from polyclinic.learning.objectives.style_translation import (
    Cycle,
    Stain,
    Synthesis,
    Translator,
    images_only,
    in_judges,
    in_turn,
    standardized,
)
from polyclinic.learning.training.local import LocalTraining
from tests.conftest import blobs


@pytest.mark.parametrize("inputs", [(1, 8, 8), (3, 9, 7), (1, 4, 6, 8)])
def test_a_translator_begins_as_the_identity(inputs: tuple[int, ...]) -> None:
    x = torch.randn(3, *inputs)
    assert torch.equal(Translator(inputs)()(x), x)
    torch.testing.assert_close(Translator(inputs, standardize=True)()(x), standardized(x))
    assert not any(p.requires_grad for p in Translator(inputs)().parameters())


def test_standardizing_takes_scale_and_offset() -> None:
    x = torch.randn(3, 2, 8, 8)
    torch.testing.assert_close(standardized(3 * x - 7), standardized(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(standardized(torch.full((1, 1, 4, 4), 5.0)), torch.zeros(1, 1, 4, 4))


def test_the_gradient_penalty_by_hand() -> None:
    """Of a critic that is linear, f(x) = mean of w·x over patches, the slope is known: (‖w̄‖ − 1)²."""
    gan = Synthesis((1, 8, 8), width=4)
    model = gan.model()
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))
    model["judge"] = flat
    real, rng = torch.randn(5, 1, 8, 8), torch.Generator().manual_seed(0)
    found = float(gan.judge(model, real, rng).detach())
    rng.manual_seed(0)
    with torch.no_grad():
        made = gan.make(model, 5, rng)
        expected = flat(made).mean() - flat(real).mean() + 10 * (flat.get_parameter("1.weight").norm() - 1) ** 2
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_the_cycles_loss_by_hand() -> None:
    cycle = Cycle((1, 8, 8), width=4)
    model = cycle.model()
    own, target = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        found = float(cycle.translate(model, own, target))
        scores = [
            model["judge_there"](own).numpy(),
            model["judge_back"](target).numpy(),
        ]  # both ways begin as identities
    assert found == pytest.approx(sum(np.log1p(np.exp(-s)).mean() for s in scores), rel=1e-5)


def test_a_cycle_learns_the_other_style() -> None:
    site = Site("a", {"train": blobs(0, 40, (1, 8, 8), shift=0.0)})
    bright = blobs(1, 40, (1, 8, 8), shift=3.0).x
    cycle = Cycle((1, 8, 8), width=8, cycle=1.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, rng = cycle.model(), torch.Generator().manual_seed(0)
    before = float(site.data["train"].x.mean())

    def other(n: int) -> torch.Tensor:
        return bright[torch.randint(40, (n,), generator=rng)]

    in_turn(
        model,
        LocalTraining(50, 20, "adam", 1e-2),
        site,
        "k",
        lambda x: cycle.judge(model, x, other(len(x))),
        lambda x: cycle.translate(model, x, other(len(x))),
    )
    after = float(model["there"](site.data["train"].x).detach().mean())
    assert abs(after - float(bright.mean())) < 0.8 * abs(before - float(bright.mean()))


def test_training_in_turn_leaves_the_other_side_alone() -> None:
    stain = Stain((1, 8, 8), width=4)
    model = stain.model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    site = Site("a", {"train": blobs(0, 12, (1, 8, 8))})
    in_turn(
        model,
        LocalTraining(1, 12, "adam", 1e-2),
        site,
        "k",
        lambda x: stain.judge(model, x),
        lambda x: 0 * stain.restyle(model, x),
    )
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(in_judges(n) for n in moved)


def test_tables_have_no_style() -> None:
    with pytest.raises(ValueError, match="needs images"):
        images_only((7,))
