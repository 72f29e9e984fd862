"""Every method has a page with its description, source and options, and equations that convert to MathML."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from polyclinic.methods import method_source, registry
from polyclinic.methods.catalog import ABSTRACT, EXACT, FAMILIES, METHODS, UNCHECKED, family_of
from polyclinic.methods.method_page import page

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import reference  # noqa: E402

NOTES = tomllib.loads((ROOT / "docs" / "reference" / "methods.toml").read_text(encoding="utf-8"))


def test_every_method_says_what_it_is_whom_to_cite_and_what_leaves() -> None:
    for name, entry in METHODS.items():
        told = page(name)
        assert entry.summary, name
        assert entry.paper, name
        assert entry.leaves, name
        assert any(len(text) > 80 for text in told.about), name
        assert all(meaning for _, meaning in told.options.values()), (name, told.options)


def test_every_method_says_how_far_it_follows_its_paper_and_what_an_unseen_site_gets() -> None:
    for name, entry in METHODS.items():
        text = page(name).as_markdown()
        assert f"**Fidelity to the paper:** {entry.fidelity}." in text
        assert f"**A site that did not train predicts with:** {entry.unseen}." in text
        assert entry.fidelity in (EXACT, ABSTRACT, UNCHECKED) or entry.fidelity.startswith("departs: "), name
        if "full text was not available" in " ".join(page(name).about):
            assert entry.fidelity == ABSTRACT, name


def test_a_page_that_is_read_is_that_of_the_imported_method() -> None:
    """Reading the syntax tree gives the same as importing; a few methods are always imported."""

    def described(source: method_source.MethodSource) -> tuple[object, ...]:
        docs = [[doc for doc in found if "Attributes:" in doc] for found in (source.classes, source.lineage)]
        return source.maker, source.method, source.module, docs, [*source.options.items()]

    unread = []
    for name, entry in METHODS.items():
        try:
            read = method_source.read(entry)
        except method_source._NotStatic:
            unread.append(name)
            continue
        assert described(read) == described(method_source.imported(entry)), name
    assert len(unread) < 15
    assert method_source.PROVIDED == registry.PROVIDED


def test_notes_are_of_methods_and_families_that_exist() -> None:
    assert NOTES["method"].keys() <= METHODS.keys()
    assert NOTES["family"].keys() == {family for family, entries in FAMILIES.items() if entries}


def test_every_equation_converts() -> None:
    converter = pytest.importorskip("latex2mathml.converter", reason="needs polyclinic[docs]")
    for name, note in NOTES["method"].items():
        for equation in [*note["equations"], *re.findall(r"\$([^$]+)\$", note.get("symbols", ""))]:
            made = converter.convert(equation)
            assert "\\" not in made, (name, equation)


def test_every_equation_is_shown_on_the_page_of_its_method_with_its_symbols() -> None:
    assert len(NOTES["method"]) > 90
    for name, note in NOTES["method"].items():
        text = reference.method_page(METHODS[name], family_of(name), NOTES, [])
        assert note["symbols"], name
        assert all(f"$$\n{equation}\n$$" in text for equation in note["equations"]), name
        assert note["symbols"] in text, name


def test_equations_are_balanced() -> None:
    for name, note in NOTES["method"].items():
        for equation in note["equations"]:
            assert equation.count("{") - equation.count(r"\{") == equation.count("}") - equation.count(r"\}"), (
                name,
                equation,
            )
            assert equation.count(r"\left") - equation.count(r"\leftarrow") == equation.count(r"\right"), (
                name,
                equation,
            )
        assert note["symbols"].count("$") % 2 == 0, name
