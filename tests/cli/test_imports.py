"""Commands that print lists start quickly: they import neither PyTorch nor MONAI."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from polyclinic.cli.app import app
try:
    app({words!r})
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules, "torch was imported"
assert "monai" not in sys.modules, "monai was imported"
"""


@pytest.mark.parametrize(
    "words",
    [["--help"], ["methods"], ["methods", "show", "scaffold"], ["data", "list"], ["data", "show", "busi"]],
    ids=" ".join,
)
def test_a_list_is_printed_without_pytorch(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(words=words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert len(done.stdout) > 200
