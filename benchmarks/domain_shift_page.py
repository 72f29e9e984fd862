"""The study of domain shift as Markdown, from its records."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t

Splits = list[list[dict[str, Any]]]

HEAD = """# Domain shift: what helps where hospitals differ

Written by `python benchmarks/domain_shift.py`; every number was measured, the script says how: the heart table and the
unseen cameras with PyTorch 2.13 on a CPU, the brain tables and the three cameras together with 2.11, those on a GPU. (The
heart table of 2.11 differed by 0.03 points on average.) The sites are real hospitals, scanners and cameras. Differences
to FedAvg are paired by split, with Student's interval over splits. One that holds 0 is no difference that these data
show; those that do not are bold, and with so many comparisons some bold ones are chance. Networks and images are small,
and nothing was tuned: this compares methods under equal conditions, not what each can reach.

What we read from it:

- **Federating itself is worth more than any choice of method.** Training alone costs 2 to 6 points of AUC beside FedAvg,
  with intervals below 0 on all three tables. All data in one place is no better than FedAvg here.
- **Normalization** layers kept at home (FedBN, SiloBN) change nothing that these tables show.
- **Harmonization** takes the scanner out of the features (a test in `tests/papers/` shows that a classifier no longer
  finds it) and yet hardly helps to predict: ComBat gains at most a point of AUC at brain scanners, within the sites and
  at ten never seen. At the four heart hospitals, which differ by their patients, ComBat and per-site scaling **lose** two
  points: they take away what is different because the patients are.
- **Adaptation** (Fed-Align, FedHarmony) and MOON: no difference shown.
- **Personal** methods do not pay where a site has a few dozen patients. Heads of one's own (FedPer, FedRep) cost little;
  models of one's own (APFL, Fed-MoE, IFCA) cost up to 5 points.
- **A camera never seen**: IOP-FL, which fits a mixture of the sites' models to the new hospital's unlabeled images, was
  better than FedAvg at every camera in every split, by 13 points of Dice on average and with an interval above 0. Part
  of that is where FedAvg fails: 6.5 % at CHASEDB1 in one split and 31 % at STARE in another (batch normalization may do
  that), where IOP-FL has 64 and 62 %. FedDG was better in ten of twelve and HarmoFL with a window of a tenth in nine,
  with intervals that hold 0; at its published window, one frequency, HarmoFL was better in three. FedSM's selector
  chooses among models none of which knows the new camera: better in three of twelve.
"""


def interval(x: np.ndarray) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval."""
    half = float(t.ppf(0.975, len(x) - 1)) * float(x.std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return float(x.mean()), float(x.mean()) - half, float(x.mean()) + half


def gap_of(x: np.ndarray) -> str:
    """A difference with its interval, bold where that does not hold 0; alone where there is one split only."""
    mean, low, high = interval(x)
    if math.isnan(low):
        return f"{mean:+.1f}"
    told = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"**{told}**" if low * high > 0 else told


def mean_of(split: Sequence[Mapping[str, Any]], seen: bool) -> float:
    """The mean score over the sites that trained, or over the others, in hundredths."""
    return float(np.nanmean([100 * r["score"] for r in split if r["seen"] == seen]))


def lines_of(rows: Mapping[str, Splits], order: Sequence[str], metric: str, seen: bool) -> list[str]:
    """A table: the mean over sites, beside FedAvg, and the worst site; over splits."""
    splits = min(len(found) for found in rows.values())
    base = np.array([mean_of(split, seen) for split in rows["fedavg"][:splits]])
    out = [f"| method | {metric}, mean over sites | beside FedAvg, points | worst site |", "|---|---|---|---|"]
    for label in (m for m in order if m in rows):
        found = rows[label][:splits]
        if not any(r["seen"] == seen for r in found[0]):
            continue
        x, by_site = np.array([mean_of(split, seen) for split in found]), defaultdict(list)
        for r in (r for split in found for r in split if r["seen"] == seen and not math.isnan(r["score"])):
            by_site[r["site"]].append(100 * r["score"])
        scores = {site: float(np.mean(values)) for site, values in by_site.items()}
        worst = min(scores, key=scores.__getitem__)
        mark = "" if label == "fedavg" else gap_of(x - base)
        out.append(f"| {label} | {x.mean():.1f} | {mark} | {scores[worst]:.1f} ({worst}) |")
    count = (
        f"{splits} splits." if splits > 1 else "One split: there is no interval, and small differences mean nothing."
    )
    return [count, "", *out, ""]


def left_out(found: Mapping[str, Mapping[str, Splits]], order: Sequence[str], metric: str) -> list[str]:
    """A table of sites left out in turn: each score, and the gap to FedAvg of the mean over them, split by split."""
    titles = sorted(found)
    names = [title.removesuffix(" never seen").rpartition(", ")[2] for title in titles]
    labels = [m for m in order if all(found[title].get(m) for title in titles)]
    splits = min(len(found[title][m]) for title in titles for m in labels)
    head = f"| method | {' | '.join(names)} | {metric}, mean | beside FedAvg, points | better in |"
    out = [head, "|---" * (len(names) + 4) + "|"]
    scores = {m: np.array([[mean_of(s, False) for s in found[t][m][:splits]] for t in titles]) for m in labels}
    for m in labels:
        gaps = scores[m] - scores["fedavg"]
        mark = "" if m == "fedavg" else gap_of(gaps.mean(0))
        wins = "" if m == "fedavg" else f"{int((gaps > 0).sum())} of {gaps.size}"
        cells = " | ".join(f"{x:.1f}" for x in scores[m].mean(1))
        out.append(f"| {m} | {cells} | {scores[m].mean():.1f} | {mark} | {wins} |")
    return [f"Each was left out in turn, in {splits} splits of the others' patients.", "", *out, ""]


def page(found: Mapping[str, Mapping[str, Splits]], metrics: Mapping[str, str], order: Sequence[str]) -> str:
    """The study as Markdown; ``metrics`` are those of each part by title, ``order`` that of the methods."""
    lines = [HEAD]
    words = {"auc": "AUC, %", "dice": "Dice, %"}
    unseen = {title: rows for title, rows in found.items() if "never seen" in title}
    for title, rows in found.items():
        if title in unseen or not rows.get("fedavg"):
            continue
        rows = {label: splits for label, splits in rows.items() if splits}
        metric, some = words[metrics[title]], rows["fedavg"][0]
        lines += [f"## {title}", "", *lines_of(rows, order, metric, True)]
        if any(not r["seen"] for r in some):
            others = {label: splits for label, splits in rows.items() if label != "single"}
            lines += [
                f"### The same models at {sum(not r['seen'] for r in some)} scanners never seen",
                "",
                *lines_of(others, order, metric, False),
            ]
    if unseen:
        lines += ["## Retinal vessels at a camera never seen", ""]
        lines += left_out(unseen, order, words["dice"])
    return "\n".join(lines)
