"""One federation of real processes for all tests that need one: a server, three sites, mutual TLS, on loopback."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.real import Hospitals


@pytest.fixture(scope="session")
def shared_hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    """Made once; whoever breaks something mends it (``hospitals`` does)."""
    pytest.importorskip("nvflare", reason="the extra [flare] is not installed")
    with Hospitals(Path(tmp_path_factory.mktemp("hospitals"))) as made:
        yield made


@pytest.fixture
def hospitals(shared_hospitals: Hospitals) -> Iterator[Hospitals]:
    """A server and three sites, all connected, nothing running."""
    yield shared_hospitals
    shared_hospitals.reset()
