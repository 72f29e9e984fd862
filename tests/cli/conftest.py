"""What the tests of this folder share."""

import logging
from collections.abc import Iterator

import pytest

from polyclinic.cli import rendering
from tests.studies.conftest import coarse_accounting as coarse_accounting


@pytest.fixture(autouse=True)
def same_console() -> Iterator[None]:
    """Undo what a command of this process has set for all that it prints and logs."""
    yield
    rendering.progress.quiet = rendering.progress.stderr = False
    rendering.note_invocation([])
    log = logging.getLogger("polyclinic")
    for handler in log.handlers:
        handler.close()
    log.handlers[:], log.propagate = [], True
    log.setLevel(logging.NOTSET)
