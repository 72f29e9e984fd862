"""The mask of a cascade's previous stage as further channels of an image.

nnU-Net's cascade (Isensee et al., Nature Methods 18:203, 2021, online methods; ``3d_cascade_fullres`` of
https://github.com/MIC-DKFZ/nnUNet) segments an image at low resolution first. The network of full resolution then gets
the image and this segmentation, one channel for each label. A training case is predicted by a model that was not
trained on it, if there is one.
"""

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from polyclinic.core.serialization import bytes_of
from polyclinic.data.preprocessing.sample import Picture
from polyclinic.data.preprocessing.transforms import Resample
from polyclinic.data.source import digest
from polyclinic.errors import ConfigError, DataError, PolyclinicError
from polyclinic.learning.networks.architectures import ARCHITECTURES
from polyclinic.learning.networks.model_tree import load
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.segmentation import Segmentation, own_labels
from polyclinic.learning.threads import one_thread
from polyclinic.learning.weights import store

DIGITS = 16
"""Hexadecimal digits by which an image is known."""
SEEN = "predicted by a previous stage that was trained on it, with a better mask than that of a new image"
"""Note on an image that all models of the previous stage were trained on."""
NEW = "not known to the previous stage, whose run had other images"
"""Note on an image that was not in the run of the previous stage, if its images are known."""
LARGEST_PATCH = 2**24
"""Voxels of a patch, at most, as in nnU-Net."""
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class PreviousStage:
    """Prediction of the low-resolution stage of a cascade; ``polyclinic plan --previous RUN`` writes it.

    The last step: the channels of labels 1, 2, ... follow those of the image, and are 0 or 1.

    Attributes:
        network: Name of the previous stage's network.
        options: Its options.
        inputs: Shape of its inputs: channels, then the patch.
        outputs: Number of its outputs.
        regions: The labels of each output, if it predicts regions.
        steps: Its preprocessing.
        models: Hashes of its models in the store of weights.
        known: The images of its run, ``DIGITS`` digits each; empty if they are not known.
        held_out: For each model, those that it was not trained on.
    """

    name: ClassVar[str] = "previous_stage"
    version: ClassVar[int] = 1
    network: str
    inputs: tuple[int, ...]
    outputs: int
    steps: tuple[Any, ...]
    models: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    regions: tuple[tuple[int, ...], ...] = ()
    known: str = ""
    held_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [f"models: {one!r} is no SHA-256" for one in self.models if not store.HASH.fullmatch(one)]
        if self.network not in ARCHITECTURES:  # never code of a package, which a site would have to allow
            problems.append(f"network = {self.network!r}: is none of Polyclinic's networks")
        if not self.models:
            problems.append("models: name one at least")
        if self.held_out and len(self.held_out) != len(self.models):
            problems.append(f"held_out: give one entry for each of the {len(self.models)} models")
        if any(len(text) % DIGITS for text in (self.known, *self.held_out)):
            problems.append(f"known, held_out: each image has {DIGITS} digits")
        if len(self.inputs) not in (3, 4) or min(self.inputs) < 1 or self.outputs < 1:
            problems.append("inputs, outputs: give the channels and the patch, and the number of outputs")
        elif math.prod(self.inputs[1:]) > LARGEST_PATCH:
            problems.append(f"inputs: a patch of more than {LARGEST_PATCH:,} voxels")
        if self.regions:
            try:
                if len(own_labels(self.regions)) != self.outputs:
                    problems.append(f"regions: give one for each of the {self.outputs} outputs")
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            raise DataError(problems)

    @property
    def task(self) -> Segmentation:
        """The task of the previous stage."""
        options = tuple(sorted((key, _hashable(value)) for key, value in self.options.items()))
        return Segmentation(Network(self.network, self.inputs, self.outputs, options), regions=self.regions)

    @property
    def channels(self) -> int:
        """The number of channels that the step adds."""
        return self.task.label_count - 1

    @property
    def spacing_mm(self) -> tuple[float, ...] | None:
        """The voxel size at which it predicts, if its steps resample."""
        found = None
        for step in self.steps:
            if isinstance(step, Resample) or step.name == "resample_cubic":
                found = step.mm if isinstance(step.mm, tuple) else (step.mm,) * (len(self.inputs) - 1)
        return found

    def require_models(self) -> None:
        """Read the models, and build the network for them.

        Raises:
            DataError: If one is missing, was changed, or is of another network.
        """
        _built.cache_clear()  # a file may have changed since it was read
        for sha256 in self.models:
            self._model(sha256)

    def __call__(self, picture: Picture) -> Picture:
        """Return the picture with the channels of the predicted mask.

        Raises:
            DataError: If the models or the image do not suit.
        """
        first = picture.original
        if first is None or first.geometry is None or picture.geometry is None:
            raise DataError(f"the step {self.name} needs an image from a file, before all other steps")
        low = replace(first, mask=None, truth=None)
        for step in self.steps:
            low = step(low)
        if (count := len(low.pixels)) != self.inputs[0]:
            raise DataError(f"the image has {count} channels, and the previous stage takes {self.inputs[0]}")
        if len(low.size) != len(self.inputs) - 1:
            raise DataError(f"the image has {len(low.size)} axes, and the previous stage {len(self.inputs) - 1}")
        chosen, notes = self._chosen(first)
        assert low.geometry is not None
        labels = low.geometry.on_grid_of(picture.geometry).labels(self._scores(low.pixels, chosen), self.task.labels)
        masks = torch.stack([labels == label for label in range(1, self.channels + 1)])
        pixels = torch.cat([picture.pixels, masks.to(picture.pixels.dtype)])
        return replace(picture, pixels=pixels, notes=(*picture.notes, *notes))

    def _chosen(self, picture: Picture) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the models that predict an image, and notes."""
        if not self.known:
            return self.models, ()
        key = image_key(picture)
        held_out = tuple(m for m, text in zip(self.models, self.held_out, strict=False) if key in _keys(text))
        if held_out:
            return held_out, ()
        return self.models, (SEEN if key in _keys(self.known) else NEW,)

    def _scores(self, pixels: Tensor, models: Sequence[str]) -> Tensor:
        """Return the mean class scores of ``models`` for an image [C, *grid]: [outputs, *grid]."""
        with _ONE_AT_A_TIME, one_thread(), torch.inference_mode():
            total = torch.zeros(self.outputs, *pixels.shape[1:])
            for sha256 in models:
                total += self.task.predict(self._model(sha256), pixels[None].float(), tuple(self.inputs[1:]))[0]
        if not bool(total.isfinite().all()):
            raise DataError("the output of the previous stage is not finite")
        return total / len(models)

    def _model(self, sha256: str) -> nn.Module:
        try:
            return _built(self.task, sha256)
        except (PolyclinicError, ValueError, TypeError, OSError) as error:
            raise DataError(f"the model of the previous stage: {error}") from None


@lru_cache(maxsize=8)
def _built(task: Segmentation, sha256: str) -> nn.Module:
    return load(task.model(), dict(store.tensors(sha256))).eval()


@lru_cache(maxsize=32)
def _keys(text: str) -> frozenset[str]:
    return frozenset(text[i : i + DIGITS] for i in range(0, len(text), DIGITS))


def image_key(picture: Picture) -> str:
    """Return the digits by which an image is known, from its voxels before all steps."""
    return digest("image", tuple(picture.pixels.shape), bytes_of(picture.pixels.float()))[:DIGITS]


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, list | tuple) else value
