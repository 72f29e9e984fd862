"""The table ``[augmentation]`` of a study file: a recipe, and single changes that replace the recipe's."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from polyclinic.core import extensions
from polyclinic.core.config_problems import nearest
from polyclinic.errors import ConfigError
from polyclinic.learning.training.image_augmentation import TRANSFORMS, augmentation_of
from polyclinic.studies.config.table_model import Table

Probability = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(gt=0, le=10)]
Degrees = Annotated[float, Field(ge=0, le=180)]


class Change(Table):
    """A random change of a training sample."""

    probability: Probability | None = None
    """The probability for a sample; by default the recipe's. 0 leaves the change out."""


class RotationSpec(Change):
    """Rotation around the center."""

    degrees: Degrees | None = None
    """The largest angle; by default 30 in three dimensions and 180 in two, or less for long patches."""


class RangeSpec(Change):
    """A change by a random factor or exponent (scaling, brightness, contrast, gamma)."""

    low: Factor | None = None
    """The smallest factor or exponent."""
    high: Factor | None = None
    """The largest."""


class ChannelSpec(RangeSpec):
    """A change of some channels (blur: standard deviation in voxels; low resolution: factor of the size)."""

    channel: Probability | None = None
    """The probability for each channel."""


class CropSpec(Change):
    """Random resized crop."""

    low: Annotated[float, Field(gt=0, le=1)] | None = None
    """The smallest share of the area or volume."""
    high: Annotated[float, Field(gt=0, le=1)] | None = None
    """The largest share."""
    aspect: Annotated[float, Field(ge=1, le=10)] | None = None
    """The largest ratio of two relative sides."""


class NoiseSpec(Change):
    """Gaussian noise."""

    std: Annotated[float, Field(ge=0)] | None = None
    """The largest standard deviation, in the units of the preprocessed image."""


class ColorSpec(Change):
    """Changes of saturation and hue, for images with three channels."""

    saturation: Annotated[float, Field(ge=0, le=1)] | None = None
    """The largest relative change of saturation."""
    hue: Degrees | None = None
    """The largest change of hue, in degrees."""


class MirrorSpec(Change):
    """Mirroring; ``probability`` is that of each axis."""

    axes: tuple[Annotated[int, Field(ge=0, le=2)], ...] | None = None
    """The spatial axes that may be mirrored, 0 for the first; all by default."""


class AugmentationSpec(Table):
    """Random changes of training samples, drawn anew in every epoch; evaluation uses no changes.

    The changes are applied in the order of the keys. ``polyclinic data look STUDY`` shows samples.
    """

    recipe: Literal["none", "light", "nnunet", "picture"] = "none"
    """The changes to begin with: none; small rotations, scalings and intensity changes; nnU-Net's list; or that for
    color pictures (crops, quarter turns, color, mirroring)."""
    crop: CropSpec | None = None
    rotation: RotationSpec | None = None
    scaling: RangeSpec | None = None
    quarter_turns: Change | None = None
    noise: NoiseSpec | None = None
    blur: ChannelSpec | None = None
    brightness: RangeSpec | None = None
    contrast: RangeSpec | None = None
    low_resolution: ChannelSpec | None = None
    gamma_inverted: RangeSpec | None = None
    gamma: RangeSpec | None = None
    color: ColorSpec | None = None
    mirror: MirrorSpec | None = None
    border: bool | None = None
    """Whether values outside of the image are those of its nearest voxel instead of 0; by default the recipe's."""

    own: tuple[str, ...] | None = None
    """Augmentations of installed packages, which are applied last."""

    UNSET: ClassVar[frozenset[str]] = frozenset({"own"})

    @model_validator(mode="after")
    def _possible(self) -> "AugmentationSpec":
        known = extensions.names("augmentations")
        if unknown := [name for name in self.own or () if name not in known]:
            there = ", ".join(known) or "none"
            raise ConfigError(
                f'no installed package provides an augmentation called "{unknown[0]}".{nearest(unknown[0], known)} '
                f"There are {there}"
            )
        augmentation_of(self._given())
        return self

    def expanded(self) -> dict[str, Any]:
        """Return every change with all its values, for a plan."""
        return augmentation_of(self._given()).to_table()

    def _given(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True, include={"recipe", "border", "own", *TRANSFORMS})
