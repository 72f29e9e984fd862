"""Pairs of images and masks by their file names: ``a.tif`` and ``a_mask.tif``, in one folder or in parallel folders."""

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from polyclinic.data.files import stem_of

_MASK = re.compile(
    r"(?i)[_\-. ]?(?<![a-z])(ground[_-]?truth|segmentations?|masks?|labels?|annotations?|lesion|seg|gt)(?![a-z])"
)
_IMAGE = re.compile(r"(?i)[_\-. ]?(?<![a-z])(images?|imaging|imgs?|scans?|pictures?|raw)(?![a-z])")
_SEPARATORS = "_-. "


@dataclass(frozen=True)
class Named:
    """One example: the files of its image, one per channel, its mask, and the part of the name that they share."""

    images: tuple[str, ...]
    mask: str
    core: str

    @property
    def depth(self) -> int:
        """Number of folders above the first image."""
        return len(Path(self.images[0]).parts) - 1

    def patterns(self, levels: Mapping[int, str]) -> tuple[tuple[str, ...], str] | None:
        """Return the patterns of the images and of the mask: ``{case}`` is what they share, levels are fields.

        Returns None if nothing in the patterns would tell examples apart.
        """
        folders = Path(self.images[0]).parts[:-1]
        known = {folders[i]: f"{{{level}}}" for i, level in levels.items()}

        def pattern(file: str, head: Sequence[str]) -> str:
            name = Path(file).name
            return "/".join([*head, name.replace(self.core, "{case}", 1) if self.core else name])

        head = [known[part] if i in levels else part for i, part in enumerate(folders)]
        tail = [known.get(part, part) for part in Path(self.mask).parts[:-1]]
        found = tuple(pattern(image, head) for image in self.images), pattern(self.mask, tail)
        return found if self.core or levels else None


def is_mask(name: str) -> bool:
    """Return whether a path contains a word for masks."""
    return _MASK.search(_stem(name)) is not None


def named_pairs(names: Sequence[str]) -> list[Named]:
    """Return the examples that have a mask by their names, in the way that fits most masks.

    Names are compared without the words for images and masks: as whole paths, by file name alone (in folders of unlike
    names), or by the beginning of the name, which the channels of an image share (``a_t1``, ``a_t2`` and ``a_seg``).
    """
    masks, images = [n for n in names if is_mask(n)], [n for n in names if not is_mask(n)]
    ways = (_alike(masks, images, _stem), _alike(masks, images, lambda name: Path(_stem(name)).name))
    best = max(ways, key=len)
    channels = _channels(masks, images)
    return channels if len(channels) > len(best) else best


def _alike(masks: Sequence[str], images: Sequence[str], part: Callable[[str], str]) -> list[Named]:
    """Return pairs of one image and one mask whose ``part`` of the name is equal."""
    drawn, seen = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for mask in masks:
        drawn[_IMAGE.sub("", _MASK.sub("", part(mask)))].append(mask)
    for image in images:
        seen[_IMAGE.sub("", part(image))].append(image)
    found = []
    for key, own in seen.items():
        if len(own) == len(drawn.get(key, ())) == 1:
            core = _IMAGE.sub("", Path(_stem(own[0])).name).strip(_SEPARATORS)
            if core in Path(own[0]).name and core in Path(drawn[key][0]).name:
                found.append(Named((own[0],), drawn[key][0], core))
    return found


def _channels(masks: Sequence[str], images: Sequence[str]) -> list[Named]:
    """Return masks whose name is the beginning of the names of several images in the same folder, alike for all."""
    ordered = sorted(images)
    groups: dict[str, tuple[str, tuple[str, ...]]] = {}
    for mask in masks:
        core = _MASK.sub("", _stem(mask))
        own = []
        for image in ordered[bisect_left(ordered, core) :]:
            if not image.startswith(core):
                break
            if _stem(image)[len(core) : len(core) + 1] in [*_SEPARATORS] and Path(image).parent == Path(mask).parent:
                own.append(image)
        groups[mask] = core, tuple(own)
    endings = {mask: tuple(image[len(core) :] for image in own) for mask, (core, own) in groups.items() if own}
    if not endings:
        return []
    usual = Counter(endings.values()).most_common(1)[0][0]
    return [Named(groups[m][1], m, Path(groups[m][0]).name) for m, ends in endings.items() if ends == usual]


def _stem(name: str) -> str:
    path = Path(name)
    return (path.parent / stem_of(path)).as_posix()
