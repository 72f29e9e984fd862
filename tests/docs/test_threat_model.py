"""The threat model names tests, and they are there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "explanation" / "threat-model.md"
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text())


@cache
def functions(path: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


@cache
def imported(path: str) -> dict[str, str]:
    """The files of the tests from which names are imported, by name."""
    found: dict[str, str] = {}
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tests."):
            found |= {alias.name: f"{node.module.replace('.', '/')}.py" for alias in node.names}
    return found


def checks(path: str, name: str) -> bool:
    """Whether a function asserts something, itself or by a function of the tests that it calls, or runs a state machine."""
    for node in ast.walk(functions(path)[name]):
        if isinstance(node, ast.Assert) or (isinstance(node, ast.Attribute) and node.attr == "raises"):
            return True
        called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        place = path if called in functions(path) else imported(path).get(called, "")
        if called == "run_state_machine_as_test":
            return True
        if called != name and place and called in functions(place) and checks(place, called):
            return True
    return False


@pytest.mark.parametrize(("path", "name"), sorted(set(NAMED)), ids=lambda x: x.rpartition("/")[2])
def test_a_named_test_is_there_and_checks_something(path: str, name: str) -> None:
    assert (ROOT / path).is_file()
    assert name in functions(path), f"{path} has no {name}"
    assert checks(path, name), f"{path}::{name} asserts nothing"


def test_every_row_names_a_test() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "shown by" not in line]
    assert len(rows) > 30
    for row in rows:
        assert re.search(r"`tests/[\w/]+\.py::\w+` \|$", row), row
