"""What a finished run's model gives away: membership by loss at each site, and one image from one gradient.

Everything is computed where the data are, with the study's own data, and nothing but the numbers is written. Each audit
runs on a leaky control first. These are two attacks of many: what they do not find, others may.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from polyclinic.audits import inversion, membership
from polyclinic.core import state as states
from polyclinic.core.site import Site
from polyclinic.data.federation import federate
from polyclinic.data.splits import Fold
from polyclinic.studies.export import plan_of
from polyclinic.studies.folder import read_tensors
from polyclinic.studies.lines import arm_name
from polyclinic.studies.records import Run, read_run
from polyclinic.studies.spec import parse
from polyclinic.tasks.model import load
from polyclinic.tasks.task import Task


class NotAudited(ValueError):
    """A run that cannot be audited. The message says why."""


@dataclass(frozen=True)
class Audit:
    """What was found of one model.

    Attributes:
        method: Which, and ``seed``. ``arm``: the folder of its model, under the run's arms. ``site``: whose image was
            attacked.
        membership: By the loss. ``inversion``: of the gradient of one of the site's training images.
        limit: How many examples of each role and site were tried at most.
    """

    method: str
    seed: int
    arm: str
    membership: membership.Verdict
    inversion: inversion.Verdict
    site: str
    limit: int

    def file(self, run: Path) -> Path:
        """Where it is written, in the run's folder."""
        return run / "arms" / self.arm / "audit.json"

    def to_json(self) -> dict[str, Any]:
        """As written beside the run. No image is in it."""

        def leak(one: inversion.Leak) -> dict[str, float]:
            return {"psnr_db": one.psnr_db, "guess_db": one.guess_db, "rdlv": one.rdlv}

        return {
            "method": self.method,
            "seed": self.seed,
            "membership": {
                "says": self.membership.says, "attack": "loss", "at_most_examples": self.limit,
                "control": asdict(self.membership.control),
                "sites": {name: asdict(one) for name, one in self.membership.sites.items()},
            },
            "inversion": {
                "says": self.inversion.says, "attack": "DLG with L-BFGS, label known, one image", "site": self.site,
                "control": leak(self.inversion.control), "found": leak(self.inversion.found),
            },
        }  # fmt: skip


def audit_run(
    run_dir: Path, label: str = "", seed: int | None = None, *, limit: int = 200, steps: int = 30, restarts: int = 2
) -> Audit:
    """Audits the model of one arm of a run, and writes audit.json beside it.

    Args:
        label: The method; by default the last that shares a model.
        seed: By default the first.
        limit: How many examples of each role and site to try, drawn by the seed.
        steps: Of the inversion's search, from each of ``restarts`` starts.

    Raises:
        NotARun: Where the folder is not a run.
        NotAudited: Where the arm has no model, or the data are not those it was trained on.
    """
    run = read_run(run_dir)
    seed = run.info.seeds[0] if seed is None else seed
    label = label or _last_shared(run)
    file = run.path / "arms" / arm_name(label, seed, 0 if run.info.folds else None) / "model.safetensors"
    if not file.is_file():
        methods = ", ".join(m.label for m in run.info.methods)
        seeds = ", ".join(str(s) for s in run.info.seeds)
        unfinished = label in [m.label for m in run.info.methods] and seed in run.info.seeds
        why = f"{label} is not finished with seed {seed}: go on with polyclinic run --resume" if unfinished else (
            f"there is no method {label!r} with seed {seed}. Methods: {methods}. Seeds: {seeds}")  # fmt: skip
        raise NotAudited(f"{run.path}: {why}")
    study = parse((run.path / "study.toml").read_text(encoding="utf-8"), run.path / "study.toml")
    fold = Fold(0, run.info.folds, run.info.folds_by or "patients") if run.info.folds else None
    data = federate(study.data, seed, fold)
    if seed == run.info.seeds[0] and data.fingerprint != run.info.data.fingerprint:
        raise NotAudited(f"{run.path}: the data have changed since the run, so who was trained on is not known")
    plan, params = plan_of(file), read_tensors(file)
    task: Task = plan.build_method().predicts or plan.build_task()
    dice = Site("audit", seed=seed)

    def some(site: str, role: str) -> membership.Part:
        whole = data.sites[site][role]
        return membership.Part(whole, torch.randperm(len(whole), generator=dice.rng(site, role))[:limit])

    sites = [site for site in data.training if {"train", "test"} <= data.sites[site].keys()]
    if not sites:
        raise NotAudited(f"{run.path}: no site has training and test data, so there is nobody to compare members with")
    tried = {site: membership.by_loss(task, params, some(site, "train"), some(site, "test")) for site in sites}
    largest = max(sites, key=lambda site: len(data.sites[site]["test"]))
    control = membership.memorised(task, params, data.sites[largest]["test"], seed)
    who, model = sites[0], load(task.model(), params).eval()
    x, y = data.sites[who]["train"][torch.tensor([0])]
    prior = some(who, "test")[torch.arange(min(limit, len(data.sites[who]["test"])))][0].mean(0)
    how = inversion.Inversion(steps=steps, restarts=restarts)
    drawn = inversion.audit(model, task.loss, x, y, prior, how, seed=seed)
    result = Audit(label, seed, file.parent.name, membership.Verdict(control, tried), drawn, who, limit)
    states.write_bytes(result.file(run.path), (json.dumps(result.to_json(), indent=1) + "\n").encode())
    return result


def _last_shared(run: Run) -> str:
    shared = [method.label for method in run.info.methods if method.leaves != "nothing"]
    if not shared:
        raise NotAudited(f"{run.path}: no method of this run shares a model; name one to audit it all the same")
    return shared[-1]
