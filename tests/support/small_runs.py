"""A study of small images, its runs, and what is compared of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.run_directory import read_tensors
from polyclinic.studies.run.scheduler import run

STUDY = """\
name = "small"
rounds = 4
seeds = [0, 1]

[data]
path = "{path}"
kind = "npz"
sites = "site"
external = ["d"]

[task]
options = {{ width = 4, depth = 2, dropout = 0.2 }}

[training]
batch_size = 8

[engine]
kind = "{engine}"

[[methods]]
name = "local"

[[methods]]
name = "pooled"

[[methods]]
name = "cross"

[[methods]]
name = "fedbn"

[[methods]]
name = "scaffold"

[[methods]]
name = "fedavg"
label = "private"
uniform = true
uplink = [{{ name = "clip", bound = 5.0 }}]
"""


def npz(folder: Path, **changes: object) -> Path:
    """Images of 8 x 8 pixels at four sites, brighter where the label is 1."""
    rng = np.random.default_rng(0)
    n = 160
    labels = rng.integers(0, 2, n)
    images = (rng.normal(100, 30, (n, 8, 8)) + 40 * labels[:, None, None]).clip(0, 255).astype(np.uint8)
    site = np.array(list("abcd"))[np.arange(n) % 4]
    path = folder / "small.npz"
    arrays: dict[str, Any] = {"images": images, "labels": labels, "site": site}
    np.savez(path, **(arrays | changes))
    return path


def study(folder: Path, engine: str = "in-process", **changes: str) -> str:
    text = STUDY.format(path=folder / "small.npz", engine=engine)
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


def go(text: str, path: Path, resume: bool = False) -> list[Any]:
    return list(run(parse(text), text, path, resume))


def stopped_and_resumed(text: str, path: Path, stop_after: int) -> None:
    """Runs a study, stops it after the given number of events, and resumes it."""
    events = run(parse(text), text, path)
    for _ in range(stop_after):
        next(events)
    events.close()
    go(text, path, resume=True)


def facts(path: Path) -> list[dict[str, Any]]:
    """The records without what differs from machine to machine."""
    with open(path / "records.jsonl") as file:
        return [{k: v for k, v in json.loads(line).items() if k not in ("wall", "seconds")} for line in file]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every model and prediction of a run."""
    return {
        f"{file.parent.name}/{file.stem}/{name}": leaf
        for kind in ("model", "predictions")
        for file in sorted(path.glob(f"arms/*/{kind}.safetensors"))
        for name, leaf in read_tensors(file).items()
    }


def same(a: Path, b: Path) -> bool:
    x, y = tensors(a), tensors(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) and facts(a) == facts(b)


def opened_once(path: Path) -> list[dict[str, Any]]:
    """The records as if no arm had been killed while its test data were open; how often they were is checked separately."""
    return [{k: v for k, v in fact.items() if k != "opened"} for fact in facts(path)]
