"""Every method has a page with its description, source and options, and equations that convert to MathML."""

import tomllib
from pathlib import Path

import pytest

from polyclinic.methods.catalog import FAMILIES, METHODS
from polyclinic.methods.method_page import page

NOTES = tomllib.loads((Path(__file__).parents[2] / "docs" / "reference" / "methods.toml").read_text(encoding="utf-8"))


def test_every_method_says_what_it_is_whom_to_cite_and_what_leaves() -> None:
    for name, entry in METHODS.items():
        told = page(name)
        assert entry.summary, name
        assert entry.paper, name
        assert entry.leaves, name
        assert any(len(text) > 80 for text in told.about), name
        assert all(meaning for _, meaning in told.options.values()), (name, told.options)


def test_notes_are_of_methods_and_families_that_exist() -> None:
    assert NOTES["method"].keys() <= METHODS.keys()
    assert NOTES["family"].keys() == {family for family, entries in FAMILIES.items() if entries}


def test_every_equation_converts() -> None:
    converter = pytest.importorskip("latex2mathml.converter", reason="needs polyclinic[docs]")
    for name, note in NOTES["method"].items():
        for equation in note["equations"]:
            made = converter.convert(equation)
            assert "\\" not in made, (name, equation)
