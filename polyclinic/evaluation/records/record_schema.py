"""Schema of the lines of ``records.jsonl`` and of ``run.json``. Unknown fields are ignored, unknown kinds counted."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from polyclinic.evaluation.records.method_runs import BASELINES, arm_name

TASKS = Literal["classification", "multilabel", "segmentation", "regression", "survival", "reconstruction"]


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=True)


class _MethodRunLine(_Line):
    """A record of one method run, which is identified by method label, seed and fold."""

    method: str
    seed: int
    fold: int = 0


class Round(_MethodRunLine):
    """One round of one method run: time, bytes, the sites that were asked, and those that did not reply."""

    kind: Literal["round"]
    round: int
    seconds: dict[str, float] = Field(default_factory=dict)
    wall: float = 0.0
    bytes_up: dict[str, int] = Field(default_factory=dict)
    bytes_down: dict[str, int] = Field(default_factory=dict)
    asked: tuple[str, ...] = ()
    lost: dict[str, str] = Field(default_factory=dict)


class Scores(_MethodRunLine):
    """Metrics of one site: on validation data after a round, or on test data once."""

    kind: Literal["scores", "test"]
    round: int
    site: str
    role: str = "test"
    metrics: dict[str, float | None] = Field(default_factory=dict)
    n: int = 0


class Sealed(_MethodRunLine):
    """How often the test set of a method run was opened."""

    kind: Literal["sealed"]
    opened: int


class Privacy(_MethodRunLine):
    """Privacy spending of a method run."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=True)

    kind: Literal["privacy"]
    seed: int = 0
    round: int | None = None
    site: str | None = None
    epsilon: float | None = None
    delta: float | None = None
    unit: str | None = None
    adjacency: str | None = None
    assumes: tuple[str, ...] = ()

    @property
    def meaning(self) -> str:
        """The meaning of ε: the data sets it compares, the assumptions, and what it does not cover."""
        from polyclinic.privacy.guarantee import meaning

        return meaning(self.unit or NOT_STATED, self.adjacency or "not stated", self.assumes)

    @property
    def stated(self) -> str:
        """ε and δ with unit, adjacency and assumptions."""
        from polyclinic.privacy.guarantee import sentence

        epsilon = "not stated" if self.epsilon is None else rounded_up(self.epsilon)
        delta = "not stated" if self.delta is None else f"{self.delta:g}"
        return sentence(epsilon, delta, self.unit or NOT_STATED, self.adjacency or "not stated", self.assumes)


NOT_STATED = "unit that is not stated"


def rounded_up(epsilon: float) -> str:
    """Return ε rounded up to two decimals."""
    return f"{math.ceil(epsilon * 100 - 1e-9) / 100:.2f}" if math.isfinite(epsilon) else "∞"


class Quarantine(_MethodRunLine):
    """A reply that the server refused, with the reason."""

    kind: Literal["quarantine"]
    round: int
    site: str
    reason: str


class Trial(_MethodRunLine):
    """One setting that a search tried on validation data for ``rounds`` rounds; ``score`` is the best over rounds."""

    kind: Literal["trial"]
    trial: int
    values: dict[str, Any] = Field(default_factory=dict)
    score: float | None = None
    rounds: int = 0
    seconds: float = 0.0


class Chosen(_MethodRunLine):
    """The setting of a method run after a search; ``by`` is ``hand`` if a person changed the search's choice."""

    kind: Literal["chosen"]
    values: dict[str, Any] = Field(default_factory=dict)
    by: Literal["search", "hand"] = "search"


class Standing(_MethodRunLine):
    """Whether a method run names a site for inspection at its end, and whether the site was a simulated attacker."""

    kind: Literal["standing"]
    site: str
    named: bool
    hostile: bool = False


class DataInfo(_Line):
    """Origin of the data. ``simulated`` is a sentence if the division into sites was simulated.

    ``near_duplicates`` counts the test examples of each site that nearly equal a training or validation example.
    """

    title: str = ""
    license: str = ""
    citation: str = ""
    url: str = ""
    notes: tuple[str, ...] = ()
    simulated: str | None = None
    fingerprint: str = ""
    sites_are: str = ""
    checks: tuple[str, ...] = ()
    near_duplicates: dict[str, int] = Field(default_factory=dict)


class SiteInfo(_Line):
    """One site: numbers of patients and examples by role, and of examples by class."""

    name: str
    role: Literal["training", "external"] = "training"
    patients: dict[str, int] = Field(default_factory=dict)
    examples: dict[str, int] = Field(default_factory=dict)
    classes: dict[str, tuple[int, ...]] = Field(default_factory=dict)


class ComparisonInfo(_Line):
    """A comparison that the study declared before the run."""

    method: str
    reference: str
    kind: Literal["difference", "non-inferiority", "equivalence"] = "difference"
    margin: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _with_margin(self) -> "ComparisonInfo":
        if (self.kind == "difference") != (self.margin is None):
            raise ValueError("a margin is needed for non-inferiority and equivalence, and only for these")
        return self


class MethodInfo(_Line):
    """One method of the study; ``leaves`` describes its messages from a site."""

    label: str
    name: str = ""
    title: str = ""
    options: dict[str, Any] = Field(default_factory=dict)
    citation: str = ""
    leaves: str = ""

    @property
    def baseline(self) -> bool:
        """Whether the method is Local, Pooled or Cross."""
        return self.label in BASELINES or self.name in BASELINES


class StartInfo(_Line):
    """The start weights of the network, and what was trained. ``account`` says what was loaded.

    ``trained`` and ``numbers`` count the numbers that were trained and those of the whole network.
    """

    name: str
    sha256: str
    license: str = ""
    source: str = ""
    trained_on: str = ""
    citation: str = ""
    redistribute: bool = True
    account: str = ""
    adapted: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    trained: int = 0
    numbers: int = 0


class OwnMetricInfo(_Line):
    """A metric of a package that the study names."""

    name: str
    label: str
    higher_is_better: bool = True
    unit: str = ""


class RunInfo(_Line):
    """``run.json``. With ``folds``, each method has one run per seed and fold of patients or sites.

    ``training`` holds the settings of local training by method, with those of recipes; ``ordered`` whether the
    classes are grades, ``machines`` and ``attack`` simulated machines and attacks, ``start`` the start weights,
    ``space`` where masks were compared, ``compare`` the declared comparisons, ``metrics`` the metrics of packages,
    ``inputs`` and ``outputs`` the shapes of the network.
    """

    name: str
    title: str = ""
    hash: str = ""
    created: str = ""
    task: TASKS
    classes: tuple[str, ...] = ()
    ordered: bool = False
    space: Literal["", "native", "grid"] = ""
    metric: str
    higher_is_better: bool = True
    data: DataInfo = DataInfo()
    sites: tuple[SiteInfo, ...]
    methods: tuple[MethodInfo, ...]
    rounds: int = 0
    seeds: tuple[int, ...] = (0,)
    folds: int = 0
    folds_by: Literal["", "patients", "sites"] = ""
    engine: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)
    parameters: int = 0
    inputs: tuple[int, ...] = ()
    outputs: int = 0
    training: dict[str, dict[str, Any]] = Field(default_factory=dict)
    machines: dict[str, Any] = Field(default_factory=dict)
    attack: dict[str, Any] = Field(default_factory=dict)
    start: StartInfo | None = None
    compare: tuple[ComparisonInfo, ...] = ()
    metrics: tuple[OwnMetricInfo, ...] = ()


Known = Annotated[
    Round | Scores | Sealed | Privacy | Quarantine | Trial | Chosen | Standing, Field(discriminator="kind")
]


def arm_names(info: RunInfo) -> list[tuple[str, int, int, str]]:
    """Return method label, seed, fold and folder name of every method run, in the order of their records."""
    folds: Sequence[int | None] = range(info.folds) if info.folds else [None]
    return [(m.label, s, f or 0, arm_name(m.label, s, f)) for s in info.seeds for f in folds for m in info.methods]


def record_files(run: Path, names: Iterable[str]) -> list[Path]:
    """Return the files of a run's records: one file, or until the run is finished, one per method run."""
    whole = run / "records.jsonl"
    parts = [run / "arms" / name / "records.jsonl" for name in names]
    return [whole] if whole.is_file() else [part for part in parts if part.is_file()]
