"""The threat model names tests, and they are there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "threat-model.md"
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text())


@cache
def functions(path: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("path", "name"), sorted(set(NAMED)), ids=lambda x: x.rpartition("/")[2])
def test_a_named_test_is_there_and_checks_something(path: str, name: str) -> None:
    assert (ROOT / path).is_file()
    assert name in functions(path), f"{path} has no {name}"
    body = ast.walk(functions(path)[name])
    checks = [n for n in body if isinstance(n, ast.Assert) or (isinstance(n, ast.Attribute) and n.attr == "raises") or (isinstance(n, ast.Call) and "compare" in ast.dump(n.func))]
    assert checks, f"{path}::{name} asserts nothing"


def test_every_row_names_a_test() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "shown by" not in line]
    assert len(rows) > 30
    for row in rows:
        assert re.search(r"`tests/[\w/]+\.py::\w+` \|$", row), row
