"""Is FedMIC worse than FedAvg? ``python benchmarks/fedmic_federations.py`` writes a section of docs/results/fedmic.md.

The X-rays of PneumoniaMNIST are dealt without replacement to federations of eight simulated hospitals, so that the
federations are independent repetitions. The first two choose the learning rate of each method on validation images; the
others test, on images that no federation has. The question and its margin are in
``benchmarks/studies/fedmic-federations.toml``. Finished runs are kept, so that a stopped benchmark can be resumed.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from resplits import level_of, over_disjoint, text_of

from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.scheduler import run

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results" / "fedmic.md"
BEGIN, END = "<!-- federations -->", "<!-- end of federations -->"
PREVALENCE = (0.45, 0.55, 0.65, 0.7, 0.8, 0.85, 0.9, 0.95)  # of pneumonia, by hospital
EACH, VALIDATION, PILOTS, FEDERATIONS = 60, 256, 2, 10
RATES = (0.0005, 0.002, 0.008)
MARGIN = 2.0  # points of AUC
ASKED = ("fedmic", "fedmic-small", "fedavg-small")


def deal(folder: Path) -> None:
    """Write one archive for each federation; all have the same validation and test images, which none trains on."""
    archive = np.load(Path(os.environ["POLYCLINIC_DATA"]) / "pneumoniamnist" / "pneumoniamnist.npz")
    parts = ("train", "val", "test")
    images = np.concatenate([archive[f"{part}_images"] for part in parts])
    labels = np.concatenate([archive[f"{part}_labels"] for part in parts])[:, 0]
    rng = np.random.default_rng(0)
    left = [list(rng.permutation(np.flatnonzero(labels == label))) for label in (0, 1)]
    federations = []
    for _ in range(FEDERATIONS):
        federation = []
        for share in PREVALENCE:
            positive = round(EACH * share)
            federation.append(
                [left[label].pop() for label, n in ((0, EACH - positive), (1, positive)) for _ in range(n)]
            )
        federations.append(federation)
    held = rng.permutation(np.concatenate(left).astype(int))
    for k, federation in enumerate(federations):
        rows = np.concatenate([[*own, *held] for own in federation]).astype(int)
        split = np.array(
            (["train"] * EACH + ["val"] * VALIDATION + ["test"] * (len(held) - VALIDATION)) * len(federation)
        )
        site = np.repeat([f"hospital-{i + 1}" for i in range(len(federation))], EACH + len(held))
        target = folder / f"federation-{k}"
        target.mkdir(parents=True, exist_ok=True)
        names = np.array([f"{s}-{row}" for s, row in zip(site, rows, strict=True)])
        np.savez(
            target / "federation.npz", images=images[rows], labels=labels[rows], site=site, split=split, patient=names
        )


def measure(folder: Path, rate: float, methods: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Return by method the mean AUC over hospitals on validation and on test images, and the bytes a hospital sent."""
    found = {}
    for label in methods:
        study = (HERE / "studies" / "fedmic-federations.toml").read_text(encoding="utf-8")
        head, *arms = study.split("[[methods]]")
        (arm,) = (a for a in arms if f'label = "{label}"' in a or (f'name = "{label}"' in a and "label" not in a))
        text = f"{head.replace('lr = 0.002', f'lr = {rate}')}[[methods]]{arm}"
        text = text.replace('"federation.npz"', json.dumps(str((folder / "federation.npz").resolve())))
        out = folder / f"{label}-{rate:g}"
        for _ in run(parse(text), text, out, resume=out.exists()):
            pass
        done = read_run(out)
        scores = {
            kind: float(np.mean([line.metrics["auc"] for line in done.lines if line.kind == name]))
            for kind, name in (("val", "scores"), ("test", "test"))
        }
        sent = [n for r in done.rounds for n in r.bytes_up.values()]
        found[label] = {**scores, "kB": float(np.mean(sent)) / 1000 if sent else 0.0}
        print(folder.name, label, rate, found[label], flush=True)
    return found


def section(found: list[dict[str, dict[str, float]]], rates: dict[str, float]) -> str:
    """Return the section of the page."""
    auc = {label: np.array([100 * row[label]["test"] for row in found]) for label in found[0]}
    gaps = {label: values - auc["fedavg"] for label, values in auc.items() if label in ASKED}
    answers = over_disjoint(gaps, "non-inferiority", MARGIN)
    both = over_disjoint({label: values - auc["fedavg"] for label, values in auc.items() if label != "fedavg"})
    sent = {label: float(np.mean([row[label]["kB"] for row in found])) for label in auc}
    lines = [
        HEAD.format(
            federations=len(found), pilots=PILOTS, margin=MARGIN, test=5856 - FEDERATIONS * 8 * EACH - VALIDATION
        ),
        "| method | learning rate | mean AUC over hospitals, % | compared with FedAvg, points | non-inferior by "
        f"{MARGIN:g} points | kB up, per hospital and round |",
        "|---|---|---|---|---|---|",
    ]
    for label, values in auc.items():
        answer = answers.get(label)
        result = f"{answer.verdict()} (p = {answer.adjusted:.3f})" if answer and answer.adjusted is not None else ""
        gap = text_of(both[label]) if label in both else ""
        lines.append(
            f"| {label} | {rates[label]:g} | {level_of(values)} | {gap} | {result} | {sent[label]:.1f} ({sent[label] / sent['fedavg']:.0%}) |"
        )
    return "\n".join(lines) + "\n"


HEAD = """## Is FedMIC worse than FedAvg? Independent federations

Written by `python benchmarks/fedmic_federations.py`, whose study file `benchmarks/studies/fedmic-federations.toml` declared the question
and its margin before the first run.

**Question.** Is the mean AUC over hospitals with FedMIC, and with its smaller messages, at most {margin:g} points below that with FedAvg?

**Design.** The X-rays are dealt without replacement to federations of eight hospitals with 60 training images each, 45 to 95 % of them with
pneumonia. No image is in two federations, so that {federations} federations are independent repetitions, and Student's t over them needs no
correction (the collection names no patients: images of one may be in several). Two further federations chose each method's learning rate among
three by validation AUC. All models are tested on the same {test} images, on which none was trained; the uncertainty of these test images is
common to all methods and not part of the intervals. Non-inferiority is tested one-sided at 2.5 %, the difference two-sided at 5 %, each with
Holm's correction over its column.

**Result.** All three are non-inferior with the margin of {margin:g} points. `fedmic-small` is worse than FedAvg, by less than the margin; for
`fedmic` and `fedavg-small` no difference is shown. FedAvg with the compression of `fedmic-small` needs as few bytes, so that these
data show no advantage of the smaller student; the two were not compared by a test. Every hospital alone is worse than FedAvg.

**Limits.** One data set and one small network; simulated hospitals. The rates of FedAvg are the largest and that of local training is the
smallest of those tried, so that a better one may lie beyond.
"""


def main() -> None:
    """Run the federations and write the section."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("fedmic-federations"), help="the folder of finished runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    deal(given.work)
    study = parse((HERE / "studies" / "fedmic-federations.toml").read_text(encoding="utf-8"))
    labels = tuple(method.called for method in study.methods)
    folders = [given.work / f"federation-{k}" for k in range(FEDERATIONS)]
    pilots = {rate: [measure(folder, rate, labels) for folder in folders[:PILOTS]] for rate in RATES}
    rates = {label: max(RATES, key=lambda r, m=label: np.mean([p[m]["val"] for p in pilots[r]])) for label in labels}  # type: ignore[misc]
    found: list[dict[str, Any]] = []
    for folder in folders[PILOTS:]:
        found.append({})
        for label in labels:
            found[-1].update(measure(folder, rates[label], (label,)))
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{section(found, rates)}{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
