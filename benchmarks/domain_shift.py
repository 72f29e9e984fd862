"""Which methods help if hospitals differ? ``python benchmarks/domain_shift.py`` writes docs/results/domain-shift.md.

Real sites only: sex from brain regions at 6 and at 10 scanners, heart disease at 4 hospitals, retinal vessels from 3
cameras (at 64 x 64 pixels); then scanners and cameras without training data. Every method trains the same network in
the same number of rounds with the same training settings, at its default options unless ``OPTIONS`` says otherwise;
nothing is tuned, and the model after the last round is tested. A split's score is the mean over sites; differences to
FedAvg are paired by split, with Nadeau and Bengio's interval. For unseen cameras the unit is the camera. Finished runs are
kept, the same command resumes, and the page keeps the tables of studies without records.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from domain_shift_page import page
from hospitals import BRAIN, HEART, read, sites_of
from torch import Tensor
from torch.nn import functional as F

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.data.examples import concat
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.registry import Setting, build, entry

SPLIT = {"split": (0.7, 0.0, 0.3)}
BRAIN_6 = (
    BRAIN
    | SPLIT
    | {
        "path": "$POLYCLINIC_DATA/brain_roi_tables_by_site/openneuro_roi_6sites.csv.gz",
        "leave_out": ("age", "sitenum"),
    }
)
SMALL = (
    "annarbor-a",
    "baltimore",
    "berlin-margulies",
    "leiden-2200",
    "munchen",
    "newyork-a-adhd",
    "newark",
    "oxford",
    "paloalto",
    "queensland",
)
BRAIN_20 = BRAIN | SPLIT | {"external": SMALL, "min_patients": 15}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "zscore of each site": ("zscore", {"by_site": True}),
    "histogram match": ("histogram-match", {}),
    "fedrep": ("fedrep", {"head_epochs": 2}),
    "harmofl, low frequencies": ("harmofl", {"window": 0.1}),
    "feddg": ("feddg", {"window": 0.05}),
}
FAMILIES = {
    "Baselines": ("single", "mix", "fedavg", "fedprox"),
    "Normalization": ("fedbn", "silobn"),
    "Harmonization": ("zscore of each site", "histogram match", "combat", "harmofl", "harmofl, low frequencies"),
    "Adaptation": ("fed-align", "fedharmony", "moon"),
    "Personalization": ("fedper", "fedrep", "ditto", "apfl", "ifca", "fed-moe"),
    "For sites never seen": ("fedavg-recomputed", "feddg", "fedsm", "iop-fl"),
}
UNSUITED = (
    "histogram match",
    "fedavg-recomputed",
    "feddg",
    "fedsm",
    "iop-fl",
    "harmofl",
    "harmofl, low frequencies",
)  # to tables
TABLES = tuple(m for members in FAMILIES.values() for m in members if m not in UNSUITED)
IMAGES = (
    "single",
    "mix",
    "fedavg",
    "fedprox",
    "fedbn",
    "silobn",
    "zscore of each site",
    "histogram match",
    "harmofl",
    "harmofl, low frequencies",
    "ditto",
    "feddg",
    "fedsm",
    "iop-fl",
)
OUTSIDE = ("fedavg", "fedavg-recomputed", "harmofl", "harmofl, low frequencies", "feddg", "fedsm", "iop-fl")
Sites = dict[str, Site]


@dataclass(frozen=True)
class Rows:
    """Examples in memory."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def table(spec: Mapping[str, Any]) -> Callable[[int], Sites]:
    """Sites of a table under the split of a seed; external ones have no training data."""
    return lambda seed: sites_of(read(spec, seed), seed)


def retina(unseen: str = "") -> Callable[[int], Sites]:
    """Vessels in fundus images of three cameras at 64 x 64; one of them may be kept unseen. Both eyes stay together."""

    def sites(seed: int) -> Sites:
        held = np.load(Path(os.environ["POLYCLINIC_DATA"]) / "retina_vessels_3sites" / "vessels_256.npz")
        images = F.avg_pool2d(torch.from_numpy(held["images"]).permute(0, 3, 1, 2).float() / 255, 4)
        masks = (F.avg_pool2d(torch.from_numpy(held["masks"]).float()[:, None], 4)[:, 0] > 0.3).long()
        found = {}
        for name in sorted({str(site) for site in held["site"]}):
            here = torch.from_numpy(held["site"] == name)
            persons = np.array([n.removesuffix("L").removesuffix("R") for n in held["name"][here.numpy()]])
            order = np.random.default_rng(seed).permutation(sorted(set(persons)))
            training = np.isin(persons, order[: round(0.7 * len(order))]) & (name != unseen)
            parts = {"train": training, "test": ~training}
            roles = {
                r: Rows(images[here][torch.from_numpy(i)], masks[here][torch.from_numpy(i)]) for r, i in parts.items()
            }
            found[name] = Site(name, {r: rows for r, rows in roles.items() if len(rows)}, seed=seed)
        return found

    return sites


@dataclass(frozen=True)
class Study:
    """One question: whose data, what is learned, how, and what is compared."""

    sites: Callable[[int], Sites]
    task: Callable[[tuple[int, ...]], Task]
    local: LocalTraining
    rounds: int
    methods: tuple[str, ...]
    metric: str = "auc"


def regions(inputs: tuple[int, ...]) -> Task:
    """A small network with batch normalization, for tables."""
    return Classification(Network("mlp", inputs, 2, (("width", 32), ("norm", "batch"), ("dropout", 0.2))))


def vessels(inputs: tuple[int, ...]) -> Task:
    """A small U-Net with batch normalization."""
    return Segmentation(Network("unet", inputs, 2, (("width", 8), ("norm", "batch"))))


ROWS = LocalTraining(epochs=1, batch_size=16, optimizer="adam", lr=1e-3, weight_decay=1e-3)
PIXELS = LocalTraining(epochs=1, batch_size=4, optimizer="adam", lr=3e-3)
STUDIES = {
    "Sex from brain regions, 6 scanners": Study(table(BRAIN_6), regions, ROWS, 30, TABLES),
    "Sex from brain regions, 10 scanners": Study(table(BRAIN_20), regions, ROWS, 30, TABLES),
    "Heart disease, 4 hospitals": Study(table(HEART | SPLIT), regions, ROWS, 30, TABLES),
    "Retinal vessels, 3 cameras": Study(retina(), vessels, PIXELS, 25, IMAGES, "dice"),
    **{
        f"Retinal vessels, {name} never seen": Study(retina(name), vessels, PIXELS, 25, OUTSIDE, "dice")
        for name in ("CHASEDB1", "DRIVE", "STARE")
    },
}


def scored(study: Study, label: str, seed: int) -> Iterator[dict[str, Any]]:
    """Trains once and yields each site's score, and whether it trained."""
    sites = study.sites(seed)
    inside = {name: site for name, site in sites.items() if len(site.data.get("train", ()))}
    x, _ = next(iter(inside.values())).data["train"][torch.arange(1)]
    task = study.task(tuple(x.shape[1:]))
    training: Sites = dict(inside)
    if label == "mix":
        parts = [site.data["train"] for site in inside.values()]
        whole = (
            Rows(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]))
            if isinstance(parts[0], Rows)
            else concat(parts)
        )
        training = {"all": Site("all", {"train": whole}, seed=seed)}
    name, options = OPTIONS.get(label, (label, {}))
    method = Evaluated(build(name, Setting(task, study.local, tuple(training), study.rounds), options), task)
    engine, state = InProcess(method, training, seed=seed), method.init(task.first(seed))
    for step in train(method, engine, state, rounds=study.rounds):
        assert not step.lost, step.lost
        state = step.state
    everyone = InProcess(method, {**training, **sites}, engine.memory, seed=seed)
    for site, found in evaluate(
        method, everyone, state, sorted(sites if entry(name).newcomers else inside), "score/test"
    ).items():
        yield {
            "site": site,
            "seen": site in inside,
            "n": int(found["n"]),
            "score": float(found.get(study.metric, torch.nan)),
        }


def main() -> None:
    """Runs the studies and writes the page, keeping what is done so that it can be stopped and taken up again."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--only", default="", help="a part of the studies' titles")
    parser.add_argument("--methods", default="", help="those to run, separated by commas; all of a study by default")
    parser.add_argument("--quick", action="store_true", help="one split of the first study, printed only")
    parser.add_argument("--keep", type=Path, default=Path("domain_shift.json"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs/results/domain-shift.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[list[dict[str, Any]]]]] = (
        json.loads(given.keep.read_text()) if given.keep.exists() else {}
    )
    for seed in range(1 if given.quick else given.splits):
        for title, study in list(STUDIES.items())[: 1 if given.quick else None]:
            for label in study.methods if given.only in title else ():
                if given.methods and label not in given.methods.split(","):
                    continue
                done = found.setdefault(title, {}).setdefault(label, [])
                if len(done) <= seed:
                    begun = time.perf_counter()
                    done.append(list(scored(study, label, seed)))
                    mean = np.nanmean([r["score"] for r in done[-1] if r["seen"] != ("never" in title)])
                    print(f"{seed} {title}: {label} {mean:.3f} {time.perf_counter() - begun:.0f} s", flush=True)
                    if not given.quick:
                        given.keep.write_text(json.dumps(found))
    if not given.quick:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        metrics = {title: study.metric for title, study in STUDIES.items()}
        kept = {title: found[title] for title in STUDIES if title in found}
        before = given.out.read_text(encoding="utf-8") if given.out.exists() else ""
        order = [m for members in FAMILIES.values() for m in members]
        given.out.write_text(page(kept, metrics, order, before), encoding="utf-8")


if __name__ == "__main__":
    main()
