"""SCAFFOLD with some of its sites, against numpy, where every gradient can be written down."""

import numpy as np
import pytest

from polyclinic.methods.optimization.scaffold import Scaffold
from tests.methods.optimization.test_feddyn import ETA, LOCAL, STEPS, TASK, F, gradient, lines, run


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("lr", [1.0, 0.5])
@pytest.mark.parametrize(("present", "population"), [(3, 3), (2, 5), (1, 4)])
def test_scaffold_by_hand(present: int, population: int, lr: float, uniform: bool) -> None:
    """Algorithm 1 with option II: x moves by η_g times the mean change of S; c by |S|/N times the mean of theirs.

    Unless all sites are equal, both means weigh sites by their examples, so that c is the mean of all c_i.
    """
    sites = lines(present)
    x, c = TASK.first(0)["w"][0].double().numpy(), np.zeros(F)
    controls = {name: np.zeros(F) for name in sites}
    for _ in range(3):
        moves, turns = [], []
        for name, site in sites.items():
            y = x.copy()
            for _ in range(STEPS):
                y -= ETA * (gradient(y, site) - controls[name] + c)
            new = controls[name] - c + (x - y) / (STEPS * ETA)
            moves.append(y - x)
            turns.append(new - controls[name])
            controls[name] = new
        sizes = None if uniform else [len(site.data["train"]) for site in sites.values()]
        x = x + lr * np.average(moves, 0, sizes)
        c = c + present / population * np.average(turns, 0, sizes)
    state = run(Scaffold(TASK, population, LOCAL, lr, uniform), sites)
    np.testing.assert_allclose(state.params["w"][0], x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.control["w"][0], c, rtol=1e-4, atol=1e-5)


def test_weighted_by_examples_it_is_the_published_benchmark_code() -> None:
    """FLamby keeps one correction for each site, ``c_i − c``, and adds ``(x⁺ − y_i) / (η_g K η_l)`` to it each round."""
    sites = lines(3)
    x, sizes = TASK.first(0)["w"][0].double().numpy(), [len(site.data["train"]) for site in sites.values()]
    corrections, ends = {name: np.zeros(F) for name in sites}, dict.fromkeys(sites, x)
    for _ in range(4):
        for name, site in sites.items():
            corrections[name] = corrections[name] + (x - ends[name]) / (STEPS * ETA)
            y = x.copy()
            for _ in range(STEPS):
                y -= ETA * (gradient(y, site) - corrections[name])
            ends[name] = y
        x = x + np.average([y - x for y in ends.values()], 0, sizes)
    state = run(Scaffold(TASK, 3, LOCAL, uniform=False), sites, rounds=4)
    np.testing.assert_allclose(state.params["w"][0], x, rtol=1e-4, atol=1e-5)
