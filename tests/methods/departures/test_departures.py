"""The size of every departure of a method from its paper is the one that the page states."""

import pytest

from polyclinic.methods.catalog import METHODS
from tests.methods.departures import adaptation, aggregation, labels, merging, optimization, personalization
from tests.support.departures import DEPARTURES, LESS, NONE, Departure, table

MODULES = (adaptation, aggregation, labels, merging, optimization, personalization)
"""The modules that measure; importing them registers their functions."""
ROWS = {(cells[0].strip("`"), cells[1]): cells for cells in table("How large departures are")}
SLOW = {"asym-fedavg", "cfl", "fednoro", "fedmix", "fedmri", "lc-fed"}


@pytest.mark.parametrize(
    "departure",
    [
        pytest.param(d, id=f"{d.method}: {d.what}", marks=pytest.mark.slow if d.method in SLOW else ())
        for d in DEPARTURES
    ],
)
def test_a_departure_is_as_large_as_the_page_says(departure: Departure) -> None:
    """To 5 %, as sizes are rounded to two digits; below 1e-5 two methods agree."""
    _, _, stated, how = ROWS[departure.method, departure.what]
    assert how == departure.how
    found = departure.measure()
    if stated == LESS:
        assert found < NONE
    else:
        assert found == pytest.approx(float(stated), rel=0.05)


def test_every_method_that_departs_has_a_row_and_every_row_is_measured() -> None:
    assert ROWS.keys() == {(d.method, d.what) for d in DEPARTURES}
    assert len(ROWS) == len(DEPARTURES)
    assert {name for name, _ in ROWS} == {n for n, entry in METHODS.items() if entry.fidelity.startswith("departs: ")}
