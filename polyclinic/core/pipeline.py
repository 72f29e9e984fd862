"""Uplink pipelines: transforms of replies between a site and the server.

As in optax, a transform is small, pure and explicit about its state, and a pipeline is a chain of transforms. Encoding
runs from left to right at the site, decoding from right to left at the server. A method with a pipeline is again a
method. All parts of a reply pass as one, so that the privacy budget is not spent separately for each part.

Additive encodings are decoded once, on their sum. Other encodings (8-bit codes, factors, a support that each site
chooses) are sent as ``Packed``: separately, each with its weight. The server decodes them one by one in name order and
then sums them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply, WeightedMean, merge
from polyclinic.core.method import Capabilities, Method, MethodWrapper, Request, layers
from polyclinic.core.reply_packing import above, below, escaped, join, scaled, split
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError

SUMMED = 3
"""The fewest sites whose replies a secure sum adds."""


@dataclass(frozen=True)
class Transform:
    """A transform of a site's replies, and its inverse at the server. The identity by default.

    Attributes:
        uniform: Whether all sites must have equal weight, as privacy requires.
        secure: Whether the server may see only sums of the output.
        dense: Whether the output keeps the names, shapes and positions of the input.
        private: Whether it clips or adds noise, and therefore needs the values before they are packed.
    """

    uniform: ClassVar[bool] = False
    secure: ClassVar[bool] = False
    dense: ClassVar[bool] = True
    private: ClassVar[bool] = False

    @property
    def additive(self) -> bool:
        """Whether encoded replies can be summed and decoded on their sum."""
        return True

    def resolve(self, after: tuple["Transform", ...]) -> "Transform":
        """Return this transform with its open options decided in view of the transforms ``after`` it."""
        return self

    def validate(self, before: tuple["Transform", ...], after: tuple["Transform", ...]) -> list[str]:
        """Return the problems with the position between ``before`` and ``after``, each with a remedy."""
        return []

    def init(self, params: Tree) -> Trees:
        """Return the initial server state of the transform."""
        return {}

    def describe(self, state: Trees) -> Trees:
        """Return the notes that sites need from the server state to encode. Later transforms also receive them."""
        return {}

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """Encode ``sent`` at a site; return the result and the new site state. ``memory`` belongs to this transform."""
        return sent, memory

    def decode(self, received: WeightedMean, state: Trees) -> tuple[WeightedMean, Trees]:
        """Decode ``received`` at the server; return the result and the new server state of the transform.

        An additive transform receives the sum over sites; any other receives one site's value, with weight 1.

        Raises:
            ValueError: If ``encode`` cannot have produced ``received``.
        """
        return received, state


@savable("core.PackedPerSite", 1)
@dataclass(frozen=True)
class Packed(PerSite):
    """Encoded means that are not additive, separate by site until the server decodes them.

    Attributes:
        weights: The weight of each site's mean, by site name.
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
    """The state of the method and of each transform."""

    inner: Any
    transforms: tuple[Trees, ...]

    @property
    def params(self) -> Tree:
        """The method's server model."""
        params: Tree = self.inner.params
        return params


class UnsuitableTransforms(ConfigError):
    """Transforms that do not go together, or not with the method. The message lists every reason."""


@dataclass(frozen=True)
class UplinkPipeline(MethodWrapper[SentState]):
    """A method whose replies reach the server only through ``transforms``.

    Raises:
        ValueError: If they are not compatible. The message lists every reason.
    """

    inner: Method[Any]
    transforms: tuple[Transform, ...]

    def __post_init__(self) -> None:
        if problems := list(_problems(self.inner, self.transforms)):
            raise UnsuitableTransforms("; ".join(problems))

    @property
    def capabilities(self) -> Capabilities:
        """Those of the method. The server needs each reply to decode it, if one of the transforms is not additive."""
        inner = self.inner.capabilities
        return replace(inner, needs_each_reply=inner.needs_each_reply or self.cut < len(self.transforms))

    @property
    def cut(self) -> int:
        """Number of transforms, from the left, that can be decoded on a sum."""
        return _cut(self.transforms)

    def init(self, params: Tree) -> SentState:
        """Return the initial states of the method and of each transform."""
        return SentState(self.inner.init(params), tuple(dict(t.init(params)) for t in self.transforms))

    def request(self, state: SentState) -> Request | None:
        """Return the method's request with the transforms' notes."""
        request = self.inner.request(state.inner)
        return None if request is None else self._noted(request, state)

    def evaluation_request(self, state: SentState) -> Request:
        """Return the method's evaluation request with the transforms' notes."""
        return self._noted(self.inner.evaluation_request(state.inner), state)

    def site_model(self, request: Request, memory: Trees) -> Tree:
        """Return the method's site model."""
        return self.inner.site_model(self._bare(request), below("inner", memory))

    def adapted_model(self, request: Request, memory: Trees, site: Site, role: str) -> Tree:
        """Return the method's model for the inputs of ``role``."""
        return self.inner.adapted_model(self._bare(request), below("inner", memory), site, role)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        """Run the method's site update, then each transform's ``encode`` from left to right."""
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
            # Only transforms that write notes receive them, whatever the server sends.
            if type(transform).describe is not Transform.describe:
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
        """Run each transform's ``decode`` from right to left, then the method's server update.

        Raises:
            ValueError: If a site's reply cannot be decoded. The message names the site.
        """
        if not reply.parts:
            return SentState(self.inner.server_update(state.inner, reply, server), state.transforms)
        states, gathered = list(state.transforms), Reply()
        received = reply.parts["sent"]
        if isinstance(received, Packed):
            merged = merge(self._open(received, states))  # updates `states`; holds one site's reply at a time
            received = merged.mean("")
            gathered = Reply({part: stat for part, stat in merged.parts.items() if part})
        if not isinstance(received, WeightedMean):
            raise ConfigError("a pipeline's reply is a WeightedMean or Packed: was it merged with another method's?")
        for i in reversed(range(self.cut)):
            received, states[i] = self.transforms[i].decode(received, states[i])
        inner = self.inner.server_update(state.inner, split(received) + gathered, server)
        return SentState(inner, tuple(states))

    def opened(self, state: SentState, reply: Reply) -> Reply:
        """Decode one site's reply as far as possible before merging. The part ``""`` contains the values to be summed.

        An engine can therefore reject an invalid reply before it enters the sum. An additive reply stays unchanged.

        Raises:
            ValueError: If it cannot be decoded or holds a non-finite number. The message names the site.
        """
        if not isinstance(received := reply.parts.get("sent"), Packed):
            return reply
        return merge(self._open(received, list(state.transforms)))

    def _open(self, received: Packed, states: list[Trees]) -> Iterator[Reply]:
        """Yield each site's decoded reply in name order: the sum as part ``""``, and the per-site parts.

        A transform that is decoded site by site receives the same state each time; the last resulting state is stored
        in ``states``.
        """
        before = tuple(states)
        for name in sorted(received.items):
            one, weight = WeightedMean(received.items[name], 1.0), received.weights.get(name, math.nan)
            try:
                if not 0 < weight < math.inf:
                    raise ConfigError(f"its weight is {weight}, which is not a positive finite number")
                for i in reversed(range(self.cut, len(self.transforms))):
                    one, states[i] = self.transforms[i].decode(one, before[i])
                if not tree.finite(one.total):
                    raise ConfigError("it contains numbers that are not finite")
            except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
                raise ConfigError(f"the reply of site {name!r} cannot be decoded: {error}") from error
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
        """Return the request as the method made it, without the transforms' notes."""
        trees = {k: t for k, t in request.trees.items() if not k.startswith("~") or k.startswith("~~")}
        return replace(request, trees={k.removeprefix("~"): t for k, t in trees.items()})

    def _check(self, reply: Reply) -> None:
        separate = any(isinstance(stat, PerSite) for stat in reply.parts.values())
        if separate and (problems := list(_sums_alone(self.transforms))):
            raise UnsuitableTransforms("; ".join(problems))


def send_through(inner: Method[Any], *transforms: Transform) -> UplinkPipeline:
    """Wrap ``inner`` so that all replies of its sites pass through ``transforms``, in order.

    Raises:
        ValueError: If they are not compatible. The message lists every reason.
    """
    return UplinkPipeline(inner, tuple(t.resolve(transforms[i + 1 :]) for i, t in enumerate(transforms)))


def transforms_of(method: Method[Any]) -> tuple[Transform, ...]:
    """Return the transforms that replies pass, at every level of ``method``, from the innermost outwards."""
    found: tuple[Transform, ...] = ()
    for layer in layers(method):
        if isinstance(layer, UplinkPipeline):
            found = (*layer.transforms, *found)
    return found


def _problems(inner: Method[Any], transforms: tuple[Transform, ...]) -> Iterator[str]:
    names = [type(t).__name__ for t in transforms]
    secure = [n for n, t in zip(names, transforms, strict=True) if t.secure]
    packing = [n for n, t in zip(names, transforms, strict=True) if not t.additive]
    uniform = [n for n, t in zip(names, transforms, strict=True) if t.uniform]
    if secure and packing:
        yield (
            f"{secure[0]} reveals only sums to the server, and the output of {packing[0]} cannot be summed: "
            f"remove {packing[0]}, or use TopK or PowerSGD with shared=True"
        )
    (*_, innermost) = layers(inner)
    declared = inner.capabilities
    if declared.needs_each_reply:
        yield from _sums_alone(transforms)
    elif secure and declared.recipients is not None and declared.recipients < SUMMED:
        yield (
            f"some requests of this method go to {declared.recipients} of the sites, and {secure[0]} sums the replies "
            f"of at least {SUMMED}: remove {secure[0]} from the uplink, or choose another method"
        )
    if uniform and not declared.uniform:
        remedy = f"remove {uniform[0]} from the uplink, or choose another method"
        if getattr(innermost, "uniform", True) is False:
            remedy = f"set uniform = true, or write {type(innermost).__name__}(..., uniform=True)"
        yield f"{uniform[0]} needs equal site weights, because the number of examples of a site is private: {remedy}"
    for i, t in enumerate(transforms):
        yield from t.validate(transforms[:i], transforms[i + 1 :])
        if t.private and (late := [type(b).__name__ for b in transforms[:i] if not b.additive]):
            yield f"{names[i]} must come before {late[0]}: it protects the values, not their encoding"


def _cut(transforms: tuple[Transform, ...]) -> int:
    """Return the number of transforms, from the left, that can be decoded on a sum."""
    return next((i for i, t in enumerate(transforms) if not t.additive), len(transforms))


def _sums_alone(transforms: tuple[Transform, ...]) -> Iterator[str]:
    """Yield why replies that stay separate by site cannot pass ``transforms``."""
    for i, t in enumerate(transforms):
        name, why = type(t).__name__, ""
        if t.secure:
            why = "reveals only sums to the server"
        elif i < _cut(transforms) and type(t).decode is not Transform.decode:
            why = "is decoded on a sum"
        if why:
            yield (
                f"this method needs each site's reply, and {name} {why}: remove {name} from the uplink, or choose a "
                "method that needs sums alone"
            )


def _without(key: str, trees: Trees) -> dict[str, Tree]:
    return {name: t for name, t in trees.items() if not name.startswith(f"{key}/")}
