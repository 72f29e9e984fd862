"""Pipelines: what happens to a reply between the site that makes it and the server that uses it.

In the manner of optax, a transform is small, pure and explicit about its state, and a pipeline is a chain of
them. Encoding runs left to right at the site; decoding, right to left at the server. A method sent through a
pipeline is again a method. All parts of a reply pass as one, so that privacy is never spent part by part.

Encoded replies either add up, and are decoded once, on their sum; or they do not (8-bit codes, factors, a
support of each site's own), and then they travel as ``Packed``: apart, each with its weight, decoded one by one
in name order, and only then summed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply, WeightedMean, merge
from polyclinic.core.method import Job, Method, Request
from polyclinic.core.reply_packing import above, below, escaped, join, scaled, split
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError


@dataclass(frozen=True)
class Transform:
    """One change to what leaves a site, and its undoing at the server. The identity, by default.

    Attributes:
        uniform: Whether every site must count the same, as for privacy.
        secure: Whether the server may see only sums of what this sends.
        dense: Whether what is sent keeps the names, the shapes and the places of what came in.
        private: Whether this bounds or hides what is sent, so that it must see the numbers themselves, before packing.
    """

    uniform: ClassVar[bool] = False
    secure: ClassVar[bool] = False
    dense: ClassVar[bool] = True
    private: ClassVar[bool] = False

    @property
    def additive(self) -> bool:
        """Whether encoded replies still add up, so that they can be decoded on their sum."""
        return True

    def resolve(self, after: tuple["Transform", ...]) -> "Transform":
        """This transform with whatever was left open decided, in view of what comes ``after`` it."""
        return self

    def validate(self, before: tuple["Transform", ...], after: tuple["Transform", ...]) -> list[str]:
        """What is wrong with standing between ``before`` and ``after``, in sentences that say what to do."""
        return []

    def init(self, params: Tree) -> Trees:
        """The server's state."""
        return {}

    def describe(self, state: Trees) -> Trees:
        """What the sites must know of the server's state to encode. Later transforms see them too."""
        return {}

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """At a site: what to send instead of ``sent``, and what to keep. ``memory`` is this transform's alone."""
        return sent, memory

    def decode(self, received: WeightedMean, state: Trees) -> tuple[WeightedMean, Trees]:
        """At the server: what to use instead of what was ``received``, and the state after it.

        An additive transform receives the sum over sites; any other, what one site sent, with weight 1.

        Raises:
            ValueError: Where this cannot be what ``encode`` sends.
        """
        return received, state


@savable("core.PackedPerSite", 1)
@dataclass(frozen=True)
class Packed(PerSite):
    """Encoded means that do not add up, kept apart by site until the server has decoded them.

    Attributes:
        weights: The weight of each site's mean, by its name.
    """

    weights: dict[str, float]

    def __add__(self, other: PerSite) -> "Packed":
        if not isinstance(other, Packed):
            raise TypeError("an encoded reply cannot be merged with one that is not encoded")
        items = PerSite(self.items) + PerSite(other.items)
        return Packed(items.items, {**self.weights, **other.weights})

    def __mul__(self, by: float) -> "Packed":
        return Packed(self.items, {name: weight * by for name, weight in self.weights.items()})


@savable("core.PipelineState", 1)
class SentState(NamedTuple):
    """The method's state and each transform's."""

    inner: Any
    transforms: tuple[Trees, ...]

    @property
    def params(self) -> Tree:
        """The method's server model."""
        params: Tree = self.inner.params
        return params


@dataclass(frozen=True)
class UplinkPipeline(Method[SentState]):
    """A method whose replies pass through ``transforms``, and in no other way to the server.

    Raises:
        ValueError: Where these do not go together; the message lists every reason.
    """

    inner: Method[Any]
    transforms: tuple[Transform, ...]

    def __post_init__(self) -> None:
        if problems := list(_problems(self.inner, self.transforms)):
            raise ConfigError("; ".join(problems))

    @property
    def cut(self) -> int:
        """How many transforms, from the left, can be decoded on a sum."""
        return next((i for i, t in enumerate(self.transforms) if not t.additive), len(self.transforms))

    @property
    def prediction_task(self) -> Any:
        """The method's."""
        return self.inner.prediction_task

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The inner method's."""
        return self.inner.jobs

    def init(self, params: Tree) -> SentState:
        """The method's state, and each transform's."""
        return SentState(self.inner.init(params), tuple(dict(t.init(params)) for t in self.transforms))

    def request(self, state: SentState) -> Request | None:
        """What the method asks, with the transforms' notes."""
        request = self.inner.request(state.inner)
        return None if request is None else self._noted(request, state)

    def evaluation_request(self, state: SentState) -> Request:
        """The method's, with the transforms' notes."""
        return self._noted(self.inner.evaluation_request(state.inner), state)

    def site_model(self, request: Request, memory: Trees) -> Tree:
        """The method's."""
        return self.inner.site_model(self._bare(request), below("inner", memory))

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        """What the method does, and then each transform's ``encode``, from left to right."""
        reply, inner = self.inner.site_update(self._bare(request), below("inner", memory), site)
        kept = {**_without("inner", memory), **above("inner", inner)}
        if not reply.parts:
            return reply, kept
        sent = join(reply, site.name, uniform=any(t.uniform for t in self.transforms))
        notes: dict[str, Tree] = {}
        apart = self.cut < len(self.transforms) or any(isinstance(s, PerSite) for s in reply.parts.values())
        self._check(reply)
        for i, transform in enumerate(self.transforms):
            if i == self.cut:
                sent = WeightedMean(scaled(sent.total, 1 / sent.weight), sent.weight)
            if (
                type(transform).describe is not Transform.describe
            ):  # only who writes notes has any, whatever the server sends
                notes |= below(f"~{i}", request.trees)
            key = f"sent/{request.job}/{i}"
            sent, own = transform.encode(sent, notes, below(key, memory), site, request.round)
            kept = {**_without(key, kept), **above(key, own)}
        if not apart:
            return Reply({"sent": sent}), kept
        if self.cut == len(self.transforms):
            sent = WeightedMean(scaled(sent.total, 1 / sent.weight), sent.weight)
        return Reply({"sent": Packed({site.name: sent.total}, {site.name: sent.weight})}), kept

    def server_update(self, state: SentState, reply: Reply, server: Site) -> SentState:
        """Each transform's ``decode``, from right to left, and then what the method does.

        Raises:
            ValueError: Where what a site sent cannot be decoded. The message names the site.
        """
        if not reply.parts:
            return SentState(self.inner.server_update(state.inner, reply, server), state.transforms)
        states, gathered = list(state.transforms), Reply()
        received = reply.parts["sent"]
        if isinstance(received, Packed):
            merged = merge(self._open(received, states))  # changes states; one site is held at a time
            received = merged.mean("")
            gathered = Reply({part: stat for part, stat in merged.parts.items() if part})
        if not isinstance(received, WeightedMean):
            raise ConfigError("a pipeline's reply is a Mean or Packed: was it merged with another method's?")
        for i in reversed(range(self.cut)):
            received, states[i] = self.transforms[i].decode(received, states[i])
        inner = self.inner.server_update(state.inner, split(received) + gathered, server)
        return SentState(inner, tuple(states))

    def opened(self, state: SentState, reply: Reply) -> Reply:
        """What one site's reply decodes to, as far as that can be done before merging: sums are the part ``""``.

        So an engine can refuse what is spoiled before it spoils the sum. A reply that adds up is given back as it is.

        Raises:
            ValueError: Where it cannot be decoded, or holds a number that is not finite. The message names the site.
        """
        if not isinstance(received := reply.parts.get("sent"), Packed):
            return reply
        return merge(self._open(received, list(state.transforms)))

    def _open(self, received: Packed, states: list[Trees]) -> Iterator[Reply]:
        """What each site sent, in name order: what adds up as the part ``""``, and what is kept apart as it was.

        A transform that is decoded site by site sees the same state each time; of what it makes of it the last is
        put into ``states``.
        """
        before = tuple(states)
        for name in sorted(received.items):
            one, weight = WeightedMean(received.items[name], 1.0), received.weights.get(name, math.nan)
            try:
                if not 0 < weight < math.inf:
                    raise ConfigError(f"it claims to weigh {weight}")
                for i in reversed(range(self.cut, len(self.transforms))):
                    one, states[i] = self.transforms[i].decode(one, before[i])
                if not tree.finite(one.total):
                    raise ConfigError("it holds numbers that are not finite")
            except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
                raise ConfigError(f"what site {name!r} sent cannot be decoded: {error}") from error
            sums = {leaf: x * weight for leaf, x in one.total.items() if not leaf.startswith("g/")}
            apart: dict[str, dict[str, torch.Tensor]] = {}
            for leaf in sorted(one.total.keys() - sums.keys()):
                _, part, rest = leaf.split("/", 2)
                apart.setdefault(part, {}).update({rest: one.total[leaf]} if rest else {})
            yield Reply(
                {"": WeightedMean(sums, weight)} | {part: PerSite({name: leaves}) for part, leaves in apart.items()}
            )

    def _noted(self, request: Request, state: SentState) -> Request:
        notes: dict[str, Tree] = {}
        for i, (transform, own) in enumerate(zip(self.transforms, state.transforms, strict=True)):
            notes |= above(f"~{i}", transform.describe(own))
        each = {site: escaped(trees) for site, trees in request.per_site.items()}
        secure = request.secure or any(t.secure for t in self.transforms)
        return replace(request, trees={**escaped(request.trees), **notes}, per_site=each, secure=secure)

    def _bare(self, request: Request) -> Request:
        """The ask as the method made it."""
        trees = {k: t for k, t in request.trees.items() if not k.startswith("~") or k.startswith("~~")}
        return replace(request, trees={k.removeprefix("~"): t for k, t in trees.items()})

    def _check(self, reply: Reply) -> None:
        if not any(isinstance(stat, PerSite) for stat in reply.parts.values()):
            return
        if any(t.secure for t in self.transforms):
            raise ConfigError(
                "this method must see what each site sent, and secure summation shows only sums: leave one of them out"
            )
        for t in self.transforms[: self.cut]:
            if type(t).decode is not Transform.decode:
                raise ConfigError(
                    f"{type(t).__name__} is decoded on a sum, and this method needs what each site sent: "
                    "leave one of them out"
                )


def send_through(inner: Method[Any], *transforms: Transform) -> UplinkPipeline:
    """``inner``, with everything its sites send passed through ``transforms``, in order.

    Raises:
        ValueError: Where these do not go together; the message lists every reason.
    """
    return UplinkPipeline(inner, tuple(t.resolve(transforms[i + 1 :]) for i, t in enumerate(transforms)))


def _problems(inner: Method[Any], transforms: tuple[Transform, ...]) -> Iterator[str]:
    names = [type(t).__name__ for t in transforms]
    secure = [n for n, t in zip(names, transforms, strict=True) if t.secure]
    packing = [n for n, t in zip(names, transforms, strict=True) if not t.additive]
    uniform = [n for n, t in zip(names, transforms, strict=True) if t.uniform]
    if secure and packing:
        yield (
            f"{secure[0]} shows the server only sums, and what {packing[0]} sends does not add up: "
            f"leave {packing[0]} out, or use TopK or PowerSGD with shared=True"
        )
    if secure and getattr(inner, "gathers", False):
        yield f"{type(inner).__name__} must see what each site sent, and {secure[0]} shows only sums: leave one out"
    if uniform and getattr(inner, "uniform", True) is False:
        yield (
            f"{uniform[0]} needs every site to count the same, for how many examples a site has is private too: "
            f"write {type(inner).__name__}(..., uniform=True)"
        )
    for i, t in enumerate(transforms):
        yield from t.validate(transforms[:i], transforms[i + 1 :])
        if t.private and (late := [type(b).__name__ for b in transforms[:i] if not b.additive]):
            yield f"{names[i]} must come before {late[0]}: it protects the numbers themselves, not their encoding"


def _without(key: str, trees: Trees) -> dict[str, Tree]:
    return {name: t for name, t in trees.items() if not name.startswith(f"{key}/")}
