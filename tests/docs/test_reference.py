"""The generated reference is complete: every key of a study file, every command and every exit code has its text."""

import sys
from pathlib import Path

from polyclinic.cli.app import EXIT_CODES
from polyclinic.engines.policy import site_ledger

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


def test_exit_codes_are_those_of_the_command_line() -> None:
    codes = {str(code): meaning for code, meaning in EXIT_CODES}
    assert codes.keys() >= {"0", "1", "2", "3", "70", "130, 143"}
    assert all(len(meaning) > 10 for meaning in codes.values())


def test_errors_of_the_same_name_are_told_apart() -> None:
    lines = ["Read the record.", "", ":raises Broken: If it was changed.", ":raises ValueError: If it is empty."]
    reference.qualify_errors(None, "function", "name", site_ledger.ledger_for, None, lines)
    assert lines[2:] == [
        ":raises ~polyclinic.core.audit_log.Broken: If it was changed.",
        ":raises ValueError: If it is empty.",
    ]
