"""The study of domain shift as Markdown, from its records."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t

Splits = list[list[dict[str, Any]]]

HEAD = """# Domain shift: which methods help if hospitals differ

Written by `python benchmarks/domain_shift.py`; every number was measured as the script describes: the heart table and the
unseen cameras with PyTorch 2.13 on a CPU, the brain tables and the three cameras together with 2.11, those on a GPU. (The
heart table of 2.11 differed by 0.03 points on average.) The sites are real hospitals, scanners and cameras. Differences
from FedAvg are paired by split, with Student's interval over splits. If an interval includes 0, these data show no difference;
the others are bold, and with this number of comparisons some of them are chance. Networks and images are small,
and nothing was tuned: the tables compare methods under equal conditions and do not show the best result of each.

Conclusions:

- **Federation matters more than the choice of method.** Training alone costs 2 to 6 points of AUC compared with FedAvg,
  with intervals below 0 on all three tables. All data in one place is no better than FedAvg here.
- **Normalization** layers that stay at the sites (FedBN, SiloBN) change nothing that these tables show.
- **Harmonization** removes the scanner from the features (a test shows that a classifier no longer
  finds it) but hardly improves predictions: ComBat gains at most a point of AUC at brain scanners, within the sites and
  at ten unseen ones. At the four heart hospitals, which differ by their patients, ComBat and per-site scaling **lose** two
  points: they remove differences that are due to the patients.
- **Adaptation** (Fed-Align, FedHarmony) and MOON: no difference shown.
- **Personal** methods bring no gain if a site has a few dozen patients. Personal heads (FedPer, FedRep) cost little;
  personal models (APFL, Fed-MoE, IFCA) cost up to 5 points.
- **An unseen camera**: most of what helps is the normalization of the new hospital's own images. In one seed of 25 rounds
  (an audit, not part of the tables), FedAvg had a Dice of .543, .512 and .558 at STARE, CHASEDB1 and DRIVE; FedAvg with
  the statistics of batch normalization computed from the camera's images had .604, .644 and .588, and IOP-FL's mixture of
  models with the same statistics .604, .645 and .590 before and .608, .647 and .592 after its adaptation. An earlier
  version of this page gave the whole difference to IOP-FL; that conclusion is withdrawn. Its adaptation, which started anew for
  every batch, had moved the weights of the mixture, each a third, by less than 0.005. It now runs over all images, as in the
  published code, and has not been measured again: the row of IOP-FL below is that of the earlier adaptation, and the
  row of `fedavg-recomputed`, the baseline for such methods, is still to be measured. FedDG was better than FedAvg in
  ten of twelve cases and HarmoFL with a window of a tenth in nine, with intervals that include 0; with its published
  window, one frequency, HarmoFL was better in three. FedSM's selector chooses among models that were not trained on the
  new camera: it was better in three of twelve. A part of every gain over FedAvg is due to failures of FedAvg's
  statistics: 6.5 % at CHASEDB1 in one split and 31 % at STARE in another.
- **Unseen scanners**: FedBN, SiloBN, FedPer and FedRep were listed at the ten unseen scanners with layers that had never been
  trained. These rows are withdrawn; methods with private layers have no model for an unseen site.
"""


def interval(x: np.ndarray) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval."""
    half = float(t.ppf(0.975, len(x) - 1)) * float(x.std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return float(x.mean()), float(x.mean()) - half, float(x.mean()) + half


def gap_of(x: np.ndarray) -> str:
    """A difference with its interval, bold if that excludes 0; without an interval if there is one split only."""
    mean, low, high = interval(x)
    if math.isnan(low):
        return f"{mean:+.1f}"
    told = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"**{told}**" if low * high > 0 else told


def mean_of(split: Sequence[Mapping[str, Any]], seen: bool) -> float:
    """The mean score over the sites that trained, or over the others, in hundredths."""
    return float(np.nanmean([100 * r["score"] for r in split if r["seen"] == seen]))


def lines_of(rows: Mapping[str, Splits], order: Sequence[str], metric: str, seen: bool) -> list[str]:
    """A table over splits: the mean over sites, the difference from FedAvg, and the worst site."""
    splits = min(len(found) for found in rows.values())
    base = np.array([mean_of(split, seen) for split in rows["fedavg"][:splits]])
    out = [f"| method | {metric}, mean over sites | compared with FedAvg, points | worst site |", "|---|---|---|---|"]
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
    """A table of sites left out in turn: each score, and the difference of their mean from FedAvg, paired by split."""
    titles = sorted(found)
    names = [title.removesuffix(" never seen").rpartition(", ")[2] for title in titles]
    labels = [m for m in order if all(found[title].get(m) for title in titles)]
    splits = min(len(found[title][m]) for title in titles for m in labels)
    head = f"| method | {' | '.join(names)} | {metric}, mean | compared with FedAvg, points | better in |"
    out = [head, "|---" * (len(names) + 4) + "|"]
    scores = {m: np.array([[mean_of(s, False) for s in found[t][m][:splits]] for t in titles]) for m in labels}
    for m in labels:
        gaps = scores[m] - scores["fedavg"]
        mark = "" if m == "fedavg" else gap_of(gaps.mean(0))
        wins = "" if m == "fedavg" else f"{int((gaps > 0).sum())} of {gaps.size}"
        cells = " | ".join(f"{x:.1f}" for x in scores[m].mean(1))
        out.append(f"| {m} | {cells} | {scores[m].mean():.1f} | {mark} | {wins} |")
    return [f"Each camera was left out in turn, in {splits} splits of the others' patients.", "", *out, ""]


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
                f"### The same models at {sum(not r['seen'] for r in some)} unseen scanners",
                "",
                *lines_of(others, order, metric, False),
            ]
    if unseen:
        lines += ["## Retinal vessels at an unseen camera", ""]
        lines += left_out(unseen, order, words["dice"])
    return "\n".join(lines)
