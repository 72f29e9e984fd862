"""Commands that print lists start quickly: they import neither PyTorch nor MONAI. Nor does a report without audits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.synthetic_run import write_run

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


REPORT = """
import sys
from polyclinic.report.report_builder import build_report
build_report({run!r})
for slow in ("torch", "scipy.stats", "pandas", "monai"):
    assert slow not in sys.modules, slow + " was imported"
"""


def test_a_report_is_written_without_pytorch(tmp_path: Path) -> None:
    sites = {f"site-{k}": ("training", 20, 0.5, 0.1 * k, 0.0) for k in range(7)}
    run = write_run(tmp_path / "run", sites=sites, methods=("local", "fedavg"), seeds=(0,))
    done = subprocess.run(
        [sys.executable, "-c", REPORT.format(run=str(run))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert "Wilcoxon" in (run / "report" / "report.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(("given", "used"), [(None, "1"), ("0", "0")])
def test_large_tensors_use_large_pages_unless_the_user_decided_otherwise(given: str | None, used: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    env |= {} if given is None else {"THP_MEM_ALLOC_ENABLE": given}
    code = """
import atexit, os, sys
from polyclinic.cli.app import main
atexit.register(lambda: print(os.environ["THP_MEM_ALLOC_ENABLE"]))
sys.argv = ["polyclinic", "--version"]
main()
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert told.stdout.splitlines()[-1] == used
