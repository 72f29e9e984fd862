"""Prediction of one image by an ensemble, with mirrored copies and measures of uncertainty."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from polyclinic.data.preprocessing.table_statistics import Statistics
from polyclinic.engines.site_runtime import repeatable
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.tasks.mr_reconstruction import Reconstruction
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.tasks.task import Task
from polyclinic.studies.inference.models import TrainedModel

NUMBERS = ("regression", "survival", "reconstruction")
"""Kinds of task whose predictions are averaged as they are: values, survival at each time, or images."""


class NotPredicted(ConfigError):
    """An image that the model cannot predict. The message gives the reason."""


@dataclass(frozen=True)
class Prediction:
    """The prediction of one image on the grid of the preprocessed image.

    Attributes:
        scores: Mean logits [C, *grid] for masks; [C] logits for classes and labels; [C] values for numbers;
            the image [C, *grid] for reconstructions.
        probabilities: Their probabilities (the values themselves for numbers). Same shape.
        entropy: Entropy of the predicted distribution in nats (summed over labels), [*grid] or []; None for numbers.
        disagreement: Mutual information in nats between class and model (over members and mirrored copies), [*grid] or
            []; None if there is one copy of one model, or numbers are predicted.
    """

    scores: Tensor
    probabilities: Tensor
    entropy: Tensor | None = None
    disagreement: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Predictor:
    """Averages the logits of the members, and of mirrored copies, as nnU-Net does.

    Attributes:
        model: The ensemble.
        mirror: The spatial axes over which copies are mirrored, in all combinations.
        device: The device.
        window: Size of the sliding windows for masks; None for that of the study.
    """

    model: TrainedModel
    mirror: tuple[int, ...] = ()
    device: str = "cpu"
    window: tuple[int, ...] | None = None

    @property
    def kind(self) -> str:
        """The kind of task."""
        return self.model.plan.kind

    def __call__(self, pixels: Tensor) -> Prediction:
        """Return the prediction for one preprocessed image [C, *grid].

        Raises:
            NotPredicted: If the image has another size than the model takes, or the model's output is not finite.
        """
        total, entropy, count = None, None, 0
        with repeatable(self.device), torch.inference_mode():
            for scores in self._each(pixels[None]):
                if not bool(scores.isfinite().all()):
                    raise NotPredicted("the model's output is not finite")
                mine = self._entropy(self._probabilities(scores)) if self._several else None
                total = scores if total is None else total + scores
                entropy = mine if entropy is None or mine is None else entropy + mine
                count += 1
            assert total is not None
            mean = total / count
            probabilities = self._probabilities(mean)
            if self.kind in NUMBERS:
                return Prediction(mean, probabilities)
            unsure = self._entropy(probabilities)
            disagreement = None if entropy is None else (unsure - entropy / count).clamp_min(0)
            return Prediction(mean, probabilities, unsure, disagreement)

    @property
    def _several(self) -> bool:
        return len(self.model.members) > 1 or bool(self.mirror)

    def _each(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the scores of each member for each mirrored copy."""
        flips = [f for n in range(len(self.mirror) + 1) for f in itertools.combinations(self.mirror, n)]
        for member, task in zip(self.model.members, self._tasks, strict=True):
            model = cached_model(member.task, member.params, self.device, member.name).eval()
            for flip in flips:
                axes = [2 + axis for axis in flip]
                copy = (x.flip(axes) if axes else x).to(self.device)
                if isinstance(task, Segmentation):
                    scores = self._sized(task, copy).predict(model, copy).float().cpu()
                    yield (scores.flip(axes) if axes else scores)[0]
                elif isinstance(task, Reconstruction):
                    self._require_size(copy)
                    yield task.predict(model, copy).float().cpu()[0]
                else:
                    if member.statistics is not None:
                        copy = self._scaled(member.statistics, copy)
                    self._require_size(copy)
                    empty = torch.zeros(1, dtype=torch.long, device=self.device)
                    yield self._logits(task.outputs(model, (copy, empty))["score"].float().cpu()[0])

    def _scaled(self, file: Path, x: Tensor) -> Tensor:
        """Return rows of a table [1, F], filled and scaled as for the member's training."""
        if file not in self._statistics:
            self._statistics[file] = Statistics.read(file)
        return torch.from_numpy(self._statistics[file](x.cpu().numpy())).float().to(self.device)

    @cached_property
    def _statistics(self) -> dict[Path, Statistics]:
        return {}

    @cached_property
    def _tasks(self) -> tuple[Task, ...]:
        tasks = []
        for member in self.model.members:
            task = member.task
            if isinstance(task, Segmentation) and self.window is not None:
                task = replace(task, window=self.window)
            tasks.append(task)
        return tuple(tasks)

    def _sized(self, task: Segmentation, x: Tensor) -> Segmentation:
        """Return the task with windows of the training size, if the image has another one."""
        size = self.model.plan.inputs[1:]
        return task if task.window is not None or tuple(x.shape[2:]) == size else replace(task, window=tuple(size))

    def _require_size(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != tuple(self.model.plan.inputs):
            wanted, given = (" x ".join(map(str, shape)) for shape in (self.model.plan.inputs, x.shape[1:]))
            raise NotPredicted(
                f"after the study's steps the image is {given}, and the model takes {wanted}: its images must have the "
                "size of those it was trained on"
            )

    def _logits(self, score: Tensor) -> Tensor:
        """Return the logits of a task's scores, up to a constant, which softmax leaves out."""
        if self.kind == "classification":
            return score.clamp_min(torch.finfo(score.dtype).tiny).log()
        return torch.logit(score, eps=1e-12) if self.kind == "multilabel" else score

    @cached_property
    def regions(self) -> bool:
        """Whether the outputs are regions of masks."""
        task = self._tasks[0]
        return isinstance(task, Segmentation) and bool(task.regions)

    @property
    def _separate(self) -> bool:
        """Whether each output has a probability of its own: labels, or regions of masks."""
        return self.kind == "multilabel" or self.regions

    def labels(self, scores: Tensor) -> Tensor:
        """Return the labels of scores [C, ...] of masks: int64 [...]."""
        task = self._tasks[0]
        assert isinstance(task, Segmentation)
        return task.labels(scores)

    def _probabilities(self, scores: Tensor) -> Tensor:
        if self._separate:
            return scores.sigmoid()
        return scores if self.kind in NUMBERS else scores.softmax(0)

    def _entropy(self, probabilities: Tensor) -> Tensor:
        """Return the entropy over the first axis in nats: of one class, or summed over labels or regions."""
        p = probabilities.clamp(0, 1)
        each: Tensor = torch.special.entr(p)
        return (each + torch.special.entr(1 - p) if self._separate else each).sum(0)


def require_window(window: tuple[int, ...] | None, model: TrainedModel) -> None:
    """Check the size of sliding windows against the model.

    Raises:
        NotPredicted: If it has another number of axes, is not positive, or no masks are predicted.
    """
    if window is None:
        return
    if model.plan.kind != "segmentation":
        raise NotPredicted(f"--window is for segmentation, and the model predicts {model.plan.kind}")
    if len(window) != len(model.plan.inputs) - 1 or any(size < 1 for size in window) or math.prod(window) > 2**31:
        raise NotPredicted(f"--window {' '.join(map(str, window))}: give {len(model.plan.inputs) - 1} sizes above 0")


def tta_axes(model: TrainedModel) -> tuple[int, ...]:
    """Return the axes for test-time mirroring, those that training mirrored.

    Raises:
        NotPredicted: If training mirrored none. Copies that training never saw would lower the accuracy.
    """
    if not model.mirror_axes:
        raise NotPredicted(
            "--tta mirrors images along the axes that training mirrored, and this study's training mirrored none"
        )
    if model.plan.kind in NUMBERS:
        raise NotPredicted("--tta is for classes and masks, not for numbers")
    return model.mirror_axes
