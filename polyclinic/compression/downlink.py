"""Downlink compression: the server's requests are encoded by codecs and decoded at each site.

The server keeps its full-precision model. The model that sites receive is rounded in every round, so errors do not
accumulate and no error feedback is needed: a site trains from the rounded model, and sends its change relative to it.
Only the model itself (``params``) is encoded with loss; everything else is sent losslessly. Codecs use no random
numbers, so the same message always has the same encoding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, unquote

import torch

from polyclinic.compression.quantization import BFloat16, Codec, Int8
from polyclinic.compression.zstd import Zstd
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Method, MethodWrapper, Request
from polyclinic.core.pipeline import Transform
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ProtocolError

MODEL = ("params",)
ALL, OWN = "received", "received-own"


@dataclass(frozen=True)
class DownlinkPipeline(MethodWrapper[Any]):
    """A method whose requests reach the sites through ``codecs``: ``BFloat16`` or ``Int8``, ``Zstd``, or both.

    Attributes:
        inner: The inner method.
        codecs: The codecs in encoding order.
        numbers: Size of the model, which limits the memory that a small message can make a site allocate.

    Raises:
        ValueError: If they are not compatible. The message lists every reason.
    """

    inner: Method[Any]
    codecs: tuple[Transform, ...]
    numbers: int

    def __post_init__(self) -> None:
        problems = [
            f"{type(t).__name__} cannot compress requests: use BFloat16, Int8 or Zstd"
            for t in self.codecs
            if not isinstance(t, BFloat16 | Int8 | Zstd)
        ]
        problems += [] if self.codecs else ["no downlink codec is given"]
        for i, t in enumerate(self.codecs):
            problems += t.validate(self.codecs[:i], self.codecs[i + 1 :])
        if sum(isinstance(t, Codec) for t in self.codecs) > 1:
            problems.append("numbers can be quantized once: remove BFloat16 or Int8")
        if problems:
            raise ProtocolError("; ".join(problems))
        parts = tuple(replace(t, parts=MODEL) if isinstance(t, Codec) else t for t in self.codecs)
        object.__setattr__(self, "codecs", parts)

    def request(self, state: Any) -> Request | None:
        """Return the method's request, encoded."""
        request = self.inner.request(state)
        return None if request is None else self._smaller(request)

    def evaluation_request(self, state: Any) -> Request:
        """Return the method's evaluation request, encoded, so that the model that sites have is evaluated."""
        return self._smaller(self.inner.evaluation_request(state))

    def site_model(self, request: Request, memory: Trees) -> Tree:
        """Return the method's site model for the decoded request."""
        return self.inner.site_model(self.arrived(request), memory)

    def adapted_model(self, request: Request, memory: Trees, site: Site, role: str) -> Tree:
        """Return the method's model for the decoded request and the inputs of ``role``."""
        return self.inner.adapted_model(self.arrived(request), memory, site, role)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        """Run the method's site update on the decoded request."""
        return self.inner.site_update(self.arrived(request), memory, site)

    def arrived(self, request: Request) -> Request:
        """Return the method's request as decoded at a site.

        Raises:
            ValueError: If it cannot be decoded, or would decompress to far more than the model.
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
        """Encode all trees with leaves as one tree; empty trees are unchanged."""
        flat = {f"m/{quote(part, safe='~')}/{leaf}": x for part, t in trees.items() for leaf, x in t.items()}
        sent = WeightedMean(flat, 1.0)
        for transform in self.codecs if flat else ():
            sent, _ = transform.encode(sent, {}, {}, Site("~server"), round)
        return {**{part: t for part, t in trees.items() if not t}, **({name: sent.total} if flat else {})}

    def _larger(self, packed: Tree) -> dict[str, Tree]:
        model, sent = {"model": torch.empty(self.numbers, device="meta")}, WeightedMean(packed, 1.0)
        for transform in reversed(self.codecs):
            sent, _ = transform.decode(sent, transform.init(model))
        decoded: dict[str, dict[str, torch.Tensor]] = {}
        for key, x in sent.total.items():
            kind, _, rest = key.partition("/")
            part, slash, leaf = rest.partition("/")
            if kind != "m" or not slash:
                raise ProtocolError(f"{key!r} is not a valid name in an encoded request")
            decoded.setdefault(unquote(part), {})[leaf] = x
        return dict(decoded)


def received_through(inner: Method[Any], params: Tree, *transforms: Transform) -> DownlinkPipeline:
    """Wrap ``inner``, whose model is ``params``, so that its requests pass through ``transforms``, in order.

    Raises:
        ValueError: If they are not compatible. The message lists every reason.
    """
    return DownlinkPipeline(inner, transforms, sum(leaf.numel() for leaf in params.values()))
