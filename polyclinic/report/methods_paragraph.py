"""The methods paragraph for a paper; each statement is supported by the records of the run."""

from markupsafe import Markup

from polyclinic.evaluation.records.run_reader import external_sites, training_sites
from polyclinic.report.context import ReportContext
from polyclinic.report.formatting import count, listed, many
from polyclinic.report.page_blocks import Section, Text

JACKKNIFE = "Efron, Stein: The jackknife estimate of variance. Annals of Statistics 9(3), 1981"
CLOPPER = (
    "Clopper, Pearson: The use of confidence or fiducial limits illustrated in the case of the binomial. "
    "Biometrika 26(4), 1934"
)
DELONG = (
    "DeLong, DeLong, Clarke-Pearson: Comparing the areas under two or more correlated receiver operating "
    "characteristic curves: a nonparametric approach. Biometrics 44(3), 1988"
)
HOLM = "Holm: A simple sequentially rejective multiple test procedure. Scandinavian Journal of Statistics 6(2), 1979"
_MEAN = ", averaging the images of a patient"
_RULES = {
    "classification": f"{_MEAN}; a patient was positive if any image was",
    "multilabel": f"{_MEAN}; a label was positive if it was in any image",
}


class References:
    """References, numbered in the order of their first use."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def cite(self, reference: str) -> str:
        """Return the citation, such as `` [3]``; nothing for an empty reference."""
        if not reference:
            return ""
        if reference not in self.found:
            self.found.append(reference)
        return f" [{self.found.index(reference) + 1}]"


def paragraph_section(page: ReportContext) -> Section:
    """Return the section with the paragraph and its references."""
    text, references = methods_paragraph(page)
    items = Markup("").join(Markup("<li>{}</li>").format(c) for c in references)
    blocks = [Text(text, "paste"), Text(Markup("<ol class='refs'>{}</ol>").format(items), "raw")]
    return Section("paragraph", "Methods paragraph for a paper", blocks)


def methods_paragraph(page: ReportContext) -> tuple[str, list[str]]:
    """Return the paragraph and its references in order. Every number is from the run."""
    refs = References()
    sentences = [*_data(page, refs), *_training(page, refs), *_evaluation(page, refs), *_rest(page)]
    return " ".join(sentences), refs.found


def _data(page: ReportContext, refs: References) -> list[str]:
    info, external = page.run.info, external_sites(page.run)
    n = {r: sum(s.patients.get(r, 0) for s in info.sites if s.role == "training") for r in ("train", "val", "test")}
    title = f"{info.data.title}{refs.cite(info.data.citation)}" if info.data.title else "the data described above"
    said = [
        f"A model with {count(info.parameters)} parameters was trained for {info.task} on {title}: "
        f"{many(len(training_sites(page.run)), 'training site')} with {count(n['train'])} training, {count(n['val'])} "
        f"validation and {many(n['test'], 'test patient')}."
    ]
    if info.data.simulated:
        said.append(f"Sites were simulated: {info.data.simulated}")
    if external:
        tested = sum(s.patients.get("test", 0) for s in info.sites if s.role == "external")
        places = "One external site" if len(external) == 1 else f"{len(external)} external sites"
        said.append(f"{places} ({listed(external)}; {many(tested, 'patient')}) did not take part in training.")
    return said


def _training(page: ReportContext, refs: References) -> list[str]:
    run, info = page.run, page.run.info
    methods = [page.title(m.label) + refs.cite(m.citation) for m in info.methods]
    seeds = "one random seed" if len(info.seeds) == 1 else f"{len(info.seeds)} random seeds"
    said = [f"We trained {listed(methods)} for up to {many(info.rounds, 'round')} with {seeds}."]
    if info.folds_by == "patients":
        said.append(
            f"Each seed was cross-validated with {info.folds} folds of patients within sites: every patient was tested "
            "once, by a model that was not trained on that patient."
        )
    elif info.folds_by == "sites":
        said.append("Each site was left out in turn and tested by a model that was not trained on its patients.")
    if run.trials:
        tried = max(t.trial for t in run.trials) + 1
        said.append(
            f"For every method, the best of {tried} settings was selected on validation patients, separately in each "
            f"split."
        )
    if any(m.validation is not None for m in page.result.methods):
        said.append("The tested round was selected on validation patients.")
    if run.opened and all(k == 1 for k in run.opened.values()) and run.arms.keys() <= run.opened.keys():
        said.append("Test patients were not accessed until training had ended, and were used once for each model.")
    return said


def _evaluation(page: ReportContext, refs: References) -> list[str]:
    result, metric = page.result, page.result.metric
    if not result.methods:
        return []
    unit = "patient" if result.unit == "patient" else "image"
    several = result.unit == "patient" and any(result.images[s] != n for s, n in result.patients.items())
    unit += _RULES.get(page.run.info.task, _MEAN) if several else ""
    delong = f"DeLong’s method{refs.cite(DELONG)} for AUCs, " if page.exact else ""
    exact = f"Clopper and Pearson’s method{refs.cite(CLOPPER)} for proportions and " if page.counted else ""
    said = [
        f"The primary metric was {metric.label}, computed per {unit}, and its mean over the training sites.",
        f"{page.level} confidence intervals are by {delong}{exact}Student’s t with jackknife variances over patients"
        f"{refs.cite(JACKKNIFE)} for other metrics.",
    ]
    if result.declared:
        margins = [
            f"{page.title(c.method)} and {page.title(c.reference)} ({c.difference.question}"
            + (f", margin {c.difference.margin:g})" if c.difference.margin is not None else ")")
            for c in result.declared
        ]
        said.append(
            f"Before the run we declared comparisons of {listed(margins)}; non-inferiority and equivalence were tested "
            "one-sided at 2.5 %, with Holm’s correction over the declared comparisons."
        )
    if result.comparisons and result.reference:
        several = any(len(m.seeds) > 1 for m in result.methods)
        also = ", adding the variance between seeds" if several else ""
        said.append(
            f"Methods were compared with {page.title(result.reference)} by a paired t-test with jackknife variances "
            f"over patients{also}, Satterthwaite’s degrees of freedom and Holm’s correction{refs.cite(HOLM)}."
        )
    return said


def _rest(page: ReportContext) -> list[str]:
    info, said = page.run.info, []
    for method in dict.fromkeys(p.method for p in page.run.privacy):
        spent = [p for p in page.run.spent(method) if p.epsilon is not None and p.delta is not None]
        if spent:
            most = max(spent, key=lambda p: p.epsilon or 0)
            said.append(f"{page.title(method)} was differentially private: {most.stated}")
    version = f"Polyclinic {info.environment.get('polyclinic', '')}".strip()
    return [*said, f"Experiments were run with {version} (study {info.name}, hash {page.short})."]
