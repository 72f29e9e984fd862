"""Which hospitals gain from methods for fairness? ``python benchmarks/fairness.py`` writes docs/results/fairness.md.

The studies are ``studies/fairness-heart.toml`` and ``studies/fairness-brain.toml``, which contain questions, metric and tests.
"""

from collections.abc import Mapping
from dataclasses import replace

from study_pages import Results, arguments, changes_of, declared_table, finished, publish, row, shown

from polyclinic.evaluation.records.run_reader import training_sites
from polyclinic.report.formatting import number, with_interval
from polyclinic.statistics.multiple_tests import holm
from polyclinic.statistics.paired_tests import BETTER, WORSE, Difference

REFERENCE = "fedavg"
STUDIES = {
    "fairness-heart": ("Heart disease, four hospitals", "hospital"),
    "fairness-brain": ("Sex from brain regions, nine scanners", "scanner"),
}
HEAD = """# Fairness: which hospitals gain and which lose

Written by `python benchmarks/fairness.py`, which resumes. A network with 16 hidden units, 20 rounds of two local epochs.

**Question.** Does a method for fairness raise the AUC of any hospital above FedAvg's, lower it at none, and keep the mean over
hospitals within one point? The metric is the AUC within each site: accuracy at one half measures how well a model's probabilities fit a
site's prevalence, and calls every shared model unfair that ranks all patients well (on five splits at 23 scanners FedAvg had an
accuracy of 71.5 % and training alone 80.9 %, but AUCs of 0.821 and 0.814). Over five folds every patient is tested once for each of
three seeds. The difference at each site is tested two-sided at 5 % (variance over patients and between seeds, Holm over all pairs of a
method and a site), the mean over sites for non-inferiority with a margin of 0.010 (one-sided at 2.5 %, Holm). The study files in
`benchmarks/studies/` declared all of this before their first run.

"""
TAIL = """
## What is withdrawn

Statements of earlier versions that rested on accuracy at one half and on a bootstrap over re-splits, which excludes 0 in 18 % of studies
without any difference: "no global model is fair", "each site's own model is better for the mean and for the worst site", and
"Prop-FFL raises the worst site's accuracy; try it first".

## Limits

One network and one setting of each method, not tuned; two tables of few patients. A difference that is not shown is no evidence of
equality: the intervals say how large it can be. Zurich and Basel have eight patients without disease. Sites with fewer than 30
subjects, where an AUC says little, were left out of the second table beforehand.
"""


def by_site(found: Results) -> dict[str, dict[str, Difference]]:
    """Return each method's difference from FedAvg at each site, corrected over all of them."""
    labels = [m.label for m in found.result.methods if m.label != REFERENCE]
    sites = training_sites(found.run)
    tests = {(k, s): found.data.difference(k, REFERENCE, [s], found.metric) for k in labels for s in sites}
    asked = [key for key, d in tests.items() if d.p is not None]
    for key, p in zip(asked, holm([tests[key].p or 0.0 for key in asked]), strict=True):
        tests[key] = replace(tests[key], adjusted=p)
    return {k: {s: tests[k, s] for s in sites} for k in labels}


def answer(found: Results, tests: Mapping[str, Mapping[str, Difference]], unit: str) -> str:
    """Return the answer in sentences that follow from the verdicts."""
    kept = {c.method for c in found.result.declared if c.difference.verdict() == "non-inferior"}
    verdicts = {k: {s: d.verdict() for s, d in sites.items()} for k, sites in tests.items()}
    fairer = [k for k, v in verdicts.items() if k in kept and BETTER in v.values() and WORSE not in v.values()]
    parts = []
    for k, v in verdicts.items():
        for verdict in (BETTER, WORSE):
            if where := [s for s, one in v.items() if one == verdict]:
                parts.append(f"`{k}` is {verdict} than FedAvg at {', '.join(where)}")
    text = f"Fairer than FedAvg by this definition: {', '.join(f'`{k}`' for k in fairer) or 'none'}. "
    text += f"{'; '.join(parts)}. " if parts else f"No method was shown to differ from FedAvg at any {unit}. "
    held = ", ".join(f"`{c.method}`" for c in found.result.declared if c.method in kept)
    return text + (
        f"Not worse in the mean by more than one point: {held}." if held else "Non-inferiority was not shown."
    )


def section(found: Results, title: str, unit: str) -> str:
    """Return the part of the page on one study."""
    tests, sites = by_site(found), training_sites(found.run)
    lines = [f"## {title}", "", answer(found, tests, unit), ""]
    lines += [row("method", f"AUC, mean over {unit}s (95 % CI)", f"SD between {unit}s (τ)", f"lowest {unit}, shrunken")]
    lines += [row(*["---"] * 4)]
    for m in (*found.result.methods, *found.result.linear):
        low = "–" if m.lowest is None else f"{with_interval(m.lowest[1], 3)} {m.lowest[0]}"
        lines.append(row(m.label, with_interval(m.macro, 3), number(m.spread, 3), low))
    sizes = [f"{s} ({found.result.patients[s]})" for s in sites]
    lines += ["", f"Difference in AUC from FedAvg at each {unit} (in brackets the number tested), bold if shown:", ""]
    lines += [row("method", *sizes), row(*["---"] * (1 + len(sites)))]
    lines += [row(k, *(shown(one[s]) for s in sites)) for k, one in tests.items()]
    return "\n".join([*lines, "", *declared_table(found), ""])


def main() -> None:
    """Run what has no record yet, and write the page."""
    given = arguments(__doc__ or "")
    parts = [
        section(finished(name, given.runs, changes_of(given)), title, unit) for name, (title, unit) in STUDIES.items()
    ]
    publish(HEAD + "\n".join(parts) + TAIL, "fairness", given)


if __name__ == "__main__":
    main()
