"""Numbers of images that pairs of sites share, found without showing images or their hashes.

Private set intersection after Meadows (IEEE S&P 1986) and Huberman, Franklin and Hogg (ACM EC 1999), with a server
between the sites; see ``blinded_points``. Every site i draws a secret scalar kᵢ for this run alone.

1. ``blind``: site i sends kᵢ·P(x) for the label of each of its images x, in random order, among random points.
2. ``compare``: the server sends site i the points of every other site j, and receives kᵢ·kⱼ·P(y), in random order. It
   counts the values that it received from i about j and from j about i.

The server learns how many points each site sent, and how many labels each pair of sites shares; not which, as long as
it follows the protocol and no site gives it a scalar. A site learns nothing of another one. The protocol does not
protect against guesses: a party that puts labels of known images in place of a site's own learns how many of them
another site has. ``most`` limits the number of guesses, and the scalar is deleted after one comparison, so that a site
answers once in a run.

Nothing is trained: the model is returned as it was.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.job_enumeration import once
from polyclinic.core.method import Capabilities, Job, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.image_labels import coarse_label, exact_label
from polyclinic.learning.tasks.task import Task
from polyclinic.methods.statistics.blinded_points import (
    LENGTH,
    InvalidPoints,
    blinded,
    point_of,
    points_of,
    tensor_of,
)

PART = "duplicates"
"""Part of the replies, which a site's policy must allow to leave (``allow.gather``)."""
EXACT, NEAR = "exact", "near"
KINDS = (EXACT, NEAR)
IMAGE_AXES = 3
PADDED_TO = 64
"""Lists have a multiple of this length, so that they do not tell the exact number of images."""


@runtime_checkable
class Whole(Protocol):
    """Data of which an index may yield a part of an image."""

    def image(self, i: int) -> torch.Tensor:
        """Return the whole input of example ``i``."""


@savable("duplicate-search.State", 1)
class State(NamedTuple):
    """The model, which does not change; the sites' points until they are compared; then the counts."""

    round: int
    params: Tree
    points: Mapping[str, Tree]
    shared: Mapping[str, Tree]
    """By kind: the number of labels that two sites share, by their names ``"a/b"`` in order; -1 if not compared."""


@dataclass(frozen=True)
class DuplicateSearch(Method[State]):
    """Count equal and nearly equal images of every pair of sites by private set intersection.

    Attributes:
        task: The task. It is not used; a study names one.
        sites: The sites that are compared. A site refuses points in the name of any other.
        near: Whether nearly equal images are also counted, by a coarse label that they usually share.
        most: Largest number of images of one site. It also limits the guesses of a hostile site or server.
    """

    task: Task
    sites: tuple[str, ...]
    near: bool = True
    most: int = 100_000

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ConfigError(f"most = {self.most}: give a number of images above 0")

    def init(self, params: Tree) -> State:
        return State(0, params, {}, {})

    @property
    def jobs(self) -> tuple[Job, ...]:
        return once("blind", static=False), once("compare", static=False)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(needs_each_reply=True)

    def request(self, state: State) -> Request | None:
        if state.shared:
            return None
        if not state.points:
            return Request(0, {}, "blind")
        per_site: dict[str, Trees] = {}
        for site in state.points:
            others = {name: lists for name, lists in state.points.items() if name != site}
            leaves = {f"{kind}/{name}": leaf for name, lists in others.items() for kind, leaf in lists.items()}
            per_site[site] = {"others": leaves}
        return Request(0, {}, "compare", per_site, recipients=tuple(state.points))

    def evaluation_request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        if request.job == "blind":
            scalar = site.entropy(LENGTH)
            lists = {kind: self._own_points(kind, scalar, site) for kind in self.kinds}
            kept = {"blinding": {"scalar": torch.frombuffer(bytearray(scalar), dtype=torch.uint8)}}
            return Reply({PART: PerSite({site.name: lists})}), kept
        if "blinding" not in memory:
            raise InvalidPoints("this site has no scalar: it compares points once in a run, after it sent its own")
        scalar, doubled = bytes(memory["blinding"]["scalar"].numpy()), {}
        for name, leaf in request.trees["others"].items():
            kind, _, other = name.partition("/")
            if kind not in self.kinds or other not in self.sites or other == site.name:
                raise InvalidPoints("the server sent a list of points that is not of another site of the study")
            doubled[name] = tensor_of(blinded(points_of(leaf, self._longest), scalar))
        return Reply({PART: PerSite({site.name: doubled})}), {}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        replies = reply.gather(PART)
        if not state.points:
            points = {site: lists for site, lists in replies.items() if self._sound(lists)}
            if len(points) > 1:
                return state._replace(points=points)
            replies = {}  # no two sites can be compared
        shared: dict[str, dict[str, Any]] = {kind: {} for kind in self.kinds}
        for one, other in combinations(sorted(self.sites), 2):
            for kind in self.kinds:
                lists = replies.get(one, {}).get(f"{kind}/{other}"), replies.get(other, {}).get(f"{kind}/{one}")
                shared[kind][f"{one}/{other}"] = torch.tensor([_common(*lists)])
        return State(1, state.params, {}, shared)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of labels that are compared."""
        return KINDS if self.near else (EXACT,)

    @property
    def _longest(self) -> int:
        """Largest number of points in a list: ``most``, and the random points that fill it up."""
        return -(-self.most // PADDED_TO) * PADDED_TO

    def _own_points(self, kind: str, scalar: bytes, site: Site) -> torch.Tensor:
        """Return the blinded points of a site's images, filled up with random points to a multiple of 64."""
        labels = set(_labels(kind, site))
        if len(labels) > self.most:
            raise InvalidPoints(f"there are {len(labels)} images here, and most = {self.most} are compared")
        points = [point_of(kind.encode() + label) for label in labels]
        points += [point_of(site.entropy(LENGTH)) for _ in range(-len(points) % PADDED_TO)]
        return tensor_of(blinded(points, scalar))

    def _sound(self, lists: Tree) -> bool:
        """Return whether a site's points can be sent to others; a site whose points cannot is not compared."""
        try:
            for leaf in lists.values():
                points_of(leaf, self._longest)
        except InvalidPoints:
            return False
        return set(lists) == {*self.kinds}


def _common(theirs: torch.Tensor | None, ours: torch.Tensor | None) -> int:
    """Return the number of equal rows; -1 if a site did not answer, or not with points."""
    if theirs is None or ours is None or {theirs.shape[1:], ours.shape[1:]} != {(LENGTH,)}:
        return -1
    return len({bytes(row) for row in theirs.numpy()} & {bytes(row) for row in ours.numpy()})


def _labels(kind: str, site: Site) -> Iterator[bytes]:
    """Yield the label of each image of a site, whatever its role. Rows of a table have no coarse label."""
    for role, data in site.data.items():
        if role == "public":  # all sites have the same
            continue
        for i in range(len(data)):
            image = data.image(i) if isinstance(data, Whole) else data[torch.tensor([i])][0][0]
            label = exact_label(image) if kind == EXACT else coarse_label(image) if image.ndim >= IMAGE_AXES else None
            if label is not None:
                yield label


def shared_by(state: State, kind: str) -> dict[tuple[str, str], int | None]:
    """Return the number of labels of a kind that two sites share, by their names; None if they were not compared."""
    counts: dict[tuple[str, str], int | None] = {}
    for names, count in state.shared.get(kind, {}).items():
        one, _, other = names.partition("/")
        counts[one, other] = int(count) if int(count) >= 0 else None
    return counts
