"""What the house promises of its methods as text: short files, and one training loop."""

import re
from pathlib import Path
from statistics import median

import polyclinic
from polyclinic.methods.catalog import METHODS

HOUSE = Path(polyclinic.__file__).parent
# Who may step an optimizer: the training loop, its private kind, and a model that fits itself to one test minibatch.
STEPPERS = {"learning/training/local.py", "learning/training/dp_sgd.py", "methods/personalization/routing_network.py"}


def test_the_median_method_is_at_most_90_lines_with_its_docstrings() -> None:
    """A method is what the table names, and each robust rule, which the table names through one file."""
    named = {entry.make.partition(":")[0] for entry in METHODS.values()} - {"robust.named_rules"}
    files = {HOUSE / "methods" / f"{name.replace('.', '/')}.py" for name in named}
    files |= {file for file in (HOUSE / "methods/robust/rules").glob("*.py") if "(Rule):" in file.read_text()}
    assert len(files) >= 80
    assert median(len(file.read_text().splitlines()) for file in files) <= 90


def test_there_is_one_training_loop() -> None:
    """No method, and nothing else of a task, makes an optimizer or steps one that it made."""
    found = {
        str(file.relative_to(HOUSE))
        for folder in ("methods", "learning")
        for file in sorted((HOUSE / folder).rglob("*.py"))
        if re.search(r"torch\.optim\.\w+\(|_optimizer\(|optimizer\.step\(", file.read_text())
    }
    assert found == STEPPERS
