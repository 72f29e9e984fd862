"""The two boxes at the top: the summary, and warnings and limitations."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup

from polyclinic.evaluation.records.record_schema import Scores
from polyclinic.evaluation.records.run_reader import external_sites, training_sites
from polyclinic.report.context import ReportContext
from polyclinic.report.formatting import count, interval, listed, many, number, outcome, with_interval
from polyclinic.report.sections.clinical import empty_predictions
from polyclinic.statistics.paired_tests import BETTER, FEWEST, UNDECIDED, WORSE

FEW_PARAMETERS, LARGE_IMAGE = 1000, 16 * 16
"""Parameters below which a network is reported as small for images, and the pixels of images for which it is."""


@dataclass(frozen=True)
class Finding:
    """A warning or limitation.

    Attributes:
        weight: The severity, by which findings are ordered: 7, test data are not independent of training; 6, values
            are missing; 5 and 4, the model is of no use, or the result is not what it seems; 3, the result can be
            invalid; 1, information.
        text: The statement.
    """

    weight: int
    text: str


def in_short(page: ReportContext) -> list[Markup]:
    """Return the result in a few sentences: external site, training sites, comparison with local training."""
    run, first = page.run, page.first
    if first is None:
        return [Markup("No method has test predictions yet, so there is no result to report.")]
    training, external = training_sites(run), external_sites(run)
    patients = sum(s.patients.get("train", 0) for s in run.info.sites if s.role == "training")
    sentences = [
        Markup("<strong>{}</strong> was trained at {} on {}.").format(
            page.title(first.label), many(len(training), "site"), many(patients, "patient")
        )
    ]
    d, metric = page.digits, page.result.metric
    mean = first.macro
    beyond = first.external.get(metric.name)
    if beyond is not None and beyond.value is not None:
        where = f"At {listed(external)}, which did not take part in training"
        away = Markup("{} ({}), {} was <strong>{} ({} CI {})</strong>").format(
            where,
            many(beyond.n, "patient"),
            page.label,
            number(beyond.value, d),
            page.level,
            interval(beyond.low, beyond.high, d),
        )
        if mean.value is not None:
            gap = abs(beyond.value - mean.value)
            way = "higher" if beyond.value > mean.value else "lower"
            away += Markup(", {} {} than the mean of the training sites").format(number(gap, d), way)
        sentences.append(away + ".")
    if mean.value is not None:
        sentences.append(
            Markup(
                "On held-out patients of the training sites the mean {} over sites was <strong>{} ({})</strong>."
            ).format(page.label, number(mean.value, d), interval(mean.low, mean.high, d))
        )
    sentences = [*_about_data(page), *sentences]
    sentences += [*_declared(page), *_against(page), *_among_methods(page)]
    return sentences


def _about_data(page: ReportContext) -> Iterator[Markup]:
    """Say what the data and the sites are, so that no result is read without it."""
    data = page.run.info.data
    if not data.title:
        return
    sites = "simulated" if data.simulated else data.sites_are
    text = f"Data: {data.title}" + (f"; sites are {sites}" if sites else "") + "."
    notes = [n for n in data.notes if n != data.simulated and len(n) <= 160][:1]
    yield Markup("{}").format(" ".join([text, *notes]))


def _declared(page: ReportContext) -> Iterator[Markup]:
    """Report the comparisons that the study declared before the run."""
    for c in page.result.declared:
        d, margin = c.difference, f" and the margin {number(c.difference.margin, page.digits)}"
        text = f"Declared before the run: {page.title(c.method)} compared with {page.title(c.reference)}"
        text += f" by {page.label}, question {d.question}{margin if d.margin is not None else ''}: "
        yield Markup("{}<strong>{}</strong>{}.").format(
            text,
            outcome(d),
            f", difference {with_interval(d, page.digits, signed=True)}" if d.value is not None else "",
        )


def _against(page: ReportContext) -> Iterator[Markup]:
    """Compare the main method with local training, by site."""
    first = page.first
    assert first is not None
    if not first.gains:
        return
    verdicts = {s: g.verdict() for s, g in first.gains.items()}
    up, down = ([s for s, v in verdicts.items() if v == w] for w in (BETTER, WORSE))
    open_ = [s for s, v in verdicts.items() if v == UNDECIDED]
    untested = [s for s in verdicts if s not in (*up, *down, *open_)]
    if not up and not down and not untested:
        every = "at the only site" if len(open_) == 1 else f"at any of the {len(open_)} sites"
        yield Markup("The difference from local training was not significant {}.").format(every)
        return
    parts = []
    if up:
        parts.append(f"significantly better at {many(len(up), 'site')} ({listed(up)})")
    if down:
        parts.append(f"significantly worse at {many(len(down), 'site')} ({listed(down)})")
    if open_:
        parts.append(f"no significant difference at {many(len(open_), 'site')} ({listed(open_)})")
    if untested:
        parts.append(f"not tested at {many(len(untested), 'site')} ({listed(untested)})")
    yield Markup("Compared with local training: {}.").format("; ".join(parts))


def _among_methods(page: ReportContext) -> Iterator[Markup]:
    """Report the paired comparison of the methods, without the pairs that the study declared."""
    result = page.result
    if not result.comparisons or not result.reference:
        return
    declared = {frozenset((c.method, c.reference)) for c in result.declared}
    verdicts = {
        page.title(k): d.verdict()
        for k, d in result.comparisons.items()
        if frozenset((k, result.reference)) not in declared
    }
    if not verdicts:
        return
    against = page.title(result.reference)
    parts = [
        f"{listed([k for k, v in verdicts.items() if v == verdict])} scored significantly {word} than {against}"
        for verdict, word in ((BETTER, "better"), (WORSE, "worse"))
        if verdict in verdicts.values()
    ]
    rest = [k for k, v in verdicts.items() if v == UNDECIDED]
    untested = [k for k, v in verdicts.items() if v not in (BETTER, WORSE, UNDECIDED)]
    if rest and parts:
        parts.append(f"the differences of {listed(rest)} were not significant")
    elif rest:
        parts.append(f"{listed(rest)} did not differ significantly from {against}")
    if untested:
        parts.append(f"{listed(untested)} could not be tested against {against}")
    yield Markup("{}.").format("; ".join(parts))


def findings(page: ReportContext) -> list[Finding]:
    """Return warnings and limitations, the most important first."""
    found = [*_about_run(page), *_about_sites(page), *_about_study(page)]
    return sorted(found, key=lambda f: -f.weight)


def _about_run(page: ReportContext) -> Iterator[Finding]:
    run = page.run
    yield from _about_split(page)
    if run.missing:
        yield Finding(
            3, f"This run is not finished: {'; '.join(run.missing)}. The results below cover the available records."
        )
    if page.journal[2]:
        yield Finding(3, f"The hash chain of the journal is broken: {page.journal[2]}")
    twice = [f"{page.title(m)} (seed {s}): {k} times" for (m, s), k in run.opened.items() if k > 1]
    if twice:
        text = (
            f"The sealed test set was opened more than once: {listed(twice)}. A later choice can depend on test results"
        )
        yield Finding(4, f"{text}.")
    for (label, seed), sites in run.arms.items():
        if silent := sum(p.silent for p in sites.values()):
            text = f"{page.title(label)} (seed {seed}) diverged: its outputs are not finite for {count(silent)} of "
            yield Finding(6, f"{text}{count(sum(map(len, sites.values())))} test examples, which are scored as chance.")
    for fault in page.result.faults:
        yield Finding(fault.weight, f"{page.title(fault.method)} {fault.text}.")
    tested = sum(page.result.patients[s] for s in training_sites(run) if s in page.result.patients)
    if 0 < tested < FEWEST:
        yield Finding(5, f"The training sites have {many(tested, 'test patient')} in all: nothing was tested.")
    yield from _rising(page)
    yield from _overtrained(page)
    for q in run.quarantined[:3]:
        yield Finding(2, f"A reply of {q.site} was refused in round {q.round} of {page.title(q.method)}: {q.reason}.")
    if len(run.quarantined) > 3:
        yield Finding(2, f"{len(run.quarantined) - 3} more replies were refused; see Communication.")
    lost: dict[str, int] = {}
    for r in run.rounds:
        for site in r.lost:
            lost[site] = lost.get(site, 0) + 1
    if lost:
        times = listed([f"{s} ({many(n, 'round')})" for s, n in lost.items()])
        yield Finding(1, f"Sites that did not reply in time: {times}.")


def _about_split(page: ReportContext) -> Iterator[Finding]:
    """Report test data that training has seen, and a validation result that the test result contradicts."""
    result, d = page.result, page.digits
    if leak := result.leak:
        parts = []
        if leak.patients:
            parts.append(f"{many(leak.patients, 'patient')} occur{'s' if leak.patients == 1 else ''} in both")
        if leak.inputs:
            parts.append(f"{count(leak.inputs)} of {many(leak.examples, 'test example')} occur in both, byte for byte")
        if leak.nearly_equal:
            which = f"{many(leak.nearly_equal, 'test example')} nearly equal{'s' if leak.nearly_equal == 1 else ''}"
            parts.append(f"{which} a training or validation example")
        text = f"Test data and training or validation data overlap at {listed(leak.sites)}: {'; '.join(parts)}. "
        text += "The results below are therefore too good by an unknown amount."
        shared = max(leak.inputs, leak.nearly_equal)
        yield Finding(7 if leak.patients or shared > 0.01 * leak.examples else 3, text)
    if (away := result.disagreement) and page.first is not None and away.validation.value and away.test.value:
        gap = away.validation.value - away.test.value
        text = (
            f"Validation and test results of {page.title(page.first.label)} disagree: {page.label} "
            f"{with_interval(away.validation, d)} on validation patients and {with_interval(away.test, d)} on test "
            f"patients, mean over sites; the interval of the difference, {number(gap, d, signed=True)} "
            f"({interval(away.low, away.high, d, signed=True)}), excludes 0. Check how the split was made, and how "
            "many choices were made on validation patients."
        )
        yield Finding(4, text)


def _validated(page: ReportContext, label: str) -> dict[tuple[int, int], dict[int, float]]:
    """Return a method's validation metric by round, mean over sites, for each seed and fold.

    It is negated if lower values are better.
    """
    name, sign = page.result.metric.name, 1.0 if page.higher else -1.0
    curves: dict[tuple[int, int], dict[int, list[float]]] = {}
    for s in page.run.curves:
        value = s.metrics.get(name)
        if s.method == label and s.role == "val" and value is not None:
            curves.setdefault((s.seed, s.fold), {}).setdefault(s.round, []).append(sign * value)
    return {key: {r: sum(v) / len(v) for r, v in curve.items()} for key, curve in curves.items()}


def _rising(page: ReportContext) -> Iterator[Finding]:
    """Report a main method whose validation curve still improves at the last round in every seed."""
    run, first = page.run, page.first
    if first is None or run.info.rounds < FEWEST:
        return
    curves = _validated(page, first.label).values()
    if curves and all(max(c) >= run.info.rounds and max(c, key=lambda r: c[r]) >= run.info.rounds for c in curves):
        text = f"The validation {page.label} of {page.title(first.label)} was best in the last round, {run.info.rounds}"
        yield Finding(3, f"{text}: training may have been too short.")


def _overtrained(page: ReportContext) -> Iterator[Finding]:
    """Report local or pooled training that had been better before the round that was tested.

    It is reported if the loss on validation patients, from the best round of the mean over seeds to the tested round,
    is at least half of the difference from the main method.
    """
    first, sign = page.first, 1.0 if page.higher else -1.0
    if first is None or first.macro.value is None:
        return
    for label in ("local", "pooled"):
        curves = _validated(page, label)
        lines = [s for s in page.run.lines if isinstance(s, Scores) and s.kind == "test" and s.method == label]
        tested = {(s.seed, s.fold): s.round for s in lines}
        value = next((m.macro.value for m in page.result.methods if m.label == label), None)
        if value is None or not curves or any(tested.get(key) not in curve for key, curve in curves.items()):
            continue
        common = set.intersection(*(set(curve) for curve in curves.values()))
        means = {r: sum(curve[r] for curve in curves.values()) / len(curves) for r in common}
        best = max(means, key=lambda r: means[r], default=0)
        lost = sum(means.get(best, 0.0) - curve[tested[key]] for key, curve in curves.items()) / len(curves)
        gain = sign * (first.macro.value - value)
        if best < min(tested.values()) and gain > 0 and lost >= gain / 2:
            text = (
                f"{page.title(label)} training was tested after it had lost {number(lost, page.digits)} {page.label} "
            )
            text += f"on validation patients since round {best}; {page.title(first.label)} exceeds it by "
            text += f'{number(gain, page.digits)}. Set select = "best" in [evaluation] before crediting the method.'
            yield Finding(4, text)


def _about_sites(page: ReportContext) -> Iterator[Finding]:
    first, result, d = page.first, page.result, page.digits
    if first is None:
        return
    metric = result.metric
    for site, g in first.gains.items():
        if g.verdict() == WORSE:  # a loss that is not shown is no finding; the section on benefit lists all sites
            change = f"{with_interval(g, d, signed=True)} {metric.label} compared with local training"
            yield Finding(3, f"Negative transfer at {site}: {change} (significant).")
    if first.worst is not None and first.macro.value is not None and len(first.sites) > 1:
        name, value = first.worst
        gap = abs(value - first.macro.value)
        way = "below" if page.higher else "above"
        tested, e = many(result.patients[name], "test patient"), first.sites[name][metric.name]
        text = f"{name} is {number(gap, d)} {way} the mean of the sites, on {tested}"
        if e.low is not None and e.high is not None and e.low <= first.macro.value <= e.high:
            yield Finding(1, f"{text}; its interval, {interval(e.low, e.high, d)}, includes that mean.")
        else:
            yield Finding(2, f"{text}.")
    for site, estimates in first.sites.items():
        e = estimates[metric.name]
        if result.patients[site] < result.options.min_cell:
            continue
        if e.value is None and site in first.macro.without:
            yield Finding(4, f"The mean over sites is without {site}, where {metric.label} is undefined: {e.why}.")
        elif e.value is None:
            yield Finding(2, f"{metric.label} is undefined at {site}: {e.why}.")
    for site, missing in result.uneven.items():
        text = f"The test patients of {site} lack {listed(missing)}: its {metric.label} is a mean over fewer classes"
        yield Finding(2, f"{text} and cannot be compared with other sites’.")
    small = [f"{s} ({n})" for s, n in result.patients.items() if n < result.options.few]
    if small:
        yield Finding(1, f"Few test patients, and therefore wide intervals, at {listed(small)}.")
    yield from _about_masks(page)


def _about_masks(page: ReportContext) -> Iterator[Finding]:
    first, found = page.first, []
    if first is None or page.run.info.task != "segmentation":
        return
    for site in first.sites:
        if n := empty_predictions(page, first, site):
            found.append(f"{site} {number(n, 0 if n == int(n) else 1)} of {count(page.result.images[site])}")
    if found:
        mean = " (mean over seeds)" if len(first.seeds) > 1 else ""
        text = (
            f"Empty predictions for non-empty targets{mean}: {listed(found)}. They count as Dice 0 and a distance of "
        )
        yield Finding(2, f"{text}the image’s diagonal.")


def _small_network(page: ReportContext) -> Iterator[Finding]:
    """Report a network with fewer parameters than a linear model of a table, or than any usual one for images."""
    info = page.run.info
    size, inputs = info.parameters, info.inputs
    consequence = "it may be too small, and differences between methods may then be differences of this network"
    if len(inputs) == 1 and 0 < size < (linear := info.outputs * (inputs[0] + 1)):
        text = f"The network has {many(size, 'parameter')}, fewer than the {count(linear)} of a linear model of its "
        yield Finding(3, f"{text}{many(inputs[0], 'input')}: {consequence}.")
    elif len(inputs) > 2 and 0 < size < FEW_PARAMETERS and math.prod(inputs[1:]) >= LARGE_IMAGE:
        shape = " × ".join(map(str, inputs[1:]))
        text = f"The network has {many(size, 'parameter')}, which is few for images of {shape} pixels"
        yield Finding(3, f"{text}: {consequence}.")


def _about_study(page: ReportContext) -> Iterator[Finding]:
    run = page.run
    if run.info.data.simulated:
        yield Finding(3, f"The sites are simulated. {run.info.data.simulated}")
    for simulated in (note for note in run.info.data.notes if note.startswith("Simulated")):
        yield Finding(3, simulated)
    if not external_sites(run) and run.info.folds_by != "sites":
        yield Finding(2, "No site was held out of training, so performance at new hospitals was not measured.")
    if len(run.info.seeds) == 1:
        yield Finding(
            2, "One random seed: the intervals include the variation between patients, but not between training runs."
        )
    yield from _small_network(page)
    labels = {m.label for m in run.info.methods}
    if "local" not in labels:
        yield Finding(2, "The study has no local training, so the benefit of federated training was not measured.")
    federated = [m for m in run.info.methods if not m.baseline]
    private = {p.method for p in run.privacy}
    if federated and not private:
        yield Finding(
            1, "No noise was added to the updates, so there is no formal limit on what they reveal about a patient."
        )
