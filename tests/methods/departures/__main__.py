"""Print the rows of the table of departures, with the sizes that are measured now."""

from tests.methods.departures.test_departures import MODULES
from tests.support.departures import DEPARTURES

if __name__ == "__main__":
    assert MODULES
    for departure in sorted(DEPARTURES, key=lambda d: d.method):
        print(departure.row, flush=True)
