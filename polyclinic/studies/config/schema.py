"""The tables of a study file, each as a value: task, training, methods, privacy, evaluation, engine."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    field_validator,
    model_validator,
)

from polyclinic.errors import ConfigError
from polyclinic.studies.config.augmentation_schema import AugmentationSpec
from polyclinic.studies.config.table_model import Table as Table

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class WeightsSpec(Table):
    """Start weights: a file in the store of ``polyclinic weights``, and how it is matched with the network."""

    file: str = ""
    """The name of weights in the store, or the path of the file that was added."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """The hash of the weights in the store; ``polyclinic weights add`` prints it. It must be that of ``file``."""
    strip: str = ""
    """A prefix that is removed from the names in the file; tensors without it are not used."""
    rename: dict[str, str] = Field(default={})
    """Prefixes of names in the file, and the network's prefixes that replace them."""
    skip: tuple[str, ...] = ()
    """Patterns of names: of the network's tensors that start at random, and of the file's that are not used."""
    head: bool = False
    """Whether the head is loaded too; by default it starts at random."""
    stem: Literal["refuse", "sum", "mean"] = "refuse"
    """How convolutions of another number of input channels are adapted."""
    inflate: Literal["refuse", "mean", "center"] = "refuse"
    """How 2-D convolutions become 3-D."""
    inflate_axis: Annotated[int, Field(ge=0, le=2)] = 2
    """The axis of the volumes that the 2-D weights lack, counted from 0 without the channels."""
    grid: Literal["refuse", "interpolate"] = "refuse"
    """How position embeddings of another grid of patches are adapted."""
    norm_momentum: Annotated[float, Field(gt=0, le=1)] | None = None
    """The momentum of the running statistics of batch normalization, such as 0.1; by default the network's own.

    After n steps, the statistics of the start weights still have the weight ``(1 - norm_momentum) ** n``.
    """

    @model_validator(mode="after")
    def _named(self) -> "WeightsSpec":
        if not self.file and self.sha256 is None:
            raise ConfigError("needs file, the name of weights in the store, or sha256")
        return self

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of ``StartWeights``, without those that are not set."""
        value = self.model_dump(mode="json", exclude={"file", "rename"}, exclude_defaults=True)
        return {**value, **({"rename": sorted(map(list, self.rename.items()))} if self.rename else {})}


class LoRASpec(Table):
    """Low-rank adapters (LoRA) parallel to layers of the network, whose own weights stay as they are."""

    where: tuple[str, ...] = ()
    """Patterns of the names of linear layers and convolutions; by default all outside the head that can have one."""
    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    """The rank of the change of a layer."""
    alpha: Positive = 16.0
    """The change is scaled by ``alpha / rank``."""


def _weights(value: Any) -> Any:
    return {"file": value} if isinstance(value, str) else value


class TaskSpec(Table):
    """What is learned. ``network`` is one of ``polyclinic networks``; ``options`` are its own."""

    kind: Literal["classification", "multilabel", "segmentation", "regression", "survival", "reconstruction"] = (
        "classification"
    )
    """What the model predicts."""
    network: str = "cnn"
    """The name of a network, as listed by ``polyclinic networks``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the network."""
    loss: str | None = None
    """The name of a loss of an installed package; by default that of the task."""
    class_weights: tuple[Positive, ...] | None = None
    """The weight of each class in the loss (classification)."""
    label_smoothing: Share | None = None
    """The share of label smoothing (classification)."""
    ordered: bool | None = None
    """Whether the classes are grades in ascending order, such as BI-RADS or Kellgren-Lawrence grades (classification).

    The loss is then larger for predictions farther from the true grade, and kappa with quadratic weights is the usual
    metric. Grades that are not whole numbers need ``classes`` in ``[data]``, in ascending order.
    """
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
    batch_dice: bool | None = None
    """Whether the Dice loss is that of all images of a minibatch together, as in nnU-Net's 2-D mode (segmentation)."""
    regions: Annotated[tuple[tuple[int, ...], ...], Field(min_length=1)] | None = None
    """The labels of each region that is learned in place of the classes, such as ``[[1, 2, 3], [2, 3], [3]]``, as in
    nnU-Net's region-based training (segmentation).

    The network gives a probability for each region, and masks get the label that a region has outside of the later
    ones.
    """
    cuts: Annotated[tuple[Positive, ...], Field(min_length=2, max_length=1000)] | None = None
    """The ends of time intervals, ascending, in the unit of the data, such as ``[365, 730, 1095]`` (survival).

    Survival is predicted and judged up to the last one, the horizon.
    """
    hazards: Literal["discrete", "proportional"] | None = None
    """``"discrete"``, the default: a probability of the event in each interval; ``"proportional"``: Cox's model, which
    ranks patients and predicts no probabilities (survival)."""
    residual: bool | None = None
    """Whether the network predicts the difference from its input (reconstruction)."""
    weights: Annotated[WeightsSpec, BeforeValidator(_weights)] | None = None
    """Start weights: the name or file of weights in the store, or a table."""
    lora: LoRASpec | None = None
    """Low-rank adapters."""
    train: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """What is trained: patterns of names, ``head``, ``encoder``, ``adapters``, ``norm:*``, ``stats:*`` and ``bias:*``.

    All else keeps the start weights, and is neither sent nor counted. By default everything is trained, or with
    ``lora`` the adapters and the head.
    """

    UNSET: ClassVar[frozenset[str]] = frozenset({"batch_dice", "cuts", "hazards", "ordered", "regions"})

    @model_validator(mode="after")
    def _known(self) -> "TaskSpec":
        from polyclinic.core import extensions
        from polyclinic.core.config_problems import nearest
        from polyclinic.learning.networks.architectures import network_names
        from polyclinic.learning.tasks.segmentation import own_labels

        if self.network not in (known := network_names()):
            raise ConfigError(f'no network is called "{self.network}".{nearest(self.network, known)}')
        if self.loss is not None and self.loss not in (losses := extensions.names("losses")):
            raise ConfigError(
                f'no installed package provides a loss called "{self.loss}"; there are {", ".join(losses) or "none"}'
            )
        allowed = {
            "classification": {"class_weights", "label_smoothing", "ordered"},
            "multilabel": set[str](),
            "segmentation": {"spacing_mm", "tolerance_mm", "window", "batch_dice", "regions"},
            "regression": {"center", "spread"},
            "survival": {"cuts", "hazards"},
            "reconstruction": {"residual"},
        }[self.kind]
        if wrong := self.settings.keys() - allowed - {"loss"}:
            raise ConfigError(f"{sorted(wrong)[0]} is not for {self.kind}")
        if self.ordered and (self.class_weights is not None or self.label_smoothing):
            raise ConfigError("class_weights and label_smoothing have no meaning for ordered grades: leave them out")
        if self.regions is not None:
            own_labels(self.regions)
        if self.kind == "survival" and self.cuts is None:
            raise ConfigError("survival needs cuts, such as cuts = [365, 730, 1095] for times in days")
        if self.cuts and any(a >= b for a, b in zip(self.cuts, self.cuts[1:], strict=False)):
            raise ConfigError(f"cuts = {list(self.cuts)} must ascend")
        if self.weights is None and (self.lora is not None or self.train not in (None, ("*",))):
            key = "train" if self.train else "lora"
            raise ConfigError(f"{key} needs weights: what is not trained would keep random values")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What is set of the task's own options."""
        others = {"kind", "network", "options", "weights", "lora", "train"}
        return self.model_dump(exclude=others, exclude_none=True)

    @property
    def tuning(self) -> dict[str, Any]:
        """Start weights, adapters and what is trained, as a plan holds them; empty if nothing is set."""
        train = self.train or (("adapters", "head") if self.lora else ("*",))
        found: dict[str, Any] = {}
        if self.weights is not None:
            found["weights"] = self.weights.fields
        if self.lora is not None:
            found["lora"] = self.lora.model_dump(mode="json")
        if train != ("*",):
            found["train"] = list(train)
        return found


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
    recipe: Literal["nnunet"] | None = None
    """Settings of nnU-Net for all keys that are not set, and its augmentation; see the guide on training options."""
    nesterov: bool | None = None
    """Whether the momentum of SGD is Nesterov's."""
    schedule: Literal["poly"] | None = None
    """``"poly"``: the learning rate falls to 0 as a power of the share of steps left, over all rounds."""
    power: Positive | None = None
    """The exponent of ``schedule``; 0.9 by default."""
    milestones: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Numbers of rounds after each of which the learning rate is multiplied with ``milestone_factor``."""
    milestone_factor: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The factor of ``milestones``; 0.1 by default."""
    keep_optimizer: bool | None = None
    """Whether a site keeps the optimizer's state between rounds (it is never sent); by default if momentum ≥ 0.95."""
    foreground: Share | None = None
    """The probability that a random patch is placed around foreground, drawn for each patch (segmentation)."""
    balance: Share | None = None
    """How far classes are made equally frequent in training: 0 for as in the data, 1 for equal (classification)."""
    balance_patients: bool | None = None
    """Whether patients are equally frequent in training, whatever their number of examples."""
    loop: str | None = None
    """A function of an installed package that trains instead of Polyclinic's loop; other keys then have no effect."""
    private: PrivateSpec | None = None

    UNSET: ClassVar[frozenset[str]] = frozenset(
        {
            "recipe",
            "nesterov",
            "schedule",
            "power",
            "milestones",
            "milestone_factor",
            "keep_optimizer",
            "foreground",
            "balance",
            "balance_patients",
            "loop",
        }
    )

    @model_validator(mode="after")
    def _known_loop(self) -> "TrainingSpec":
        from polyclinic.core import extensions

        if self.loop is not None and self.loop not in (known := extensions.names("trainings")):
            there = ", ".join(known) or "none"
            raise ConfigError(f'no installed package provides a training called "{self.loop}"; there are {there}')
        return self


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
    training: dict[str, Any] = Field(default_factory=dict)
    """Keys of ``[training]`` that differ for this method."""
    augmentation: AugmentationSpec | None = None
    """Replaces the study's ``[augmentation]`` for this method."""

    UNSET: ClassVar[frozenset[str]] = frozenset({"augmentation"})

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


class CompareSpec(Table):
    """A comparison of two methods that is declared before the run, by the primary metric, mean over training sites.

    The margin is in units of the metric: 0.02 is two points of AUC. It is part of the study's hash, so that it cannot
    be chosen after the results are known.
    """

    method: str
    """The label of a method of this study."""
    reference: str
    """The label of the method that it is compared with."""
    kind: Literal["difference", "non-inferiority", "equivalence"] = "difference"
    """The question: whether they differ, whether the method is not worse by more than the margin, or whether both are
    equal within the margin."""
    margin: Positive | None = None
    """The largest difference that does not matter, for non-inferiority and equivalence."""

    @model_validator(mode="after")
    def _with_margin(self) -> "CompareSpec":
        if self.kind != "difference" and self.margin is None:
            raise ConfigError(f"{self.kind} needs a margin, such as margin = 0.02")
        if self.kind == "difference" and self.margin is not None:
            raise ConfigError('a margin is for kind = "non-inferiority" or "equivalence"')
        if self.method == self.reference:
            raise ConfigError("method and reference are the same")
        return self


METRICS = {
    "classification": ("auc", "accuracy", "balanced_accuracy", "loss", "quadratic_kappa", "grade_error"),
    "multilabel": ("auc", "accuracy"),
    "segmentation": ("dice",),
    "regression": ("mae", "rmse", "r2"),
    "survival": ("c_index", "uno_c", "ibs"),
    "reconstruction": ("psnr", "ssim", "nmse"),
}
"""Metrics that can select the round, by kind of task: those of validation that the report has, too."""
KNOWN_METRICS = tuple(dict.fromkeys(name for names in METRICS.values() for name in names))


class EvaluationSpec(Table):
    """How models are judged: every ``every`` rounds on validation data, and once on the test data.

    ``metric`` decides which round's model is tested, by its mean over sites (``select = "best"``); or the last is.
    """

    metric: str | None = None
    """The metric that selects the round and comes first in the report: ``auc``, ``accuracy``, ``balanced_accuracy`` or
    ``loss`` for classification (if ``ordered``, ``quadratic_kappa`` and ``grade_error`` in place of ``loss``),
    ``auc`` or ``accuracy`` for several labels, ``dice`` for segmentation, ``mae``, ``rmse`` or ``r2`` for regression,
    ``c_index``, ``uno_c`` or ``ibs`` for survival, ``psnr``, ``ssim`` or ``nmse`` for reconstruction, or one of a
    package; by default one that fits the task."""
    metrics: tuple[str, ...] = ()
    """Metrics of installed packages that are computed in addition to those of the task."""
    interval: Annotated[int, Field(ge=1)] = 1
    """Validate each time after this number of rounds."""
    select: Literal["best", "last"] = "best"
    """Whether the model of the best round, by validation, or of the last round is tested."""
    space: Literal["native", "grid"] | None = None
    """Where masks are compared: on the original grid of each file, or on the network's grid after resampling and
    cropping (segmentation). By default the original grid wherever the data come from image files."""
    lesions: bool | None = None
    """Whether lesions are also compared one by one on the test data: lesion-wise Dice and HD95 (BraTS 2023), and
    sensitivity, F1 and false positives a case (segmentation)."""
    lesion_dilation: Annotated[int, Field(ge=0, le=20)] | None = None
    """The number of dilations before true lesions are separated: 3 in BraTS for gliomas (the default), 1 for
    metastases, 0 to compare them as they are."""
    lesion_smallest: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """The volume in mm³ up to which true lesions are left out, 50 by default; in pixels if spacings are unknown."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Rounds without improvement on validation data after which ``local`` and ``pooled`` end; federated methods run on.
    """
    compare: tuple[CompareSpec, ...] = ()
    """Comparisons that are declared before the run, each a table ``[[evaluation.compare]]``."""
    subgroups: tuple[str, ...] = ()
    """Columns of the data by which results are shown, in addition to the usual ones, such as sex, age and scanner."""

    @property
    def unset(self) -> set[str]:
        """The keys without a value, which are no part of a study's hash."""
        lesions = ("lesions", "lesion_dilation", "lesion_smallest")
        optional = ("space", *lesions, "patience", "compare", "subgroups", "metrics")
        return {key for key in optional if getattr(self, key) in (None, ())}

    @property
    def task_options(self) -> dict[str, Any]:
        """The options of the task of segmentation that are set here."""
        keys = ("space", "lesions", "lesion_dilation", "lesion_smallest")
        return {key: value for key in keys if (value := getattr(self, key)) is not None}

    @property
    def own_metrics(self) -> tuple[str, ...]:
        """The metrics of packages: ``metrics``, and ``metric`` if it is one."""
        primary = () if self.metric is None or self.metric in KNOWN_METRICS else (self.metric,)
        return tuple(dict.fromkeys((*self.metrics, *primary)))

    @model_validator(mode="after")
    def _known(self) -> "EvaluationSpec":
        from polyclinic.core import extensions
        from polyclinic.core.config_problems import nearest

        known = extensions.names("metrics")
        for name in self.own_metrics:
            if name in KNOWN_METRICS:
                raise ConfigError(f'metrics lists those of packages; "{name}" is computed anyway if it fits the task')
            if name not in known:
                of_packages = f"; installed packages provide {', '.join(known)}" if known else ""
                raise ConfigError(
                    f'no metric is called "{name}".{nearest(name, (*KNOWN_METRICS, *known))} There are '
                    f"{', '.join(KNOWN_METRICS)}{of_packages}"
                )
        return self

    @model_validator(mode="after")
    def _lesions(self) -> "EvaluationSpec":
        for key in ("lesion_dilation", "lesion_smallest"):
            if getattr(self, key) is not None and not self.lesions:
                raise ConfigError(f"{key} needs lesions = true")
        return self


class EngineSpec(Table):
    """How sites run. It does not change results, and is not part of a study's hash.

    ``parallel`` determines what worker processes share: the sites of one method run, or whole method runs, one process
    each. ``"auto"`` chooses method runs if there are at least twice as many as workers.
    """

    kind: Literal["workers", "in-process", "ray"] = "workers"
    """Worker processes, one process, or workers on the machines of a Ray cluster."""
    workers: Annotated[int, Field(ge=1, le=4096)] | None = None
    """The number of worker processes; by default one that fits the machine or the cluster."""
    parallel: Literal["auto", "sites", "arms"] = "auto"
    """What worker processes share: the sites of one method, or whole methods."""
    device: str = "cpu"
    """The device of PyTorch, such as ``cpu`` or ``cuda:0``; ``auto`` for a GPU if there is one."""
    threads: Annotated[int, Field(ge=0, le=64)] = 0
    """Threads of each worker that draw and augment samples ahead of training; they change no bit of a result."""
    channels_last: bool = False
    """Whether images are stored with channels last. The last bits of results may differ."""
    compile: bool = False
    """Whether networks are compiled by ``torch.compile``. The last bits of results may differ."""
    address: str = "auto"
    """The Ray cluster: ``auto`` for the one on this machine, ``local`` to start one, or the address of its head."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of each worker on a Ray cluster; a fraction shares one between workers."""

    @property
    def device_here(self) -> str:
        """The device of this machine's workers. Those of a Ray cluster are not checked here.

        Raises:
            ConfigError: If this machine has no such device.
        """
        from polyclinic.engines.devices import chosen_device

        return self.device if self.kind == "ray" else chosen_device(self.device)

    @model_validator(mode="after")
    def _fits(self) -> "EngineSpec":
        if self.kind != "ray" and self.model_fields_set & {"address", "gpus"}:
            raise ConfigError('address and gpus are for kind = "ray"')
        if self.kind != "ray" and (self.workers or 0) > 256:
            raise ConfigError("workers: at most 256 worker processes run on one machine")
        if self.kind == "ray" and self.device == "auto":
            raise ConfigError('device = "auto" is for one machine: set "cpu" or "cuda" for the workers of a cluster')
        if self.gpus and self.device == "cpu":
            raise ConfigError('gpus: set device = "cuda" to use the GPUs of the workers')
        return self


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
    sites: dict[str, MachineSpec] = Field(default_factory=dict)
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


NNUNET_STEPS = 5000
"""The total number of steps from which nnU-Net's optimizer is used. With fewer, its momentum of 0.99 has hardly begun:
after 300 steps on the hippocampus it predicted background only, where AdamW reached a Dice of 0.84."""


def with_recipe(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the tables of a study with the settings of ``training.recipe = "nnunet"``; keys that are set remain.

    Raises:
        ConfigError: If the number of steps cannot be known.
    """
    training = data["training"]
    if "epochs" in training:
        raise ConfigError('training.recipe = "nnunet" counts steps: set steps (250 by default) instead of epochs')
    steps, rounds = training.get("steps", 250), data.get("rounds")
    usual: dict[str, Any] = {"steps": 250, "schedule": "poly", "foreground": 0.33, "clip_norm": 12.0, "amp": True}
    if isinstance(steps, int) and isinstance(rounds, int) and steps * rounds >= NNUNET_STEPS:
        usual |= {"optimizer": "sgd", "lr": 0.01, "momentum": 0.99, "nesterov": True, "weight_decay": 3e-5}
        usual |= {"keep_optimizer": True}
    else:
        usual |= {"optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.01}
    return {"augmentation": {"recipe": "nnunet"}, **data, "training": {**usual, **training}}
