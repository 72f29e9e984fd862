"""The panel of methods as a page of results.

``polyclinic panel run benchmarks/studies/methods-panel.toml`` runs it, and
``python benchmarks/methods_panel.py runs/methods-panel --page docs/results/methods-panel.md`` writes the page, with the picture
of ranks in ``docs/pictures``.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from textwrap import fill

from polyclinic.core import atomic
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.evaluation.run_comparison import panel
from polyclinic.evaluation.run_evaluation import evaluate
from polyclinic.report.figures import ranks_plot
from polyclinic.statistics.intervals import Estimate
from polyclinic.statistics.multiple_tests import holm
from polyclinic.statistics.paired_tests import Difference
from polyclinic.studies.config.scenarios import read_all

STUDY = Path(__file__).parent / "studies" / "methods-panel.toml"
PICTURE = Path("docs/pictures/methods-panel.svg")
HEAD = """# A panel of methods: twelve methods, five data sets, five seeds

Written by `python benchmarks/methods_panel.py`, from the runs of one study file:

```console
$ polyclinic panel run benchmarks/studies/methods-panel.toml --resume
$ python benchmarks/methods_panel.py runs/methods-panel --page docs/results/methods-panel.md
```

**Question.** Does one of twelve federated methods have a higher AUC than FedAvg at small sites, if all may be tuned equally?

**Design.** Every method, and local and pooled training, is tuned for each data set and seed with four settings (learning rate, and the
method's own option if it has one) of 10 rounds, by AUC on validation patients; the best setting is trained for 20 rounds, and the model of
the best validated round is tested once. Sites hold at most 80 patients. A seed draws the initial model, the order of batches, the
settings, the split of the patients, and, for the three data sets of images, the four simulated sites to which they are dealt with
label skew. All of it is in the study file, which was written before the run; its network, metric and number of patients were chosen
after a rehearsal of two rounds with other settings, and pilot runs of FedAvg and pooled training with seed 0 on the images.
"""
LIMITS = (
    "No difference shown is no evidence of equality: an interval of several hundredths contains differences that matter. The "
    "panel ranks methods at small sites, with a small network and few settings each; it says nothing about large networks, many "
    "rounds, other metrics, or the problems for which some of these methods were made."
)
TABLE = """## AUC

Mean over training sites and seeds, with its 95 % interval where every site has patients of both classes in every test set.
"""
DIFFERENCES = """## Compared with FedAvg

AUC minus that of FedAvg in hundredths: the mean over five splits, with the 95 % interval of Nadeau and Bengio's corrected t-test. A
difference is bold if p < 0.05 after Holm's correction over the {} comparisons of its data set.
"""


def page(runs: Mapping[str, Path]) -> tuple[str, str]:
    """Return the page and the picture of ranks, of the finished runs of the panel by their names."""
    found = panel(list(runs.values()), names=list(runs))
    differences = {name: corrected(evaluate(read_run(path)).over_splits) for name, path in runs.items()}
    header = "| method | " + " | ".join(runs) + " |\n" + "|---|" + "---|" * len(runs) + "\n"
    values = "".join(
        f"| {method} | " + " | ".join(_value(found.estimates[name, method]) for name in runs) + " |\n"
        for method in found.methods
    )
    others = [method for method in found.methods if method != "fedavg"]
    compared = "".join(
        f"| {method} | " + " | ".join(_difference(differences[name][method]) for name in runs) + " |\n"
        for method in others
    )
    sections = [
        HEAD,
        _summary(differences),
        TABLE,
        header + values,
        DIFFERENCES.format(len(others)),
        header + compared,
    ]
    ranking = found.ranking
    assert ranking is not None
    means = ", ".join(f"{method} {rank:.2f}" for method, rank in zip(ranking.methods, ranking.ranks, strict=True))
    apart = [
        f"{first} from {second}"
        for first, a in zip(ranking.methods, ranking.ranks, strict=True)
        for second, b in zip(ranking.methods, ranking.ranks, strict=True)
        if b - a > ranking.critical
    ]
    sections += [
        "## Ranks\n",
        _paragraph(
            f"Mean ranks over {ranking.blocks} data sets, 1 is best: {means}. Friedman's p = {ranking.p:.2g}; two methods whose mean "
            f"ranks differ by less than {ranking.critical:.2f} (Nemenyi) are not distinguished. "
            f"Distinguished: {', '.join(apart) or 'none'}."
        ),
        f"![Mean ranks over data sets, with bars that join methods that are not distinguished](../pictures/{PICTURE.name})\n",
    ]
    return "\n".join(sections), ranks_plot("ranks", f"Mean ranks: {means}", ranking, {}, "data sets")


def corrected(found: Mapping[str, Difference]) -> dict[str, Difference]:
    """Return differences with p-values after Holm's correction over all of them."""
    adjusted = holm([1.0 if d.p is None else d.p for d in found.values()])
    return {name: replace(d, adjusted=p) for (name, d), p in zip(found.items(), adjusted, strict=True)}


def _summary(differences: Mapping[str, Mapping[str, Difference]]) -> str:
    """Return which comparisons with FedAvg show a difference, and that the others show none."""
    verdicts = {(name, method): d.verdict() for name, row in differences.items() for method, d in row.items()}
    shown = [
        f"{m} was {verdict} on {name}" for (name, m), verdict in verdicts.items() if verdict in ("better", "worse")
    ]
    text = f"{len(shown)} of {len(verdicts)} comparisons with FedAvg show a difference: {'; '.join(shown)}."
    if not shown:
        text = f"None of {len(verdicts)} comparisons with FedAvg shows a difference."
    return _paragraph(f"**Results.** {text} {LIMITS}")


def _paragraph(text: str) -> str:
    """Return a paragraph in lines of the width of the pages."""
    return fill(text, 140, break_long_words=False, break_on_hyphens=False) + "\n"


def _value(e: Estimate) -> str:
    limits = f" ({e.low:.2f} to {e.high:.2f})" if e.low is not None and e.high is not None else ""
    return "—" if e.value is None else f"{e.value:.3f}{limits}"


def _difference(d: Difference) -> str:
    if d.value is None:
        return "—"
    limits = f" ({100 * d.low:+.1f} to {100 * d.high:+.1f})" if d.low is not None and d.high is not None else ""
    text = f"{100 * d.value:+.1f}{limits}"
    return f"**{text}**" if d.verdict() in ("better", "worse") else text


def main() -> None:
    """Write the page and its picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the panel's runs, such as runs/methods-panel")
    parser.add_argument("--page", type=Path, help="file of the page; by default it is printed")
    given = parser.parse_args()
    scenarios = read_all(STUDY, {})
    text, picture = page({s.name: s.folder(given.folder.parent) for s in scenarios})
    if given.page is None:
        print(text)
        return
    atomic.write(given.page, text)
    atomic.write(PICTURE, picture)


if __name__ == "__main__":
    main()
