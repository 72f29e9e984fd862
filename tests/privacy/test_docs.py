"""The examples of the pages on privacy and compression run from top to bottom."""

import re
from pathlib import Path

import pytest

pytest.importorskip("dp_accounting", reason="needs polyclinic[privacy]")
pytest.importorskip("cryptography", reason="needs polyclinic[privacy]")
PAGES = [Path(__file__).parents[2] / "docs" / name for name in ("explanation/privacy.md", "how-to/compression.md")]


@pytest.mark.parametrize("page", [page for page in PAGES if page.exists()], ids=lambda page: page.stem)
def test_examples_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "example"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(block, page.name, "exec"), scope)
    said = capsys.readouterr().out
    for promised in re.findall(r"^# (ε = .*)$", page.read_text(), re.M):
        assert promised in said
