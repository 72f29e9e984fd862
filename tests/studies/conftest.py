"""What the tests of studies and of the command line share."""

from collections.abc import Iterator

import pytest

from polyclinic.privacy import accounting


@pytest.fixture(scope="package", autouse=True)
def coarse_accounting() -> Iterator[None]:
    """Compute ε to a hundredth instead of to four decimals, which is quicker; ``tests/privacy`` has the exact numbers."""
    with pytest.MonkeyPatch.context() as patch:
        accounting._epsilon.cache_clear()
        patch.setattr(accounting, "INTERVALS", {"pld": 1e-2, "coarse": 1e-2})
        yield
        accounting._epsilon.cache_clear()
