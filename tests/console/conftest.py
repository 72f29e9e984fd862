"""What the tests of this folder share."""

from collections.abc import Iterator

import pytest

from polyclinic.console.children import Children


@pytest.fixture(autouse=True)
def temporary_folders_removed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close what the pages of a test have opened, as the console does when it ends."""
    begin, begun = Children.__init__, list[Children]()

    def noted(self: Children) -> None:
        begin(self)
        begun.append(self)

    monkeypatch.setattr(Children, "__init__", noted)
    yield
    for children in begun:
        children.close()
