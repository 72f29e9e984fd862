"""CITATION.cff has the keys that version 1.2.0 of its format requires, and agrees with the package."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
KEYS = dict(line.split(": ", 1) for line in TEXT.splitlines() if ": " in line and not line.startswith((" ", "#")))


def test_the_required_keys_are_there() -> None:
    assert KEYS["cff-version"] == "1.2.0"
    assert KEYS["message"]
    assert KEYS["title"].startswith('"Polyclinic')
    assert "authors:\n  - name: " in TEXT


def test_version_and_license_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (KEYS["version"], KEYS["license"]) == (project["version"], project["license"])
