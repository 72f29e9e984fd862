"""What the architecture page says of the way of one round is so: a run passes those files, and no more lines than that."""

import re
import sys
from pathlib import Path
from types import CodeType, FrameType

import pytest

from polyclinic.cli import run as cli
from tests.studies.run.test_scheduler import npz

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "architecture.md").read_text()
STUDY = """\
name = "one-round"
rounds = 1

[data]
path = "{path}"
kind = "npz"
sites = "site"

[engine]
kind = "in-process"

[[methods]]
name = "fedavg"
"""


def listed() -> list[str]:
    """The files that the page opens, in order."""
    section = PAGE.split("## Following one round of FedAvg")[1].split("\n## ")[0]
    return re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", section)


def passed(study: Path, out: Path) -> set[CodeType]:
    """The functions of ours that a run of ``study`` goes through."""
    found: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and f"{ROOT}/polyclinic/" in frame.f_code.co_filename:
            found.add(frame.f_code)

    sys.setprofile(note)
    try:
        cli.run(study, out=out)
    finally:
        sys.setprofile(None)
    return found


def test_a_round_is_followed_through_at_most_twelve_files_and_1300_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "write_report", lambda folder: folder)  # its pictures take long, and come after the rounds
    study = tmp_path / "one-round.toml"
    study.write_text(STUDY.format(path=npz(tmp_path)))
    files = listed()
    assert len(files) == len(set(files)) <= 12
    lines: dict[str, set[int]] = {file: set() for file in files}
    for code in passed(study, tmp_path / "runs"):
        file = code.co_filename.rpartition("/polyclinic/")[2]
        if file in lines and not code.co_name.startswith("<"):
            last = max(line for *_, line in code.co_lines() if line)
            lines[file] |= set(range(code.co_firstlineno, last + 1))
    assert all(lines.values()), [file for file, some in lines.items() if not some]
    total = sum(map(len, lines.values()))
    assert total <= 1300, total
