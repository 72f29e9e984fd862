"""The tables of a study file, each as a value: task, training, methods, privacy, evaluation, engine."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, field_validator, model_validator

from polyclinic.errors import ConfigError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Table(BaseModel):
    """A table of a study file: its keys are known, its values of the right kind, and nothing changes it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TaskSpec(Table):
    """What is learned. ``network`` is one of ``polyclinic networks``; ``options`` are its own."""

    kind: Literal["classification", "multilabel", "segmentation", "regression", "reconstruction"] = "classification"
    """What the model predicts."""
    network: str = "cnn"
    """The name of a network, as listed by ``polyclinic networks``."""
    options: dict[str, Any] = {}
    """Options of the network."""
    class_weights: tuple[Positive, ...] | None = None
    """The weight of each class in the loss (classification)."""
    label_smoothing: Share | None = None
    """The share of label smoothing (classification)."""
    center: float | None = None
    """Subtracted from targets before training (regression)."""
    spread: Positive | None = None
    """Divides targets before training (regression)."""
    spacing_mm: tuple[Positive, ...] | None = None
    """The size of a voxel in mm, for surface metrics (segmentation)."""
    tolerance_mm: Positive | None = None
    """The tolerance of the surface Dice in mm (segmentation)."""
    window: tuple[int, ...] | None = None
    """The size of the sliding window at inference, in voxels (segmentation)."""
    residual: bool | None = None
    """Whether the network predicts the difference from its input (reconstruction)."""

    @model_validator(mode="after")
    def _known(self) -> "TaskSpec":
        from polyclinic.core.config_problems import nearest
        from polyclinic.learning.networks.network_catalog import ARCHITECTURES

        if self.network not in ARCHITECTURES:
            raise ConfigError(f'no network is called "{self.network}".{nearest(self.network, ARCHITECTURES)}')
        allowed = {
            "classification": {"class_weights", "label_smoothing"},
            "multilabel": set[str](),
            "segmentation": {"spacing_mm", "tolerance_mm", "window"},
            "regression": {"center", "spread"},
            "reconstruction": {"residual"},
        }[self.kind]
        if wrong := self.settings.keys() - allowed:
            raise ConfigError(f"{sorted(wrong)[0]} is not for {self.kind}")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What is set of the task's own options."""
        return self.model_dump(exclude={"kind", "network", "options"}, exclude_none=True)


class PrivateSpec(Table):
    """Differentially private training (``training/dp_sgd.py``): noise, the bound on a unit's gradient, the unit."""

    noise: Positive
    """The noise multiplier: the standard deviation of the noise divided by ``bound``."""
    bound: Positive = 1.0
    """The clipping norm of one unit's gradient."""
    unit: Literal["record", "patient"] = "patient"
    """Whose gradient is clipped."""
    chunk: Annotated[int, Field(ge=1)] | None = None
    """How many per-example gradients are held in memory at once."""


class PrivacySpec(Table):
    """The budget that a site may spend in one method run. Methods without noise have none, as the report states."""

    epsilon: Positive
    """The limit of ε for one method."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """δ."""
    unit: Literal["record", "patient", "site"] = "patient"
    """What ε protects."""


class TrainingSpec(Table):
    """How a site trains in a round."""

    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the local data in a round."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Steps in a round, instead of ``epochs``."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Examples in a batch."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """The local optimizer."""
    lr: Positive = 0.05
    """The learning rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The momentum of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """The coefficient of weight decay."""
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The factor on the learning rate after each round."""
    warmup_rounds: Annotated[int, Field(ge=0)] = 0
    """Rounds in which the learning rate rises linearly."""
    cosine_rounds: Annotated[int, Field(ge=1)] | None = None
    """Rounds over which the learning rate falls along a cosine."""
    clip_norm: Positive | None = None
    """The largest norm of a batch's gradient."""
    amp: bool = False
    """Whether to use automatic mixed precision (bfloat16) on a GPU."""
    private: PrivateSpec | None = None


class MethodSpec(Table):
    """A method by name, with its options.

    ``send`` lists what its replies pass through, ``receive`` what its asks do; ``training`` says what differs. Where
    ``send`` is not set, it is what the method's line in the table says, and nothing for nearly all of them.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str
    """The name of a method, as listed by ``polyclinic methods``."""
    label: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]{0,40}$")] = ""
    """The name in results, if a method occurs twice."""
    uplink: tuple[dict[str, Any], ...] = ()
    """The transforms that replies pass through, in order."""
    downlink: tuple[dict[str, Any], ...] = ()
    """The transforms that requests pass through, in order."""
    training: dict[str, Any] = {}
    """Keys of ``[training]`` that differ for this method."""

    @field_validator("name")
    @classmethod
    def _canonical(cls, name: str) -> str:
        from polyclinic.methods.catalog import canonical

        return canonical(name)

    @model_validator(mode="after")
    def _usual(self) -> "MethodSpec":
        from polyclinic.methods.catalog import METHODS

        if "uplink" in self.model_fields_set or self.name not in METHODS or not METHODS[self.name].uplink:
            return self
        return self.model_copy(update={"uplink": tuple({"name": name} for name in METHODS[self.name].uplink)})

    @property
    def options(self) -> dict[str, Any]:
        """What the study sets for the method."""
        return dict(self.model_extra or {})

    @property
    def called(self) -> str:
        """The label, or the name if there is no label."""
        return self.label or self.name


class EvaluationSpec(Table):
    """How models are judged: every ``every`` rounds on validation data, and once on the test data.

    ``metric`` decides which round's model is tested, by its mean over sites (``select = "best"``); or the last is.
    """

    metric: (
        Literal["auc", "accuracy", "balanced_accuracy", "loss", "dice", "mae", "rmse", "r2", "psnr", "ssim", "nmse"]
        | None
    ) = None
    """The metric that selects the round and comes first in the report; by default one that fits the task."""
    interval: Annotated[int, Field(ge=1)] = 1
    """Validate each time after this number of rounds."""
    select: Literal["best", "last"] = "best"
    """Whether the model of the best round, by validation, or of the last round is tested."""
    space: Literal["native", "grid"] | None = None
    """Where masks are compared: on the original grid of each file, or on the network's grid after resampling and
    cropping (segmentation). By default the original grid wherever the data come from image files."""


class EngineSpec(Table):
    """How sites run. It does not change results, and is not part of a study's hash.

    ``parallel`` determines what worker processes share: the sites of one method run, or whole method runs, one process
    each. ``"auto"`` chooses method runs if there are at least twice as many as workers.
    """

    kind: Literal["workers", "in-process"] = "workers"
    """Worker processes, or one process."""
    workers: Annotated[int, Field(ge=1, le=256)] | None = None
    """The number of worker processes; by default one that fits the machine."""
    parallel: Literal["auto", "sites", "arms"] = "auto"
    """What worker processes share: the sites of one method, or whole methods."""
    device: str = "cpu"
    """The device of PyTorch, such as ``cpu`` or ``cuda:0``."""


class MachineSpec(Table):
    """What a simulated site computes and communicates with (``engines.local.virtual_time.Machine``)."""

    seconds_per_batch: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Virtual seconds of computation for one batch."""
    up: Positive | None = None
    """Bytes per second from the site to the server."""
    down: Positive | None = None
    """Bytes per second from the server to the site."""
    drop_out: Share | None = None
    """The probability that the site misses a round."""


class MachinesSpec(MachineSpec):
    """Unequal machines, in virtual time: what holds for all sites, and what differs at some.

    ``minutes`` limits every method run in virtual time; it ends then, or after the study's rounds.
    """

    minutes: Positive | None = None
    """The virtual time after which each method ends."""
    sites: dict[str, MachineSpec] = {}
    """What differs at single sites, by name."""

    def of(self, site: str) -> dict[str, float]:
        """The fields of one site's ``Machine``."""
        every = self.model_dump(exclude={"minutes", "sites"}, exclude_none=True)
        own = self.sites.get(site, MachineSpec()).model_dump(exclude_none=True)
        return {**every, **own}


def _attackers(value: Any) -> int | tuple[str, ...]:
    if type(value) is int and value >= 1:
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise ConfigError('must be how many sites attack, such as 2, or their names, such as ["site-1"]')


class AttackSpec(Table):
    """Hostile sites (``attacks.adversaries``): what they do, and who they are; further keys are the attack's own.

    ``by`` names them, or says how many of the sites that train, drawn anew for each seed; ``spare`` are never drawn.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str
    """The name of the attack."""
    attackers: Annotated[Any, PlainValidator(_attackers)]
    """The number of hostile sites, drawn anew for each seed, or their names."""
    trusted: tuple[str, ...] = ()
    """Sites that are never drawn."""
    start_round: Annotated[int, Field(ge=0)] = 0
    """The first round of the attack."""

    @property
    def options(self) -> dict[str, Any]:
        """What the study sets for the attack."""
        return dict(self.model_extra or {})
