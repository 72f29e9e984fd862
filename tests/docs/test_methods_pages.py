"""The pages of methods are those that the table and the docstrings make."""

from pathlib import Path

from polyclinic.methods.page import page, write_pages
from polyclinic.methods.table import METHODS

PAGES = Path(__file__).parents[2] / "docs" / "methods"


def test_the_pages_are_up_to_date(tmp_path: Path) -> None:
    write_pages(tmp_path)
    made = {file.name: file.read_text() for file in tmp_path.glob("*.md")}
    kept = {file.name: file.read_text() for file in PAGES.glob("*.md")}
    assert made.keys() == kept.keys(), "run `make docs`"
    different = [name for name in made if made[name] != kept[name]]
    assert not different, "run `make docs`"


def test_every_method_says_what_it_is_whom_to_cite_and_what_leaves() -> None:
    for name, entry in METHODS.items():
        told = page(name)
        assert entry.summary, name
        assert entry.paper, name
        assert entry.leaves, name
        assert any(len(text) > 80 for text in told.about), name
        assert all(meaning for _, meaning in told.options.values()), (name, told.options)
