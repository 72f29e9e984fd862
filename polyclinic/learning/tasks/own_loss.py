"""Tasks with a loss of an installed package, or of the program that runs the study."""

from dataclasses import field, fields, make_dataclass
from functools import lru_cache
from typing import TypeVar

from torch import Tensor, nn

from polyclinic.core import extensions
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.tasks.task import Task

T = TypeVar("T", bound=Task)


class OwnLoss:
    """Replaces the loss of a task.

    Attributes:
        objective: The name of the loss, a function of predictions [b, ...] and targets [b, ...] that returns the mean
            over the examples, of shape [].
    """

    objective: str

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of one (inputs, targets).

        Raises:
            ConfigError: If the function returns anything but one number.
        """
        prediction = model(batch[0])
        scores = prediction if isinstance(prediction, Tensor) else prediction[0]
        value: Tensor = extensions.load("losses", self.objective)(scores, batch[1])
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(
                f"the loss {self.objective!r} returned {shape}: return the mean, a tensor with one number"
            )
        return value.reshape(())


def with_loss(task: T, name: str) -> T:
    """Return ``task`` with the loss called ``name``."""
    cls = _with_own_loss(type(task))
    found: T = cls(**{f.name: getattr(task, f.name) for f in fields(task)}, objective=name)
    return found


@lru_cache
def _with_own_loss(cls: type[T]) -> type[T]:
    """Return the subclass of a task whose loss is named by a field."""
    made = make_dataclass(
        f"Own{cls.__name__}", [("objective", str, field(default=""))], bases=(OwnLoss, cls), frozen=True
    )
    return made  # type: ignore[return-value]  # a subclass of cls
