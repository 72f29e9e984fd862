"""Hippocampus on the grid of its files: ``python benchmarks/hippocampus.py`` runs or continues the studies.

The studies are ``benchmarks/studies/hippocampus*.toml``, one after the other, in one process and one thread. After each
method run its scores and the CPU time that it took, with data and evaluation, are added to ``--results``. Stopped, the
same command continues, and a method run that is finished is not repeated.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from polyclinic.core import atomic
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.run_directory import read_tensors
from polyclinic.studies.run.scheduler import run

STUDIES = Path(__file__).parent / "studies"
NAMES = ("hippocampus", "hippocampus-augmented")


def scores(arm: Path, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return the Dice of each class over the test images of a finished method run, from its predictions."""
    leaves = read_tensors(arm / "predictions.safetensors")
    dice = torch.cat([leaf for name, leaf in sorted(leaves.items()) if name.endswith("/dice")]).double()
    return {
        "images": len(dice),
        "dice": {name: dice[:, i].tolist() for i, name in enumerate(classes[1:])},
    }


def follow(name: str, out: Path, results: Path) -> None:
    """Run the study ``name``, or continue it, and record each method run."""
    file = STUDIES / f"{name}.toml"
    text = file.read_text()
    study, path = parse(text, file), out / name
    ledger = out / f"{name}-seconds.json"
    spent: dict[str, float] = json.loads(ledger.read_text()) if ledger.exists() else {}
    known: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    since = time.process_time()
    for event in run(study, text, path, resume=path.exists()):
        now = time.process_time()
        arm = f"{event.label}-seed{event.seed}"
        if event.label:
            spent[arm] = spent.get(arm, 0.0) + now - since
            atomic.write_json(ledger, spent)
        since = now
        if event.what == "tested" and (key := f"{name}/{arm}") not in known:
            found = scores(path / "arms" / arm, tuple(study.data.options["classes"]))
            known[key] = {"cpu_s": spent[arm], **found}
            atomic.write_json(results, known)
            means = {label: sum(v) / len(v) for label, v in found["dice"].items()}
            print(key, f"{spent[arm]:.0f} s", means, flush=True)


def main() -> None:
    """Run the studies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the run folders")
    parser.add_argument("--results", type=Path, default=Path("runs/hippocampus.json"), help="file of the scores")
    parser.add_argument("studies", nargs="*", default=NAMES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.studies:
        follow(name, given.out, given.results)


if __name__ == "__main__":
    main()
