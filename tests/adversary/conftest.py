"""What the tests of this folder share."""

import os

import pytest

from tests.engines.flare.conftest import code_hashed_once as code_hashed_once
from tests.engines.flare.conftest import hospitals as hospitals
from tests.engines.flare.conftest import looks as looks
from tests.engines.flare.conftest import shared_hospitals as shared_hospitals


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine crashes in these tests, so that nothing need be forced to the disk; that takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
