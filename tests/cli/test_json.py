"""``--json``: every command that reports has it, and prints one JSON document and nothing else."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import App

from polyclinic.cli import app, rendering

EXCEPTIONS = {  # with the reason; docs/reference/cli-json.md lists the same
    "server start": "runs until it is stopped",
    "site start": "runs until it is stopped",
    "server unit": "prints the text of a systemd unit",
    "site unit": "prints the text of a systemd unit",
}
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli-json.md"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    rendering.progress.quiet = rendering.progress.stderr = False
    rendering.note_invocation([])


def commands(at: App = app.app, name: str = "") -> Iterator[tuple[str, App]]:
    """Every command with its name, without those of the group ``study``, which are the same."""
    for word in at:
        if not word.startswith("-") and (full := f"{name} {word}".strip()) != "study":
            if at[word].default_command is not None:
                yield full, at[word]
            yield from commands(at[word], full)


def options(command: App) -> set[str]:
    return {n for argument in command.assemble_argument_collection(parse_docstring=True) for n in argument.names}


def test_every_command_takes_json_or_is_a_named_exception() -> None:
    without = {name for name, command in commands() if "--json" not in options(command)}
    assert without == set(EXCEPTIONS)


def test_the_page_describes_every_command() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    assert sorted(name for name, _ in rows) == sorted(name for name, _ in commands())
    assert {name for name, _ in rows if name in EXCEPTIONS} == set(EXCEPTIONS)


def test_a_mistake_leaves_standard_output_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["run", "none.toml"], ["status", "."], ["methods", "show", "fedproxx"], ["run", "--what"]):
        monkeypatch.setattr(sys, "argv", ["polyclinic", *words, "--json"])
        with pytest.raises(SystemExit) as end:
            app.main()
        output = capsys.readouterr()
        assert (end.value.code, output.out) == (2, ""), words
        assert output.err


def test_numbers_that_are_not_finite_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    with rendering.document(True) as emit:
        print("text")
        rendering.hint("progress")
        emit({"value": float("nan"), "path": Path("a"), "pair": (1, float("inf"))})
    output = capsys.readouterr()
    assert json.loads(output.out) == {"value": None, "path": "a", "pair": [1, None]}
    assert output.err == "progress\n"
