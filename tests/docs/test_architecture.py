"""What the architecture page says of the way of one round is so: a run passes those files, and no more lines than that, and
does each thing once."""

import re
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

import pytest

from polyclinic.cli import run as cli
from tests.support.small_runs import npz

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


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Counter[CodeType]:
    """The number of calls of each function of ours that a run of one round goes through."""
    found: Counter[CodeType] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and f"{ROOT}/polyclinic/" in frame.f_code.co_filename:
            found[frame.f_code] += 1

    folder = tmp_path_factory.mktemp("one-round")
    study = folder / "one-round.toml"
    study.write_text(STUDY.format(path=npz(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "write_report", lambda folder: folder)  # its pictures take long, and come after the rounds
        sys.setprofile(note)
        try:
            cli.run(study, out=folder / "runs")
        finally:
            sys.setprofile(None)
    return found


def test_a_round_is_followed_through_at_most_twelve_files_and_1250_lines(calls: Counter[CodeType]) -> None:
    files = listed()
    assert len(files) == len(set(files)) <= 12
    lines: dict[str, set[int]] = {file: set() for file in files}
    for code in calls:
        file = code.co_filename.rpartition("/polyclinic/")[2]
        if file in lines and not code.co_name.startswith("<"):
            last = max(line for *_, line in code.co_lines() if line)
            lines[file] |= set(range(code.co_firstlineno, last + 1))
    assert all(lines.values()), [file for file, some in lines.items() if not some]
    total = sum(map(len, lines.values()))
    assert total <= 1250, total


def test_a_run_does_each_thing_once(calls: Counter[CodeType]) -> None:
    """Of one method with one seed, whose folder is named by the study's hash and whose first line shows it."""
    expected = {
        "table_of": 1,  # parses the file
        "checked": 1,
        "source_of": 2,  # the validation of [data] checks a source, and the run has its own; one of them reads
        "Npz.examples": 24,  # four sites with three roles: for the sites, and for the hashes that identify the data
        "federate": 1,
        "patients_apart": 1,
        "Plan.build_method": 1,
        "Network.__call__": 3,  # described, with the start weights of the seed, and for training
        "Study.hash": 3,  # the name of the folder, the first line, the run
    }
    found = Counter(dict.fromkeys(expected, 0))
    for code, count in calls.items():
        if code.co_qualname in expected:
            found[code.co_qualname] += count
    assert found == expected
