"""The context of every section of the page: the run, its evaluation, its costs, and names for the text."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from polyclinic.core.audit_log import Broken, verify
from polyclinic.evaluation.costs import Cost, Target, cost_of, target_of
from polyclinic.evaluation.metric import Metric
from polyclinic.evaluation.own_metrics import metrics_of
from polyclinic.evaluation.records.method_runs import LINEAR_LOCAL, LINEAR_POOLED
from polyclinic.evaluation.records.record_schema import SiteInfo
from polyclinic.evaluation.records.run_reader import Run
from polyclinic.evaluation.run_evaluation import Evaluation, MethodResult
from polyclinic.evaluation.sample import Sample, sample
from polyclinic.report.formatting import digits_of

NAMES = {  # as their papers write them; others appear under the label that the study gave them
    "local": "Local",
    "pooled": "Pooled",
    "cross": "Cross",
    "constant": "Constant",
    LINEAR_LOCAL: "Linear, local",
    LINEAR_POOLED: "Linear, pooled",
    "fedavg": "FedAvg",
    "fedsgd": "FedSGD",
    "fedprox": "FedProx",
    "fedbn": "FedBN",
    "silobn": "SiloBN",
    "fedper": "FedPer",
    "fedrep": "FedRep",
    "lg-fedavg": "LG-FedAvg",
    "scaffold": "SCAFFOLD",
    "pfedme": "pFedMe",
    "fedavgm": "FedAvgM",
    "fedadagrad": "FedAdagrad",
    "fedadam": "FedAdam",
    "fedyogi": "FedYogi",
    "fednova": "FedNova",
    "ditto": "Ditto",
    "apfl": "APFL",
    "moon": "MOON",
    "ifca": "IFCA",
    "harmofl": "HarmoFL",
    "fedharmony": "FedHarmony",
    "fedmic": "FedMIC",
    "feddyn": "FedDyn",
    "fedce": "FedCE",
}


@dataclass(frozen=True)
class ReportContext:
    """A run, and what was computed from it."""

    run: Run
    result: Evaluation

    @property
    def short(self) -> str:
        """The first eight digits of the study's hash, as in the folder's name."""
        return self.run.info.hash[:8]

    @property
    def digits(self) -> int:
        """Decimals of the primary metric."""
        return digits_of(self.result.metric)

    @property
    def label(self) -> str:
        """The primary metric, with its unit."""
        return self.named(self.result.metric)

    @property
    def higher(self) -> bool:
        """Whether higher values of the primary metric are better."""
        return self.result.metric.higher_is_better is not False

    @property
    def level(self) -> str:
        """The confidence level, such as ``95 %``, with a non-breaking space."""
        return f"{100 * self.result.options.level:g}\u00a0%"

    @property
    def first(self) -> MethodResult | None:
        """The main method of the report; None without results."""
        return self.result.of(self.result.headline) if self.result.headline else None

    @property
    def exact(self) -> bool:
        """Whether intervals of a site's primary metric are DeLong's."""
        estimates = [e[self.result.metric.name] for m in self.result.methods for e in m.sites.values()]
        return any(e.how.startswith("DeLong") for e in estimates)

    @property
    def counted(self) -> bool:
        """Whether intervals of a metric are those of proportions."""
        first = self.first
        return first is not None and any("Clopper" in e.how for e in first.means.values())

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The metrics of the run's task."""
        return metrics_of(self.run.info)

    def named(self, metric: Metric) -> str:
        """Return a metric's label with its unit."""
        return f"{metric.label} ({metric.unit})" if metric.unit else metric.label

    def title(self, label: str) -> str:
        """Return a method's name for the text."""
        return NAMES.get(label, label)

    def site(self, name: str) -> SiteInfo:
        """Return the entry of a site in ``run.json``."""
        return next(s for s in self.run.info.sites if s.name == name)

    @cached_property
    def data(self) -> Sample:
        """The test cases of all methods."""
        return sample(self.run, self.result.options.level, self.result.options.unit)

    @cached_property
    def target(self) -> Target | None:
        """The quality level at which costs are compared; None if there is none."""
        return target_of(self.run, self.result.metric.name, self.higher)

    @cached_property
    def costs(self) -> Mapping[str, Cost]:
        """Costs by method, for methods with recorded rounds."""
        metric, found = self.result.metric.name, {}
        for m in self.run.info.methods:
            if cost := cost_of(self.run, m.label, metric, self.higher, self.target):
                found[m.label] = cost
        return found

    @cached_property
    def journal(self) -> tuple[int, str, str]:
        """Number of journal entries, the latest hash, and the error of a broken journal; (0, "", "") without one."""
        file, entries, head = self.run.path / "journal.jsonl", 0, ""
        if not file.is_file():
            return 0, "", ""
        try:
            for entry in verify(file):
                entries, head = entries + 1, str(entry["hash"])
        except Broken as broken:
            return entries, head, str(broken).replace(str(self.run.path) + "/", "")
        return entries, head, ""
