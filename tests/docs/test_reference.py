"""The generated reference is complete: every key of a study file, every command and every exit code has its text."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import reference  # noqa: E402


def test_every_key_has_a_meaning() -> None:
    rows = [line for line in reference.config_page().splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    assert not (empty := [row for row in rows if row.rstrip().endswith("|  |")]), empty


def test_the_command_page_has_every_command_once() -> None:
    page = reference.cli_page()
    for name in ("run", "report", "data check", "site approve", "server run", "journal verify"):
        assert page.count(f"# polyclinic {name}\n") == 1, name
    assert "# polyclinic study" not in page
    assert "## Exit codes" in page
