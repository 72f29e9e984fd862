"""Every `polyclinic` command that the documentation shows exists, with the options that are shown."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from polyclinic.cli.app import app
from tests.docs.test_pages import DOCS, PAGES, ROOT

DEPLOY = sorted(file for file in (ROOT / "deploy").iterdir() if file.is_file())
STUDIES = sorted([*(ROOT / "examples").glob("*.toml"), *(ROOT / "benchmarks").rglob("*.toml")])
HISTORY = ("CHANGELOG.md",)
FLAGS = (
    "--help",
    "-h",
    "--version",
    "--install-completion",
    "--quiet",
    "--verbose",
    "--log-file",
    "--log-format",
    "--log-level",
)
NOT_COMMANDS = ("polyclinic data vector 1",)  # the label under which data vectors are signed
WORD = r"(?:\S*/)?polyclinic"


def shown(file: Path) -> list[str]:
    """The commands of a file: in fenced blocks and inline code of a page, in comments and settings of other files."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".md":
        quoted = re.findall(rf"`({WORD} [^`]+)`", text)
        return quoted + re.findall(rf"^(?:Exec\w+=|[#$ ]*\$ )({WORD} .+)$", text, re.M)
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    fenced = [found[1] for line in lines if (found := re.match(rf"\s*(?:\$ )?({WORD} .+)", line))]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return fenced + [" ".join(code.split()) for code in re.findall(rf"`({WORD}\s[^`]+)`", prose)]


@cache
def options(command: tuple[str, ...]) -> frozenset[str]:
    """The options of a command."""
    *_, last = app.parse_commands(command)[1]
    return frozenset(name for argument in last.assemble_argument_collection() for name in argument.names)


def problem(text: str) -> str:
    """What is wrong with one command; empty if nothing is."""
    tokens = shlex.split(re.sub(r"\$\([^)]*\)", "X", text), comments=True)[1:]
    tokens = tokens[: next((i for i, token in enumerate(tokens) if token in (">", "|", "&&", ";", "...", "…")), None)]
    found, apps, rest = app.parse_commands([token for token in tokens if token not in FLAGS])
    if apps[-1].default_command is None or not found:
        wrong = [token for token in rest if not token.startswith("-")]
        return f"there is no command {wrong[0]!r}" if wrong else ""
    given = {token.partition("=")[0] for token in rest if re.match(r"--?[a-z]", token)}
    return f"no option {' '.join(sorted(unknown))}" if (unknown := given - options(tuple(found))) else ""


@pytest.mark.parametrize(
    "file",
    [file for file in [*PAGES, *DEPLOY, *STUDIES] if file.name not in HISTORY and shown(file)],
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_commands_exist_with_their_options(file: Path) -> None:
    wrong = {text: reason for text in shown(file) if text not in NOT_COMMANDS and (reason := problem(text))}
    assert not wrong


def test_commands_are_found_and_wrong_ones_are_noticed() -> None:
    assert len(shown(DOCS / "how-to" / "deployment.md")) > 60
    assert 'polyclinic site approve spots --reason "IRB 26-114"' in " ".join(shown(ROOT / "README.md"))
    assert problem("polyclinic site allow spots") == "there is no command 'allow'"
    assert problem("polyclinic run study.toml --quietly") == "no option --quietly"
    assert not problem("polyclinic run study.toml --quiet --set rounds=2 > log.txt --quietly")
