"""Smaller messages from the server: what it asks passes through codecs too, and each site undoes them.

The server keeps its model whole. What sites receive is rounded anew in every round, so errors do not add up and nobody
need remember any: a site trains from the rounded model, and tells the change from it. Only the model itself
(``params``) may lose something; whatever else a method sends travels whole. The same message gives the same bits
everywhere, for nothing random goes into it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, unquote

import torch

from polyclinic.compression.quantization import BFloat16, Codec, Int8
from polyclinic.compression.zstd import Zstd
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Job, Method, Request
from polyclinic.core.pipeline import Transform
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ProtocolError

MODEL = ("params",)
ALL, OWN = "received", "received-own"


@dataclass(frozen=True)
class DownlinkPipeline(Method[Any]):
    """A method whose asks reach the sites through ``codecs``: ``BFloat16`` or ``Int8``, ``Zstd``, or both.

    Attributes:
        inner: The method.
        codecs: In the order in which they encode.
        numbers: How many numbers the model has: a small message must not make a site reserve much more memory.

    Raises:
        ValueError: Where these do not go together; the message lists every reason.
    """

    inner: Method[Any]
    codecs: tuple[Transform, ...]
    numbers: int

    def __post_init__(self) -> None:
        found = [
            f"{type(t).__name__} cannot make smaller what sites receive: BFloat16, Int8 and Zstd can"
            for t in self.codecs
            if not isinstance(t, BFloat16 | Int8 | Zstd)
        ]
        found += [] if self.codecs else ["nothing is named that would make smaller what sites receive"]
        for i, t in enumerate(self.codecs):
            found += t.validate(self.codecs[:i], self.codecs[i + 1 :])
        if sum(isinstance(t, Codec) for t in self.codecs) > 1:
            found.append("numbers can be made smaller once: leave BFloat16 or Int8 out")
        if found:
            raise ProtocolError("; ".join(found))
        parts = tuple(replace(t, parts=MODEL) if isinstance(t, Codec) else t for t in self.codecs)
        object.__setattr__(self, "codecs", parts)

    @property
    def prediction_task(self) -> Any:
        """The method's."""
        return self.inner.prediction_task

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The inner method's."""
        return self.inner.jobs

    def init(self, params: Tree) -> Any:
        """The method's state: there is none besides."""
        return self.inner.init(params)

    def request(self, state: Any) -> Request | None:
        """What the method asks, smaller."""
        request = self.inner.request(state)
        return None if request is None else self._smaller(request)

    def evaluation_request(self, state: Any) -> Request:
        """The method's, smaller: what is judged is what sites have."""
        return self._smaller(self.inner.evaluation_request(state))

    def site_model(self, request: Request, memory: Trees) -> Tree:
        """The method's, from what arrived."""
        return self.inner.site_model(self.arrived(request), memory)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        """What the method does with what arrived."""
        return self.inner.site_update(self.arrived(request), memory, site)

    def server_update(self, state: Any, reply: Reply, server: Site) -> Any:
        """The method's."""
        return self.inner.server_update(state, reply, server)

    def arrived(self, request: Request) -> Request:
        """The ask as the method made it, rounded.

        Raises:
            ValueError: Where it cannot be decoded, or would unfold to far more than the model.
        """
        trees = {name: t for name, t in request.trees.items() if name not in (ALL, OWN)}
        for name in (ALL, OWN):
            if name in request.trees:
                trees |= self._larger(request.trees[name])
        return replace(request, trees=trees)

    def _smaller(self, request: Request) -> Request:
        each = {site: self._packed(trees, request.round, OWN) for site, trees in request.per_site.items()}
        return replace(request, trees=self._packed(request.trees, request.round, ALL), per_site=each)

    def _packed(self, trees: Mapping[str, Tree], round: int, name: str) -> dict[str, Tree]:
        """One tree of all that have leaves; those without stay as they are."""
        flat = {f"m/{quote(part, safe='~')}/{leaf}": x for part, t in trees.items() for leaf, x in t.items()}
        sent = WeightedMean(flat, 1.0)
        for transform in self.codecs if flat else ():
            sent, _ = transform.encode(sent, {}, {}, Site("~server"), round)
        return {**{part: t for part, t in trees.items() if not t}, **({name: sent.total} if flat else {})}

    def _larger(self, packed: Tree) -> dict[str, Tree]:
        model, sent = {"model": torch.empty(self.numbers, device="meta")}, WeightedMean(packed, 1.0)
        for transform in reversed(self.codecs):
            sent, _ = transform.decode(sent, transform.init(model))
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key, x in sent.total.items():
            kind, _, rest = key.partition("/")
            part, slash, leaf = rest.partition("/")
            if kind != "m" or not slash:
                raise ProtocolError(f"{key!r} is not what a server sends")
            found.setdefault(unquote(part), {})[leaf] = x
        return dict(found)


def received_through(inner: Method[Any], params: Tree, *transforms: Transform) -> DownlinkPipeline:
    """``inner``, with everything its sites receive passed through ``transforms``, in order; ``params`` is its model.

    Raises:
        ValueError: Where these do not go together; the message lists every reason.
    """
    return DownlinkPipeline(inner, transforms, sum(leaf.numel() for leaf in params.values()))
