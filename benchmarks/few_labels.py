"""Do images without labels help? ``python benchmarks/few_labels.py`` writes docs/results/few-labels.md.

Public images are dealt without replacement to federations of five simulated hospitals, so that federations are
independent repetitions. Three images of every hospital keep their label. Two pilot federations decide, by rules fixed
beforehand, which data sets have headroom (all labels worth at least five points of AUC) and which of three settings
each method uses, both by the AUC on validation images; the other federations test. The question is which share of the gap
between three labels and all of them a method closes. Finished runs are kept, and the same command resumes.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hospitals import scores
from resplits import level_of, over_disjoint, text_of
from torch import Tensor

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.data.examples import Examples
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.registry import Setting, build
from polyclinic.statistics.ratios import ratio_of_means

HOSPITALS, LABELS, PILOTS = 5, 3, 2
HEADROOM = 5.0  # points of AUC that all labels must be worth in the pilots


@dataclass(frozen=True)
class Data:
    """Images that are dealt to federations.

    Attributes:
        file: Archive below the data folder.
        each: Training images of a hospital.
        validation: Images for the choices of the pilots.
        federations: Number of federations, pilots included.
    """

    file: str
    each: int
    validation: int
    federations: int


CANDIDATES = {
    "Chest X-rays": Data("pneumoniamnist/pneumoniamnist.npz", 60, 256, 12),
    "Breast ultrasound": Data("busi/busi_28_breastmnist_like.npz", 12, 80, 8),
    "Adrenal glands in three dimensions": Data("adrenalmnist3d/adrenalmnist3d.npz", 16, 200, 12),
}
LOCAL, ROUNDS = LocalTraining(steps=8, batch_size=16, optimizer="adam", lr=1e-3), 25
IRM = {"passes": 4}
TRIALS: dict[str, tuple[tuple[str, float, dict[str, Any]], ...]] = {  # method, learning rate, options; three for each
    "fedavg": (("fedavg", 1e-3, {}), ("fedavg", 3e-3, {}), ("fedavg", 3e-4, {})),
    "fedsemi": (("fedsemi", 1e-3, {}), ("fedsemi", 3e-3, {}), ("fedsemi", 1e-3, {"threshold": 0.7})),
    "fedperl": (("fedperl", 1e-3, {}), ("fedperl", 3e-3, {}), ("fedperl", 1e-3, {"threshold": 0.9})),
    "fedirm": (("fedirm", 1e-3, IRM), ("fedirm", 3e-3, IRM), ("fedirm", 1e-3, {**IRM, "consistency": 1.0})),
    "fedmoco": (("fedmoco", 1e-3, {}), ("fedmoco", 3e-3, {}), ("fedmoco", 1e-3, {"pretrain": 0.25})),
    "fedmae": (("fedmae", 1e-3, {}), ("fedmae", 3e-3, {}), ("fedmae", 1e-3, {"pretrain": 0.25})),
    "fedvss": (("fedvss", 1e-3, {}), ("fedvss", 3e-3, {}), ("fedvss", 1e-3, {"smooth": 0.0})),
}
ALL = "fedavg with every label"
ARMS = (*TRIALS, ALL)
Records = dict[str, dict[str, float]]


@cache
def archive(where: str) -> tuple[Tensor, Tensor]:
    """Images [n, 1, *shape] and labels [n]; volumes have half the resolution."""
    held = np.load(Path(os.environ["POLYCLINIC_DATA"]) / CANDIDATES[where].file)
    parts = [k.removesuffix("images") for k in held.files if k.endswith("images")]
    x = np.concatenate([held[f"{p}images"] for p in parts])
    y = np.concatenate([held[f"{p}labels"] for p in parts])[:, 0]
    _, first = np.unique(x.reshape(len(x), -1), axis=0, return_index=True)  # one of equal images
    x, y = x[np.sort(first)], y[np.sort(first)]
    images = torch.from_numpy(x)[:, None]
    if x.ndim == 4:
        images = torch.nn.functional.avg_pool3d(images.float() / images.max(), 2)
    return images, torch.from_numpy(y).long()


@cache
def dealt(where: str) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the training images [federations, hospitals, each], the validation images and the test images."""
    data, n = CANDIDATES[where], len(archive(where)[1])
    order = torch.from_numpy(np.random.default_rng(0).permutation(n))
    training, rest = order.tensor_split([data.federations * HOSPITALS * data.each])
    validation, test = rest.tensor_split([data.validation])
    return training.reshape(data.federations, HOSPITALS, data.each), validation, test


def examples(where: str, places: Tensor) -> Examples:
    """The images at ``places``, each its own patient: the archives name none."""
    x, y = archive(where)
    names = tuple(str(int(i)) for i in places)
    return Examples(x[places], y[places], names, names)


def hidden(sites: Mapping[str, Site]) -> dict[str, Site]:
    """The same sites with all but ``LABELS`` labels withheld; the data do not contain the withheld labels."""
    found = {}
    for name, site in sites.items():
        data = site.data["train"]
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(site.seed + 7))
        roles = {"train": data.subset(order[:LABELS]), "unlabeled": data.subset(order[LABELS:]).unlabeled()}
        found[name] = Site(name, {**site.data, **roles}, seed=site.seed)
    return found


def federation(where: str, k: int) -> dict[str, Site]:
    """The hospitals of federation ``k``, with all labels."""
    return {
        f"hospital-{i + 1}": Site(f"hospital-{i + 1}", {"train": examples(where, places)}, seed=k)
        for i, places in enumerate(dealt(where)[0][k])
    }


def measured(where: str, arm: str, trial: int, k: int) -> dict[str, float]:
    """Train on federation ``k``; return the AUC, in hundredths, on validation and on test images."""
    sites = federation(where, k)
    sites = sites if arm == ALL else hidden(sites)
    shape = archive(where)[0].shape[1:]
    network = (("depth", 3 if len(shape) == 3 else 2), ("dropout", 0.2), ("norm", "group"), ("width", 8))
    task = Classification(Network("cnn", tuple(shape), 2, network))
    name, rate, options = TRIALS["fedavg" if arm == ALL else arm][trial]
    method = build(name, Setting(task, replace(LOCAL, lr=rate), tuple(sites), ROUNDS), options)
    engine, state = InProcess(method, sites, seed=k), method.init(task.first(k))
    for step in train(method, engine, state, rounds=ROUNDS):
        assert not step.lost, step.lost
        state = step.state
    params = method.site_model(method.evaluation_request(state), {})
    _, validation, test = dealt(where)
    roles = {"validation": validation, "test": test}
    return {role: 100 * scores(task, params, examples(where, places))["auc"] for role, places in roles.items()}


class Study:
    """The runs of one data set, in the file of finished ones."""

    def __init__(self, where: str, found: Records, keep: Path) -> None:
        self.where, self.found, self.keep = where, found, keep

    def auc(self, arm: str, trial: int, k: int, role: str) -> float:
        """Return the AUC of a run, which is executed if it is not in the records."""
        key = f"{self.where}|{arm}|{trial}|{k}"
        if key not in self.found:
            begun = time.process_time()
            self.found[key] = measured(self.where, arm, trial, k)
            self.keep.write_text(json.dumps(self.found))
            print(f"{key} {self.found[key]} {time.process_time() - begun:.1f} s", flush=True)
        return self.found[key][role]

    def headroom(self) -> float:
        """Return what all labels are worth in the pilots, on validation images, with FedAvg's first setting."""
        return float(
            np.mean([self.auc(ALL, 0, k, "validation") - self.auc("fedavg", 0, k, "validation") for k in range(PILOTS)])
        )

    def chosen(self, arm: str) -> int:
        """Return the trial with the highest validation AUC in the pilots."""
        trials = range(len(TRIALS["fedavg" if arm == ALL else arm]))
        return max(trials, key=lambda t: np.mean([self.auc(arm, t, k, "validation") for k in range(PILOTS)]))

    def finished(self) -> int:
        """Return the number of leading federations, pilots included, all of whose runs are in the records."""
        pilots = [f"{self.where}|{arm}|{trial}|{k}" for arm in ARMS for trial in range(3) for k in range(PILOTS)]
        if not all(key in self.found for key in pilots):
            return 0
        trials, k = {arm: self.chosen(arm) for arm in ARMS}, PILOTS
        while all(f"{self.where}|{arm}|{trials[arm]}|{k}" in self.found for arm in ARMS):
            k += 1
        return k

    def tested(self, federations: int) -> dict[str, np.ndarray]:
        """Return by arm the test AUC of each federation that was no pilot, all arms of one after the other."""
        trials = {arm: self.chosen(arm) for arm in ARMS}
        ks = range(PILOTS, min(federations, CANDIDATES[self.where].federations))
        values = [[self.auc(arm, trials[arm], k, "test") for arm in ARMS] for k in ks]
        return dict(zip(ARMS, np.array(values).T, strict=True))


def setting_of(arm: str, trial: int) -> str:
    """Return a trial as text."""
    _, rate, options = TRIALS["fedavg" if arm == ALL else arm][trial]
    return ", ".join([f"lr {rate:g}", *(f"{k} {v:g}" for k, v in options.items())])


def section(study: Study, values: Mapping[str, np.ndarray]) -> list[str]:
    """Return the section of a data set."""
    gaps = {arm: v - values["fedavg"] for arm, v in values.items() if arm != "fedavg"}
    tests, many = over_disjoint(gaps), len(values["fedavg"])
    lines = [
        f"## {study.where}",
        "",
        f"{many} federations, {len(dealt(study.where)[2]):,} test images.",
        "",
        "| method | setting chosen in the pilots | AUC, % | compared with FedAvg on the same labels, points "
        "| share of the gap closed |",
        "|---|---|---|---|---|",
    ]
    for arm, v in values.items():
        beside = closed = ""
        if arm != "fedavg":
            beside = text_of(tests[arm])
        if arm not in ("fedavg", ALL):
            share = ratio_of_means(gaps[arm].tolist(), gaps[ALL].tolist())
            closed = (
                f"{share.value:.2f} ({share.why})"
                if share.low is None or share.high is None
                else f"{share.value:.2f} ({share.low:.2f} to {share.high:.2f})"
            )
        lines.append(f"| {arm} | {setting_of(arm, study.chosen(arm))} | {level_of(v)} | {beside} | {closed} |")
    return [*lines, ""]


def pilots_of(headroom: Mapping[str, float], studies: Sequence[Study]) -> list[str]:
    """Return the table of the pilots."""
    lines = [
        "## Headroom in the pilots",
        "",
        "| data | all labels instead of three a hospital, points | tested |",
        "|---|---|---|",
    ]
    for study in studies:
        gap, count = headroom[study.where], study.finished() - PILOTS
        then = f"{count} federations" if count > 1 else "not run" if gap >= HEADROOM else "no headroom"
        lines.append(f"| {study.where} | {gap:+.1f} | {then} |")
    return [*lines, ""]


HEAD = """# Few labels: do images without labels help?

Written by `python benchmarks/few_labels.py`; every number was measured as the script describes, on a CPU with PyTorch 2.13.

**Answer.** On chest X-rays of five simulated hospitals with three labels each, no difference from FedAvg on the labels is shown for any of
six methods, in either direction (Student's t over ten federations, Holm's correction, no margin declared). There was room for one: all
labels were worth 9.0 points of AUC (3.5 to 14.5), which is shown. The intervals of the differences are 5 to 12 points wide: that a method
gains more than 4 points over FedAvg is excluded (95 % for each method alone), and so is that it closes all of the gap, but not that it
closes a good part of it, or loses 6 to 9 points.

Recommendation: begin with FedAvg on the labels, with a tuned learning rate, and measure on validation patients whether images without labels
add anything. With differences that vary between federations by 3 to 8 points (SD), an interval of 1.5 points to either side needs 20 to 120
federations, more than this data set holds.

An earlier version of this page used a tenth of the labels, where all labels were worth 0.7 to 2 points, so that no benefit could have been
seen, and defaults for all methods.
"""
PLAN = """
**Question.** Three images of every hospital have a label, and the others have none. Which share of the gap between FedAvg on these labels
and FedAvg on all labels does a method close that uses the images without labels?

**Design.** Images of a public data set are dealt at random and without replacement to federations of five simulated hospitals, so that
federations are independent repetitions. All methods train the same small network in the same number of rounds with the same number
of steps, and are tested on the same images, which no federation has.

**Choices fixed before the runs.** Three data sets were candidates. One is used if all labels instead of three a hospital are worth at
least five points of validation AUC, averaged over two pilot federations, with FedAvg's default setting. Every method has three trials (two
learning rates at its defaults, and one other value of an option of its own; for FedAvg, with few and with all labels, a third
rate; FedIRM takes 4 passes instead of 10, for time), and the trial with the highest validation AUC in the pilots is used. Pilots are not tested. The validation labels are more than hospitals
with three labels have.

**Analysis plan.** The unit is the federation. Differences from FedAvg on the same labels are paired by federation: Student's t, two-sided, with
Holm's correction over the differences of a table; a difference is bold if the corrected p is below 0.05. No margin was declared, so that
a difference that is not shown is no evidence of equality. The share of the gap is the ratio of two mean differences, with Fieller's 95 % interval,
which is not corrected for the number of methods. The uncertainty of the test images, which all federations share, is not part of the
intervals. SD is over federations.

**Limits.** Simulated hospitals, one small network and images of 28 x 28 pixels; of the three data sets with headroom one was run, for want of
computing time: the same command resumes. Its ten federations were planned; a first version of this page had six of them, with the same
answer. The archives name no patients, so that images of one may be in several federations. FedAvg's chosen rate with few labels is
the smallest of those tried, so that a better one may lie below. The gains in the papers are for larger networks, larger images and longer
training; this page neither contradicts nor reproduces them.
"""


def main() -> None:
    """Run the study and write the page; finished parts are kept, so that a stopped study can be resumed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--federations", type=int, default=12, help="number of federations, pilots included")
    parser.add_argument("--only", default="", help="a part of the data sets' names; the page has what is finished")
    parser.add_argument("--pilots", action="store_true", help="measure the headroom of the candidates alone")
    parser.add_argument("--keep", type=Path, default=Path("few_labels.json"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs/results/few-labels.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: Records = json.loads(given.keep.read_text()) if given.keep.exists() else {}
    studies = [Study(where, found, given.keep) for where in CANDIDATES]
    headroom = {study.where: study.headroom() for study in studies}
    print(headroom, flush=True)
    if given.pilots:
        return
    lines = list[str]()
    for study in studies:
        if headroom[study.where] >= HEADROOM and given.only in study.where:
            study.tested(given.federations)
        if (finished := study.finished()) > PILOTS + 1:
            lines += section(study, study.tested(finished))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("\n".join([HEAD, PLAN, *pilots_of(headroom, studies), *lines]), encoding="utf-8")


if __name__ == "__main__":
    main()
