"""The study of domain shift as Markdown, from its records."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from resplits import compared, text_of
from scipy.stats import t

SHARES = (0.3, 0.7)  # of patients, in the test and training data of a split
Splits = list[list[dict[str, Any]]]

HEAD = """# Domain shift: which methods help if hospitals differ

Written by `python benchmarks/domain_shift.py`; every number was measured as the script describes: the heart table and the
unseen cameras with PyTorch 2.13 on a CPU, the brain tables with 2.11 on a GPU. (The heart table of 2.11 differed by 0.03 points on
average.) The sites are real hospitals, scanners and cameras. Networks and images are small, and nothing was tuned.

Intervals of differences are Nadeau and Bengio's for repeated splits of the same patients, computed from the printed
intervals of the runs, which were Student's over splits and excluded 0 in 9 to 13 % of studies without any difference. A
difference is bold if Holm's correction over its table leaves p < 0.05; of all others these data show nothing, in neither
direction. Of 59 differences in the tables of hospitals and scanners none is bold; before that correction, and with Student's
intervals, twelve were.

Conclusions:

- **No method is shown to differ from FedAvg**, within sites or at unseen scanners. That is no evidence of equality: intervals are up
  to 21 points wide.
- **What federation is worth depends on the baseline.** An earlier version of this page stated that "federation matters more than the
  choice of method", because this network, trained alone without early stopping, had an AUC 2 to 6 points lower than FedAvg. That
  conclusion is withdrawn: the network trained alone overfits, and so does `mix`. A regularized logistic regression, with one setting for
  each table that was fixed before, is compared below.
- **Harmonization** removes the scanner from the features (a test shows that a classifier no longer finds it); a gain or a loss
  in AUC by ComBat or per-site scaling is not shown, neither at brain scanners nor at the heart hospitals.
- **An unseen camera**: three cameras are three cases, however often the other patients are split, and with three cases no interval
  excludes 0. FedDG and IOP-FL had a higher Dice than FedAvg at all three. Most of what helps is the normalization of the new
  hospital's own images. In one seed of 25 rounds (an audit, not part of the tables), FedAvg had a Dice of .543, .512 and .558 at
  STARE, CHASEDB1 and DRIVE; FedAvg with the statistics of batch normalization computed from the camera's images had .604, .644 and
  .588, and IOP-FL's mixture of models with the same statistics .604, .645 and .590 before and .608, .647 and .592 after its
  adaptation. The row of IOP-FL is that of an earlier adaptation, which started anew for every batch, and the row of
  `fedavg-recomputed`, the baseline for such methods, is still to be measured.
- **Unseen scanners**: methods with private layers have no model for an unseen site and are not listed. One of the ten sites, Newark,
  has an AUC below 0.5 with most methods.
- The table of three cameras together was one split and is withdrawn.

## Logistic regression compared with FedAvg

Written by `python benchmarks/linear_baselines.py`: AUC, mean over the sites that trained, on the splits of the tables below. SD is
over splits.

LINTABLE
"""


def mean_of(split: Sequence[Mapping[str, Any]], seen: bool) -> float:
    """The mean score over the sites that trained, or over the others, in hundredths."""
    return float(np.nanmean([100 * r["score"] for r in split if r["seen"] == seen]))


def lines_of(rows: Mapping[str, Splits], order: Sequence[str], metric: str, seen: bool) -> list[str]:
    """A table over splits: the mean over sites, the difference from FedAvg, and the worst site."""
    splits = min(len(found) for found in rows.values())
    base = np.array([mean_of(split, seen) for split in rows["fedavg"][:splits]])
    shown = {m: np.array([mean_of(split, seen) for split in found[:splits]]) - base for m, found in rows.items()}
    gaps = compared({m: d for m, d in shown.items() if m != "fedavg"}, *SHARES) if splits > 1 else {}
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
        mark = text_of(gaps[label]) if label in gaps else ""
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
    head = f"| method | {' | '.join(names)} | {metric}, mean | compared with FedAvg, points | better at |"
    out = [head, "|---" * (len(names) + 4) + "|"]
    scores = {m: np.array([[mean_of(s, False) for s in found[t][m][:splits]] for t in titles]) for m in labels}
    for m in labels:
        gaps = scores[m] - scores["fedavg"]
        by_camera = gaps.mean(1)
        half = float(t.ppf(0.975, len(titles) - 1)) * float(by_camera.std(ddof=1)) / math.sqrt(len(titles))
        mean = float(by_camera.mean())
        mark = "" if m == "fedavg" else f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"
        wins = "" if m == "fedavg" else f"{int((by_camera > 0).sum())} of {len(titles)}"
        cells = " | ".join(f"{x:.1f}" for x in scores[m].mean(1))
        out.append(f"| {m} | {cells} | {scores[m].mean():.1f} | {mark} | {wins} |")
    says = f"Each camera was left out in turn, in {splits} splits of the others' patients. Intervals are Student's over the"
    return [f"{says} three cameras.", "", *out, ""]


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
