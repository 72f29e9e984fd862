"""A plan: one method on one task as plain data, from which every engine and every site builds the same objects.

A plan holds names from the catalogs and numbers, never code or import paths. It can therefore be read, compared, hashed
and refused before anything runs.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from polyclinic.compression.downlink import received_through
from polyclinic.compression.transform_table import build as build_transform
from polyclinic.compression.transform_table import entry as transform_entry
from polyclinic.core.method import Method
from polyclinic.core.pipeline import SUMMED, Transform, UnsuitableTransforms, send_through
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.adapters import LowRank
from polyclinic.learning.networks.fine_tuning import ALL, FineTuned
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification, MultiLabel
from polyclinic.learning.tasks.mr_reconstruction import Reconstruction
from polyclinic.learning.tasks.own_loss import with_loss
from polyclinic.learning.tasks.regression import Regression
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.tasks.survival import Survival
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.tasks.task_evaluation import Evaluated
from polyclinic.learning.training import own_training
from polyclinic.learning.training.dp_sgd import DPSGD
from polyclinic.learning.training.image_augmentation import augmentation_of
from polyclinic.learning.training.local import LocalTraining
from polyclinic.learning.training.own_training import OwnTraining
from polyclinic.learning.weights.matching import StartWeights
from polyclinic.methods.base.kept_optimizer import OWN_OPTIMIZERS, KeptOptimizer
from polyclinic.methods.catalog import Way
from polyclinic.methods.registry import Setting, build, entry
from polyclinic.methods.tensor_types import precision_problem

TASKS: Mapping[str, type[Task]] = {
    task.kind: task for task in (Classification, MultiLabel, Segmentation, Regression, Survival, Reconstruction)
}


@dataclass(frozen=True)
class Plan:
    """Task, training and method of a run.

    Attributes:
        kind: Kind of task.
        task: Options of the task.
        network: Name of the architecture.
        network_options: Further options of the architecture.
        tuning: Start weights, adapters and what is trained: ``weights`` (fields of ``StartWeights``), ``lora`` (fields
            of ``LowRank``) and ``train``; empty for a random start of which everything is trained.
        inputs: Shape of an example: (channels, *spatial), or (features,).
        outputs: Number of classes, labels or values; for survival, of the network's outputs.
        training: Fields of ``LocalTraining``, with ``augmentation`` as a table; with ``private`` among them, ``DPSGD``
            with those fields.
        method: Name of the method.
        options: Options of the method that the study sets.
        uplink: Transforms in the order in which a reply passes them, each with ``name`` and its options.
        downlink: The same for requests.
        sites: The sites that train.
        rounds: Number of rounds.
        seed: Seed from which every reproducible random number follows.
    """

    kind: str
    network: str
    inputs: tuple[int, ...]
    outputs: int
    method: str
    sites: tuple[str, ...]
    rounds: int
    seed: int = 0
    task: Mapping[str, Any] = field(default_factory=dict)
    network_options: Mapping[str, Any] = field(default_factory=dict)
    tuning: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    uplink: tuple[Mapping[str, Any], ...] = ()
    downlink: tuple[Mapping[str, Any], ...] = ()

    def build_task(self) -> Task:
        """Build the task. Its network is built later."""
        options = tuple(sorted((key, _hashable(value)) for key, value in self.network_options.items()))
        network: Any = Network(self.network, self.inputs, self.outputs, options)
        if self.tuning:
            network = _tuned(network, self.tuning)
        given = {key: _hashable(value) for key, value in self.task.items() if key != "loss"}
        task = TASKS[self.kind](network, **given)
        return with_loss(task, str(self.task["loss"])) if "loss" in self.task else task

    def build_local(self) -> LocalTraining:
        """Build the local training."""
        return local_training(self.training)

    @property
    def private(self) -> bool:
        """Whether the replies contain noise that a privacy budget can account for."""
        return bool(ways(self.training, self.uplink))

    def build_method(self) -> Evaluated[Any]:
        """Build the method with its transforms and evaluation."""
        task, local = self.build_task(), self.build_local()
        if isinstance(task, Segmentation) and task.regions and entry(self.method).exclusive:
            raise ConfigError(
                f"{self.method} takes the network's outputs for classes that exclude each other: leave task.regions "
                "out, or choose another method"
            )
        if problem := precision_problem(self.method, task):
            raise ConfigError(problem)
        inner: Method[Any] = build(self.method, Setting(task, local, self.sites, self.rounds), self.options)
        if isinstance(local, OwnTraining) and self.method not in own_training.METHODS:
            raise ConfigError(
                f"{self.method} changes or repeats the steps of training, which training.loop = {local.loop!r} does "
                f"not offer: choose {', '.join(own_training.METHODS)}, or leave loop out"
            )
        if self.method in OWN_OPTIMIZERS and local.keep_optimizer:
            raise ConfigError(
                f"{self.method} takes individual training steps and resets its optimizers each round: set "
                "keep_optimizer = false for it"
            )
        if local.keeps_optimizer and self.method not in OWN_OPTIMIZERS:
            inner = KeptOptimizer(inner)
        if self.uplink:
            inner = send_through(inner, *(build_transform(item) for item in self.uplink))
            self._require_summands(inner.transforms)
        if self.downlink:
            inner = received_through(inner, task.first(0), *(build_transform(item) for item in self.downlink))
        return Evaluated(inner, task)

    def _require_summands(self, transforms: tuple[Transform, ...]) -> None:
        """Require that as many sites train as a secure sum adds.

        Raises:
            UnsuitableTransforms: If there are fewer.
        """
        for t in transforms:
            least = max(SUMMED, getattr(t, "threshold", None) or 0)
            if t.secure and len(self.sites) < least:
                name = type(t).__name__
                raise UnsuitableTransforms(
                    f"{name} sums the replies of at least {least} sites, and {len(self.sites)} "
                    f"{'trains' if len(self.sites) == 1 else 'train'}: remove {name} from the uplink, or add sites"
                )

    def to_json(self) -> str:
        """Return the plan as canonical JSON."""
        newer = ("downlink", "tuning")  # plans without them keep their hash
        value = {key: item for key, item in asdict(self).items() if key not in newer or item}
        return json.dumps(value, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read the plan in ``text``.

        Raises:
            ValueError: If it is not a plan. The message names the field.
        """
        given = json.loads(text)
        if not isinstance(given, dict):
            raise ConfigError("a plan is a table of fields")
        if unknown := given.keys() - {f.name for f in fields(cls)}:
            raise ConfigError(f"a plan has no field {sorted(unknown)[0]!r}")
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
        return cls(**values)

    @property
    def hash(self) -> str:
        """The SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _tuned(network: Network, tuning: Mapping[str, Any]) -> FineTuned:
    """Return ``network`` with the start weights, adapters and trained tensors of a plan.

    Raises:
        ConfigError: If a field is unknown.
    """
    try:
        start = {key: _hashable(value) for key, value in tuning.get("weights", {}).items()}
        lora = {key: _hashable(value) for key, value in tuning.get("lora", {}).items()}
        train = tuple(tuning.get("train", ALL))
        return FineTuned(network, StartWeights(**start) if start else None, train, LowRank(**lora) if lora else None)
    except TypeError as error:
        raise ConfigError(f"the plan's field 'tuning': {error}") from None


def build_method(text: str) -> Evaluated[Any]:
    """Build the method of the plan in ``text``, as JSON."""
    return Plan.from_json(text).build_method()


def ways(training: Mapping[str, Any], uplink: Iterable[Mapping[str, Any]]) -> tuple[Way, ...]:
    """Return the mechanisms that ``training`` and the transforms ``uplink`` account for: DP-SGD, noise, or both."""
    found: list[Way] = ["dp-sgd"] if training.get("private") else []
    return (*found, "gaussian") if any(transform_entry(item["name"]).pays for item in uplink) else tuple(found)


def local_training(table: Mapping[str, Any]) -> LocalTraining:
    """Return the local training with the fields in ``table``; with ``private`` or ``loop`` among them, that kind.

    Raises:
        ConfigError: If both are.
    """
    fields = {key: _hashable(value) for key, value in table.items() if key not in ("private", "augmentation")}
    if changes := table.get("augmentation"):
        fields["augmentation"] = augmentation_of(changes)
    private = table.get("private")
    if private and "loop" in fields:
        raise ConfigError("training.private trains with DP-SGD, and not by training.loop: leave one of them out")
    if private:
        return DPSGD(**fields, **private)
    return OwnTraining(**fields) if "loop" in fields else LocalTraining(**fields)


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, list | tuple) else value
