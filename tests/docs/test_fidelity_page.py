"""The page on fidelity: its tests exist, its methods too, and it leaves nothing out that the table of methods admits."""

import ast
import re
from pathlib import Path

from polyclinic.methods.catalog import ABSTRACT, METHODS
from polyclinic.methods.method_page import page
from tests.support.departures import PAGE, table

TESTS = Path(__file__).parents[1]
FOUND = table("What the audit found")


def functions(path: str) -> set[str]:
    """The names of the functions of a module of tests."""
    parsed = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(parsed) if isinstance(node, ast.FunctionDef)}


def test_every_finding_names_methods_and_a_test_that_exist() -> None:
    assert len(FOUND) >= 30
    for methods, finding, done, test, size in FOUND:
        names = set(re.findall(r"`([^`]+)`", methods))
        assert names <= METHODS.keys(), methods
        assert names or methods == "all"
        path, _, function = test.strip("`").partition("::")
        assert function in functions(path), test
        assert finding, methods
        assert done, methods
        assert size, methods


def test_readings_of_abstracts_are_named_in_the_table() -> None:
    row = next(cells for cells in FOUND if "abstract" in cells[1])
    for name in re.findall(r"`([^`]+)`", row[0]):
        assert METHODS[name].fidelity == ABSTRACT, name


def test_what_is_missing_is_stated() -> None:
    """What has no size is named on the page, in the table of methods or the method's documentation."""
    left_out = PAGE.read_text(encoding="utf-8").split("Left out, because")[1].split("\n\n")[0]
    for word in ("k-space", "attention", "Poisson", "100"):
        assert word in left_out
    documented = {name: " ".join(page(name).about) for name in ("fedmri", "fedkd", "fedpidavg", "fedala")}
    assert "second U-Net, which works on k-space; it is missing" in documented["fedmri"]
    assert "attention matrices" in documented["fedkd"]
    assert "Poisson" in documented["fedpidavg"]
    assert "100 passes" in documented["fedala"]
