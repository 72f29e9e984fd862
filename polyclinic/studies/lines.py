"""What a line of ``records.jsonl`` and ``run.json`` hold. Unknown fields are ignored, unknown kinds counted."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

BASELINES = ("single", "mix", "cross")
TASKS = Literal["classification", "multilabel", "segmentation", "regression", "reconstruction"]


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=True)


class Round(_Line):
    """One round of one arm: time, bytes, who was asked and who was lost."""

    kind: Literal["round"]
    method: str
    seed: int
    round: int
    seconds: dict[str, float] = Field(default_factory=dict)
    wall: float = 0.0
    bytes_up: dict[str, int] = Field(default_factory=dict)
    bytes_down: dict[str, int] = Field(default_factory=dict)
    asked: tuple[str, ...] = ()
    lost: dict[str, str] = Field(default_factory=dict)


class Scores(_Line):
    """Metrics of one site after a round, on validation; or of the sealed test, once."""

    kind: Literal["scores", "test"]
    method: str
    seed: int
    round: int
    site: str
    role: str = "test"
    metrics: dict[str, float | None] = Field(default_factory=dict)
    n: int = 0


class Sealed(_Line):
    """How often an arm's test set was opened."""

    kind: Literal["sealed"]
    method: str
    seed: int
    opened: int


class Privacy(_Line):
    """What privacy an arm spent."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=True)

    kind: Literal["privacy"]
    method: str
    seed: int = 0
    round: int | None = None
    site: str | None = None
    epsilon: float | None = None
    delta: float | None = None
    unit: str | None = None


class Quarantine(_Line):
    """A reply the server refused, and why."""

    kind: Literal["quarantine"]
    method: str
    seed: int
    round: int
    site: str
    reason: str


class DataInfo(_Line):
    """Where the data came from. ``simulated`` is a sentence where the split into sites was made up."""

    title: str = ""
    licence: str = ""
    citation: str = ""
    url: str = ""
    notes: tuple[str, ...] = ()
    simulated: str | None = None
    fingerprint: str = ""
    sites_are: str = ""
    checks: tuple[str, ...] = ()


class SiteInfo(_Line):
    """One site: how many patients and examples in each role, and how many of each class."""

    name: str
    role: Literal["training", "external"] = "training"
    patients: dict[str, int] = Field(default_factory=dict)
    examples: dict[str, int] = Field(default_factory=dict)
    classes: dict[str, tuple[int, ...]] = Field(default_factory=dict)


class MethodInfo(_Line):
    """One method of the study, and what leaves a site under it."""

    label: str
    name: str = ""
    title: str = ""
    options: dict[str, Any] = Field(default_factory=dict)
    citation: str = ""
    leaves: str = ""

    @property
    def baseline(self) -> bool:
        """Whether it is one of Single, Mix and Cross."""
        return self.label in BASELINES or self.name in BASELINES


class RunInfo(_Line):
    """``run.json``."""

    name: str
    title: str = ""
    hash: str = ""
    created: str = ""
    task: TASKS
    classes: tuple[str, ...] = ()
    metric: str
    higher_is_better: bool = True
    data: DataInfo = DataInfo()
    sites: tuple[SiteInfo, ...]
    methods: tuple[MethodInfo, ...]
    rounds: int = 0
    seeds: tuple[int, ...] = (0,)
    engine: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)
    parameters: int = 0


Known = Annotated[Round | Scores | Sealed | Privacy | Quarantine, Field(discriminator="kind")]
