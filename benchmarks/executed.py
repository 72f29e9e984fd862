"""Count the files and function lines of Polyclinic that one round of FedAvg executes.

Profiles ``polyclinic run`` in process, on made-up images at three sites, without the report, and prints each file with the lines of
its executed functions. Functions that run when a module is imported are not counted. A function counts with its docstring, and
as a whole even if it returns at once. Goal: at most 30 files and 1,800 lines.

Measured: 85 files and 4,853 lines, so the goal is not reached. When it was 80 files and 4,639 lines, these were of the run folder,
checkpoints, records and the loop over method runs (1,287), reading, splitting, checking and identifying the data (987), training and its
network (590), the study file and its checks (418), messages and rounds (416), validation and test metrics (347), the command line (275),
the engine (230) and methods (89).

    python benchmarks/executed.py
"""

import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from types import CodeType, FrameType

import numpy as np

import polyclinic
from polyclinic.cli import run as cli

PACKAGE = f"{Path(polyclinic.__file__).parent}/"
GOAL_FILES, GOAL_LINES = 30, 1800
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


def executed_functions(study: Path, out: Path) -> set[CodeType]:
    """Return the code of each function of Polyclinic that a run of ``study`` calls in this thread."""
    executed: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE) and not importing(frame):
            executed.add(frame.f_code)

    report, cli.write_report = (
        cli.write_report,
        lambda folder: folder,
    )  # the report comes after the rounds, and takes far longer
    sys.setprofile(note)
    try:
        cli.run(study, out=out)
    finally:
        sys.setprofile(None)
        cli.write_report = report
    return executed


def importing(frame: FrameType) -> bool:
    """Return whether ``frame`` runs because a module of Polyclinic is being imported."""
    above: FrameType | None = frame
    while above is not None:
        if above.f_code.co_name == "<module>" and above.f_code.co_filename.startswith(PACKAGE):
            return True
        above = above.f_back
    return False


def lines_by_file(functions: set[CodeType]) -> dict[str, set[int]]:
    """Return the lines of the functions, by file below ``polyclinic/``; class bodies, lambdas and module code are left out."""
    lines: dict[str, set[int]] = defaultdict(set)
    for code in functions:
        if not code.co_name.startswith("<") and code.co_flags & 0x2:  # 0x2, CO_NEWLOCALS with fast locals: a function
            last = max(line for *_, line in code.co_lines() if line)
            lines[code.co_filename.removeprefix(PACKAGE)] |= set(range(code.co_firstlineno, last + 1))
    return dict(lines)


def write_study(folder: Path) -> Path:
    """Write images of three sites and the study file, and return the path of the file."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 2
    images = (rng.normal(100, 30, (120, 8, 8)) + 40 * labels[:, None, None]).clip(0, 255).astype(np.uint8)
    np.savez(folder / "images.npz", images=images, labels=labels, site=np.repeat(["north", "south", "east"], 40))
    study = folder / "one-round.toml"
    study.write_text(STUDY.format(path=folder / "images.npz"), encoding="utf-8")
    return study


def main() -> None:
    """Run the study, and print the counts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = lines_by_file(executed_functions(write_study(folder), folder / "runs"))
    print("\nlines of executed functions, by file:")
    for file, numbers in sorted(lines.items(), key=lambda item: -len(item[1])):
        print(f"{len(numbers):6}  {file}")
    total = sum(map(len, lines.values()))
    print(f"{total:6}  in {len(lines)} files (goal: at most {GOAL_LINES:,} lines in {GOAL_FILES} files)")


if __name__ == "__main__":
    main()
