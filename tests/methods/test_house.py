"""What the house promises of its methods as text: one training loop."""

import re
from pathlib import Path

import polyclinic

HOUSE = Path(polyclinic.__file__).parent
# Who may step an optimizer: the training loop, its private kind, a model that fits itself to one test minibatch, and the
# linear baseline, which no method trains.
STEPPERS = {
    "learning/linear_model.py",
    "learning/training/local.py",
    "learning/training/dp_sgd.py",
    "methods/personalization/routing_network.py",
}


def test_there_is_one_training_loop() -> None:
    """No method, and nothing else of a task, makes an optimizer or steps one that it made."""
    found = {
        str(file.relative_to(HOUSE))
        for folder in ("methods", "learning")
        for file in sorted((HOUSE / folder).rglob("*.py"))
        if re.search(r"torch\.optim\.\w+\(|_optimizer\(|optimizer\.step\(", file.read_text())
    }
    assert found == STEPPERS
