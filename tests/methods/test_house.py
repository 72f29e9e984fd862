"""What the house promises of its methods as text: one training loop, and files that can be read at once."""

import re
from pathlib import Path
from statistics import median

import polyclinic
from polyclinic.methods.catalog import METHODS

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


NEW = {
    *("fine-tuned", "rolora", "ffa-lora", "fedsa-lora", "flexlora", "flora", "fedrod", "fedcostwavg", "fedpidavg"),
    *(
        "fedism",
        "fedpid",
        "fedala",
        "fedrdn",
        "feddg-ga",
        "fedsam",
        "fedlc",
        "balanced-softmax",
        "fedproto",
        "per-fedavg",
    ),
    *("fedbabu", "ccvr", "mixstyle", "adain", "fda", "fednoro", "fedcorr", "fedsoup", "fedfa", "fediic", "fedmlp"),
    *("feda3i", "fedawa", "fedlws", "fedntd", "feddecorr", "fedetf", "fedexp", "fedlesam", "fedspeed", "fedcm", "cfl"),
    *("asym-fedavg", "fisher-merging", "regmean"),
}
"""Methods that recent medical papers compare with, which were added after the first audit."""


def test_the_median_file_of_a_new_method_has_at_most_100_lines() -> None:
    """With its docstring; a method that needs more is no failure, but most are a page."""
    modules = {METHODS[name].make.partition(":")[0].replace(".", "/") for name in NEW}
    lengths = {m: len((HOUSE / "methods" / f"{m}.py").read_text(encoding="utf-8").splitlines()) for m in modules}
    assert len(lengths) > 30
    assert median(lengths.values()) <= 100, sorted(lengths.items(), key=lambda item: item[1])
