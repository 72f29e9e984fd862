"""Augmentation of training samples: a fixed sequence of random changes, each with a probability of its own.

Every random number of a sample comes from one generator of this sample, on the CPU, so that a sample does not depend on
the others of its minibatch, on threads or on the device.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from polyclinic.errors import ConfigError
from polyclinic.learning.training import image_transforms as transforms
from polyclinic.learning.training import stage_masks
from polyclinic.learning.training.image_transforms import happens, uniform
from polyclinic.learning.training.own_augmentations import changed_by


class Placement(NamedTuple):
    """Where a sample's values are taken from.

    Attributes:
        source: The size of the region to read.
        matrix: Offsets in the result to offsets in the region, in voxels [d, d]; None for the identity.
        shift: Added to them [d].
    """

    source: tuple[int, ...]
    matrix: Tensor | None
    shift: Tensor


@dataclass(frozen=True)
class ImageAugmentation:
    """The changes of a training sample, in this order; None for a change that is not made.

    Attributes:
        border: Whether values outside of the image are those of its nearest voxel, instead of 0. Masks are 0 there in
            both cases unless ``border``.
        own: Names of augmentations of packages, which are applied last.
    """

    crop: transforms.Crop | None = None
    rotation: transforms.Rotation | None = None
    scaling: transforms.Scaling | None = None
    quarter_turns: transforms.QuarterTurns | None = None
    noise: transforms.Noise | None = None
    blur: transforms.Blur | None = None
    brightness: transforms.Brightness | None = None
    contrast: transforms.Contrast | None = None
    low_resolution: transforms.LowResolution | None = None
    gamma_inverted: transforms.Gamma | None = None
    gamma: transforms.Gamma | None = None
    color: transforms.Color | None = None
    mirror: transforms.Mirror | None = None
    border: bool = False
    own: tuple[str, ...] = ()

    def place(self, size: tuple[int, ...], rng: torch.Generator, margin: bool = True) -> Placement:
        """Draw the geometry of a sample whose result has ``size``.

        Args:
            size: The size of the result.
            rng: The sample's generator.
            margin: Whether a region larger than ``size`` can be read.
        """
        d = len(size)
        if d not in (2, 3):
            raise ConfigError(f"augmentation is for images and volumes, not for inputs with {d} spatial axes")
        matrix, shift, changed = torch.eye(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64), False
        if self.rotation and happens(self.rotation.probability, rng):
            matrix, changed = transforms.turn_matrix(size, self.rotation.degrees, rng), True
        if self.scaling and happens(self.scaling.probability, rng):
            factor = uniform(self.scaling.low, self.scaling.high, rng)
            sides = torch.full((d,), factor, dtype=torch.float64)
            if transforms.anisotropic(size):
                sides[0] = 1.0
            matrix, changed = matrix * sides, True
        if self.crop and happens(self.crop.probability, rng):
            shares = _crop_shares(self.crop, d, rng)
            room = torch.tensor([(1 - share) * n / 2 for share, n in zip(shares, size, strict=True)])
            shift = torch.tensor([uniform(-1, 1, rng) for _ in range(d)], dtype=torch.float64) * room
            matrix, changed = torch.tensor(shares, dtype=torch.float64)[:, None] * matrix, True
        if not changed:
            return Placement(size, None, shift)
        if not margin:
            return Placement(size, matrix, shift)
        reach = matrix.abs() @ torch.tensor(size, dtype=torch.float64) + 2 * shift.abs() + 1
        bound = transforms.enlarged(size, self.rotation, self.scaling is not None)
        wanted = (min(float(r), b) for r, b in zip(reach, bound, strict=True))
        # As many voxels on both sides, so that the center stays where it is.
        source = tuple(n + 2 * max(0, math.ceil((w - n) / 2)) for n, w in zip(size, wanted, strict=True))
        return Placement(source, matrix, shift)

    def __call__(
        self, x: Tensor, y: Tensor, place: Placement, size: tuple[int, ...], rng: torch.Generator, labels: int = 0
    ) -> Any:
        """Return the changed sample, which has ``size``.

        Args:
            x: The image [C, *place.source], float32. It may be changed in place.
            y: Its mask [*place.source], or any other target, which is returned as it is.
            place: The geometry, from ``place``.
            size: The size of the result.
            rng: The sample's generator.
            labels: How many of the last channels are labels of a mask, 0 or 1. They move with the image, keep these
                values, and are changed as masks of a cascade's previous stage (``stage_masks``).
        """
        is_mask = y.ndim == x.ndim - 1 and y.shape == x.shape[1:] and not y.is_floating_point()
        masks = [y] if is_mask else []
        if labels:
            masks.append(stage_masks.labels_of(x[-labels:]))
            x = x[:-labels]
        if place.matrix is None:
            x, masks = transforms.center_crop(x, size), [transforms.center_crop(mask, size) for mask in masks]
        else:
            where = place.matrix, place.shift, size, self.border
            masks = [transforms.resample_mask(mask, *where) for mask in masks]
            x = transforms.resample(x, *where)
        if self.quarter_turns and happens(self.quarter_turns.probability, rng):
            turns = int(torch.randint(4, (), generator=rng))
            if x.shape[-1] == x.shape[-2]:
                x, masks = x.rot90(turns, (-2, -1)), [mask.rot90(turns, (-2, -1)) for mask in masks]
        x = x.contiguous()
        for change in self._intensities():
            if happens(change.probability, rng):
                x = change(x, rng)
        axes = [axis for axis in self.mirror_axes(len(size)) if self.mirror and happens(self.mirror.probability, rng)]
        if axes:
            x, masks = x.flip([axis + 1 for axis in axes]), [mask.flip(axes) for mask in masks]
        stage = masks.pop() if labels else None
        y = masks[0] if is_mask else y
        for name in self.own:
            x, y = changed_by(name, x, y, rng)
        return (x if stage is None else torch.cat([x, stage_masks.changed(stage, labels, rng)])), y

    def mirror_axes(self, dims: int) -> tuple[int, ...]:
        """Return the spatial axes that are mirrored, 0 for the first."""
        if self.mirror is None or not self.mirror.probability:
            return ()
        axes = tuple(range(dims)) if self.mirror.axes is None else self.mirror.axes
        if wrong := [axis for axis in axes if not 0 <= axis < dims]:
            raise ConfigError(f"augmentation.mirror: there is no spatial axis {wrong[0]}; there are 0 to {dims - 1}")
        return axes

    def to_table(self) -> dict[str, Any]:
        """Return the changes as plain data, complete, as ``of`` reads them."""
        table: dict[str, Any] = {}
        for name in TRANSFORMS:
            if (change := getattr(self, name)) is not None:
                table[name] = {k: v for k, v in asdict(change).items() if v is not None and k != "inverted"}
        return table | ({"border": True} if self.border else {}) | ({"own": list(self.own)} if self.own else {})

    def _intensities(self) -> Iterator[Any]:
        for name in INTENSITIES:
            if (change := getattr(self, name)) is not None:
                yield change


def _crop_shares(crop: transforms.Crop, d: int, rng: torch.Generator) -> list[float]:
    """Draw the relative sides of a crop: their product is the share, their ratios are at most ``aspect``."""
    area = uniform(crop.low, crop.high, rng)
    stretch = [uniform(-0.5, 0.5, rng) * math.log(crop.aspect) for _ in range(d)]
    mean = sum(stretch) / d
    return [min(1.0, area ** (1 / d) * math.exp(one - mean)) for one in stretch]


TRANSFORMS: Final[Mapping[str, type[Any]]] = {
    "crop": transforms.Crop,
    "rotation": transforms.Rotation,
    "scaling": transforms.Scaling,
    "quarter_turns": transforms.QuarterTurns,
    "noise": transforms.Noise,
    "blur": transforms.Blur,
    "brightness": transforms.Brightness,
    "contrast": transforms.Contrast,
    "low_resolution": transforms.LowResolution,
    "gamma_inverted": transforms.Gamma,
    "gamma": transforms.Gamma,
    "color": transforms.Color,
    "mirror": transforms.Mirror,
}
"""The changes by their name in a study file, in their order."""

INTENSITIES: Final = ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma_inverted", "gamma", "color")

RECIPES: Final[Mapping[str, ImageAugmentation]] = {
    "none": ImageAugmentation(),
    "light": ImageAugmentation(
        rotation=transforms.Rotation(0.5, 10.0),
        scaling=transforms.Scaling(0.5, 0.9, 1.1),
        brightness=transforms.Brightness(0.15, 0.9, 1.1),
        contrast=transforms.Contrast(0.15, 0.9, 1.1),
        border=True,
    ),
    "nnunet": ImageAugmentation(
        rotation=transforms.Rotation(0.2),
        scaling=transforms.Scaling(0.2),
        noise=transforms.Noise(0.1),
        blur=transforms.Blur(0.2),
        brightness=transforms.Brightness(0.15),
        contrast=transforms.Contrast(0.15),
        low_resolution=transforms.LowResolution(0.25),
        gamma_inverted=transforms.Gamma(0.1, inverted=True),
        gamma=transforms.Gamma(0.3),
        mirror=transforms.Mirror(0.5),
    ),
    "picture": ImageAugmentation(
        crop=transforms.Crop(1.0),
        quarter_turns=transforms.QuarterTurns(1.0),
        brightness=transforms.Brightness(0.5, 0.8, 1.2),
        contrast=transforms.Contrast(0.5, 0.8, 1.2),
        color=transforms.Color(0.5),
        mirror=transforms.Mirror(0.5),
        border=True,
    ),
}
"""The named recipes. ``light`` does not mirror, since the side of the body may matter."""


def augmentation_of(table: Mapping[str, Any]) -> ImageAugmentation:
    """Return the augmentation that ``table`` describes: ``recipe`` (``none`` by default), and changes by name.

    A change with probability 0 is left out.

    Raises:
        ConfigError: If a name or value is unknown. The message names it.
    """
    recipe = table.get("recipe", "none")
    if recipe not in RECIPES:
        raise ConfigError(f'augmentation: no recipe is called "{recipe}"; there are {", ".join(RECIPES)}')
    found = RECIPES[recipe]
    if unknown := table.keys() - {"recipe", "border", "own", *TRANSFORMS}:
        raise ConfigError(f"augmentation: there is no {sorted(unknown)[0]}; there are {', '.join(TRANSFORMS)}")
    for name, options in table.items():
        if name in TRANSFORMS:
            found = replace(found, **{name: _change(name, options, getattr(found, name))})
    found = replace(found, border=table["border"]) if "border" in table else found
    return replace(found, own=tuple(table.get("own", ())))


def _change(name: str, options: Mapping[str, Any], usual: Any) -> Any:
    """Return one change; options that are not given are the recipe's, or the defaults."""
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    known = {field.name: field.default for field in fields(TRANSFORMS[name])}
    if unknown := given.keys() - (known.keys() - {"inverted"}):
        raise ConfigError(f"augmentation.{name} has no {sorted(unknown)[0]}")
    if name == "gamma_inverted":
        given["inverted"] = True
    if usual is None and known["probability"] is MISSING and "probability" not in given:
        raise ConfigError(f"augmentation.{name} needs a probability")
    change = TRANSFORMS[name](**given) if usual is None else replace(usual, **given)
    low, high = getattr(change, "low", 0.0), getattr(change, "high", 0.0)
    if low > high:
        raise ConfigError(f"augmentation.{name}: low = {low:g} is above high = {high:g}")
    return change if change.probability else None
