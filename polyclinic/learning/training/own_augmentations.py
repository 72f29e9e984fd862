"""Augmentations of installed packages, or of the program that runs the study."""

from typing import Any

import torch
from torch import Tensor

from polyclinic.core import extensions
from polyclinic.errors import ConfigError


def changed_by(name: str, x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a sample after the augmentation called ``name``.

    A package provides it as an entry point of ``polyclinic.augmentations``: a function of an image [C, *spatial], its
    target (for segmentation the mask [*spatial]) and the sample's generator, from which alone it draws random numbers,
    and which returns both with their shapes and types.

    Raises:
        ConfigError: If there is none, or it returns anything else.
    """
    result: Any = extensions.load("augmentations", name)(x, y, rng)
    given = (x.shape, x.dtype, y.shape, y.dtype)
    if not isinstance(result, tuple | list) or len(result) != 2 or not all(isinstance(t, Tensor) for t in result):
        raise ConfigError(f"the augmentation {name!r} returned a {type(result).__name__}: return image and target")
    image, target = result
    if (image.shape, image.dtype, target.shape, target.dtype) != given:
        raise ConfigError(
            f"the augmentation {name!r} changed shapes or types: it was given an image {_form(x)} and a target "
            f"{_form(y)}, and returned {_form(image)} and {_form(target)}"
        )
    return image, target


def _form(leaf: Tensor) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"
