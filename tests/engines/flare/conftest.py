"""One federation of real processes for all tests that need one: a server, three sites, mutual TLS, on loopback."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from polyclinic.engines.flare.client import training_worker
from polyclinic.engines.flare.protocol import registration, rpc, run_request
from tests.support.flare_deployment import Hospitals


@pytest.fixture(scope="session", autouse=True)
def code_hashed_once() -> Iterator[None]:
    """The code on disk is read once, since no test edits Polyclinic; tests of changed code set their own hash."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_worker, "code_on_disk", run_request.code_hash)
        yield


@pytest.fixture(scope="session")
def shared_hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    """Created once; a test that breaks something repairs it (``hospitals`` does)."""
    pytest.importorskip("nvflare", reason="the extra [flare] is not installed")
    with Hospitals(Path(tmp_path_factory.mktemp("hospitals"))) as made:
        yield made


@pytest.fixture
def hospitals(shared_hospitals: Hospitals) -> Iterator[Hospitals]:
    """A server and three sites, all connected, nothing running."""
    yield shared_hospitals
    shared_hospitals.reset()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the server of an exchange in this process, time passes only when it looks at the clock.

    A deadline therefore passes only for a site that never answers, however slow the machine is.
    """
    looks, greetings = count(), count()
    monkeypatch.setattr(rpc, "time", SimpleNamespace(monotonic=lambda: float(next(looks))))
    monkeypatch.setattr(registration, "time", SimpleNamespace(monotonic=lambda: next(greetings) / 20))
