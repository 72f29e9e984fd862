"""Made-up patients say that they are simulated, and differ by site as stated."""

import numpy as np
import pytest

from polyclinic.data.examples import DataError
from polyclinic.data.federation import federate
from polyclinic.data.simulation.phantoms import SIMULATED, RoiPhantom, SurvivalPhantom
from tests.support.data_sets import data_spec


def test_every_result_says_that_the_patients_are_made_up() -> None:
    data = federate(data_spec(kind="roi-phantom", subjects=60, sites="site"))
    assert SIMULATED in (data.simulated or "")
    assert set(data.sites) == {"scanner-1", "scanner-2"}
    assert data.shape == (90,)


def test_scanners_differ_and_disease_shrinks_a_fifth_of_the_regions() -> None:
    plain = RoiPhantom(subjects=4000, gain=0, shift=0, noise=0, effect=0.5)
    table = plain.table()
    x = plain.examples(table.ids).inputs.numpy()
    change = x[table.labels == 1].mean(0) - x[table.labels == 0].mean(0)
    assert np.sum(change < -0.3) == 18
    assert np.abs(change[change > -0.3]).max() < 0.15
    moved = RoiPhantom(subjects=4000, shift=1.0)
    y = moved.examples(moved.table().ids).inputs.numpy()
    assert np.std(y[:4000].mean(0) - y[4000:].mean(0)) > 1.0
    assert np.std(x[:4000].mean(0) - x[4000:].mean(0)) < 0.1
    assert RoiPhantom().fingerprint != RoiPhantom(seed=1).fingerprint


@pytest.mark.parametrize("source", [RoiPhantom(), SurvivalPhantom()])
def test_the_fingerprint_is_the_same_after_patients_were_drawn(source: RoiPhantom | SurvivalPhantom) -> None:
    before = source.fingerprint
    source.table()
    assert source.fingerprint == before


def test_impossible_phantoms_are_refused_all_problems_at_once() -> None:
    with pytest.raises(DataError) as caught:
        RoiPhantom(sites=0, subjects=3)
    assert len(caught.value.problems) == 2
