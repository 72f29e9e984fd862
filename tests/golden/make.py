"""Writes the golden files: ``python -m tests.golden.make``. Run it only when a file format changes on purpose.

The files are small, hold invented numbers, and are committed. ``test_golden.py`` reads them, so that a change of the
code's layout which would change a file format is noticed. They are written with fixed numbers where that is possible;
times, versions and hashes in the run's folder are those of the day on which it was written.
"""

import json
import shutil
from contextlib import chdir
from pathlib import Path

import numpy as np
import torch

from polyclinic.core import serialization
from polyclinic.core.aggregates import ElementwiseMean, PerSite, PerSiteUniform, Reply, WeightedMean
from polyclinic.core.audit_log import Journal
from polyclinic.core.method import Request
from polyclinic.core.pipeline import Packed, SentState
from polyclinic.core.tree import Tree
from polyclinic.engines.flare.protocol import tensor_file
from polyclinic.engines.flare.protocol.run_request import RunRequest, survey_plan
from polyclinic.engines.flare.server.run_coordinator import RunCheckpoint
from polyclinic.learning.training.dp_sgd import Spend
from polyclinic.methods.optimization import fedavg, scaffold
from polyclinic.methods.robust import robust_method
from polyclinic.methods.robust.rules.outlier_watch import Note
from polyclinic.privacy.ledger import Ledger
from polyclinic.secure_aggregation.secure_messages import Advert
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.records.checkpoint import Checkpoint
from polyclinic.studies.run.scheduler import run

HERE = Path(__file__).parent
STUDY = """\
name = "golden"
rounds = 2
seeds = [0]

[data]
path = "small.npz"
kind = "npz"
sites = "site"

[task]
options = { width = 2, depth = 1 }

[[methods]]
name = "fedavg"
"""


def numbers(first: float) -> Tree:
    """A small tree that is the same everywhere."""
    return {"w": torch.arange(first, first + 6).reshape(2, 3), "n": torch.tensor(7)}


def checkpoint() -> Checkpoint:
    """The progress of an arm, with states within states."""
    note = Note(seen=3, outlying=1, score=4.5, norm=2.0, cosine=-0.5, share=None, excluded="too long")
    inner = SentState(fedavg.State(2, numbers(0)), ({"clip": {"bound": torch.tensor(1.5)}}, {}))
    whole = robust_method.State(inner, {"train": numbers(10)}, {"lyon": note})
    return Checkpoint(whole, {"lyon": {"optimizer": numbers(20)}}, 2, 345, 1, float("-inf"), False, 1.25)


def deployment() -> RunCheckpoint:
    """The progress of a run between hospitals."""
    inner = scaffold.State(3, numbers(0), numbers(1))
    return RunCheckpoint(inner, 3, 12, {"lyon": 11, "oslo": 12}, 678, best=2, score=0.75, kept={"lyon": 9})


def reply() -> Reply:
    """Every kind of aggregate."""
    return Reply(
        {
            "update": WeightedMean(numbers(0), 12.0),
            "fisher": ElementwiseMean({"w": torch.ones(2)}, {"w": torch.tensor([1.0, 3.0])}),
            "scores": PerSite({"lyon": {"auc": torch.tensor(0.75)}}),
            "models": PerSiteUniform({"lyon": numbers(3)}),
            "packed": Packed({"lyon": {"bits": torch.tensor([1, 255], dtype=torch.uint8)}}, {"lyon": 5.0}),
        }
    )


def ask() -> Request:
    """What a server sends to one site."""
    return Request(4, {"params": numbers(0)}, "train", secure=True, recipients=("lyon", "oslo"))


def order() -> RunRequest:
    """What a server wants to run."""
    plan = survey_plan(["lyon", "oslo"])
    plan |= {"inputs": [1, 8, 8], "network": "cnn", "method": "scaffold", "rounds": 5}
    return RunRequest("golden", plan, deadline=60.0, external=("nara",), best={"metric": "auc", "higher": True})


def main() -> None:
    """Write all of them."""
    for old in ("run", "journal.jsonl", "ledger.jsonl", "ledger.jsonl.head", "ledger.jsonl.lock"):
        shutil.rmtree(HERE / old) if (HERE / old).is_dir() else (HERE / old).unlink(missing_ok=True)
    serialization.save(HERE / "checkpoint.safetensors", checkpoint())
    serialization.save(HERE / "deployment.safetensors", deployment())
    serialization.save(HERE / "secure.safetensors", (Advert("lyon", "aa", "bb", "cc", "dd"),))
    tensor_file.write(HERE / "reply.safetensors", reply())
    tensor_file.write(HERE / "request.safetensors", ask())
    (HERE / "order.json").write_text(order().to_json() + "\n", encoding="utf-8")
    journal = Journal(HERE / "journal.jsonl")
    journal.write("begun", {"study": "golden", "sites": ["lyon", "oslo"]})
    journal.write(
        "answered", {"round": 1, "parts": [{"part": "update", "kind": serialization.kind_of(WeightedMean({}, 1.0))}]}
    )
    journal.close()
    ledger = Ledger(HERE / "ledger.jsonl")
    ledger.begin(site="lyon", data="nodules", unit="patient", epsilon=3.0, delta=1e-5)
    ledger.reserve([Spend(8.0, 0.1, 10, "patient")], {"run": "golden", "round": 1})
    results()
    (HERE / "ledger.jsonl.lock").unlink()


def results() -> None:
    """The folder of a run over images of 4 x 4 pixels at two sites, made here and not kept."""
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 2
    images = (rng.normal(100, 20, (48, 4, 4)) + 40 * labels[:, None, None]).clip(0, 255).astype(np.uint8)
    site = np.array(["lyon", "oslo"])[np.arange(48) // 2 % 2]
    data = HERE / "small.npz"
    np.savez(data, images=images, labels=labels, site=site)
    try:
        with chdir(HERE):  # so that no path of this machine is in the files
            for _ in run(parse(STUDY), STUDY, Path("run")):
                pass
    finally:
        data.unlink()
    (HERE / "run" / ".lock").unlink(missing_ok=True)
    info = json.loads((HERE / "run" / "run.json").read_text(encoding="utf-8"))
    info["environment"]["platform"] = "Linux"  # the rest of it says only which versions wrote the files
    (HERE / "run" / "run.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
