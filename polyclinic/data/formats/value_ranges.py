"""Comparison of the values of pictures in one data set: whether the same brightness has the same number in all of them.

The loader and ``data check`` both decide with ``scale_problems``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from polyclinic.data.formats.volume import Volume

SIXTEEN_BITS = 65535.0
FEW_BITS = 2**14


@dataclass(frozen=True)
class ValueRange:
    """Stored values of one image.

    Attributes:
        id: Name of the example.
        picture: Whether it is a picture rather than a volume with units.
        full_scale: The value that is scaled to 1; None if values are kept.
        low: Smallest value.
        high: Largest value.
    """

    id: str
    picture: bool
    full_scale: float | None
    low: float
    high: float

    @classmethod
    def of(cls, name: str, image: Volume) -> "ValueRange":
        """Return the range of ``image`` as it was read."""
        low, high = (float(value) for value in image.array.aminmax())
        return cls(name, not image.positioned and not image.measured, image.full_scale, low, high)


def scale_problems(ranges: Sequence[ValueRange]) -> list[str]:
    """Return why values are not comparable: real numbers among whole ones, or few bits of 16 among 8-bit pictures."""
    whole = [r for r in ranges if r.full_scale is not None]
    wide = [r for r in ranges if r.full_scale is None and r.picture and not (r.low >= 0 and r.high <= 1)]
    problems = []
    if whole and wide:
        low, high = min(r.low for r in wide), max(r.high for r in wide)
        problems.append(
            f"{len(wide)} pictures of signed or real numbers (from {low:.4g} to {high:.4g}, as {wide[0].id}) are among "
            f"{len(whole)} pictures of whole numbers, which are scaled to 0 to 1: save all with one type, or add "
            '{step = "percentiles"} or {step = "zscore"}'
        )
    deep = [r for r in whole if r.full_scale == SIXTEEN_BITS]
    highest = max((r.high for r in deep), default=SIXTEEN_BITS)
    if len(deep) < len(whole) and 0 < highest < FEW_BITS:
        problems.append(
            f"{len(deep)} pictures of 16 bits (as {deep[0].id}) do not exceed {highest:.0f} and are among "
            f"{len(whole) - len(deep)} of other depths: if only some of their bits are used, set bits = "
            f"{max(9, math.ceil(math.log2(highest + 1)))}"
        )
    return problems
