"""What the house promises of its methods as text: short files, and one training loop."""

import re
from pathlib import Path
from statistics import median

import polyclinic
from polyclinic.methods.table import METHODS

HOUSE = Path(polyclinic.__file__).parent
# Who may step an optimiser: the training loop, its private kind, and a model that fits itself to one test minibatch.
STEPPERS = {"tasks/local.py", "tasks/dpsgd.py", "tasks/routing.py"}


def test_the_median_method_is_at_most_90_lines_with_its_docstrings() -> None:
    files = {entry.make.partition(":")[0] for entry in METHODS.values()}
    lengths = sorted(len((HOUSE / "methods" / f"{name}.py").read_text().splitlines()) for name in files)
    assert len(files) > 60
    assert median(lengths) <= 90


def test_there_is_one_training_loop() -> None:
    """No method, and nothing else of a task, makes an optimiser or steps one that it made."""
    found = {
        str(file.relative_to(HOUSE))
        for folder in ("methods", "tasks")
        for file in sorted((HOUSE / folder).rglob("*.py"))
        if re.search(r"torch\.optim\.\w+\(|_optimiser\(|optimiser\.step\(", file.read_text())
    }
    assert found == STEPPERS
