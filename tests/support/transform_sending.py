"""A method that sends what a test tells it to, and what comes of sending it through transforms."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from polyclinic.core import serialization as saved
from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.execution import execute
from polyclinic.core.method import Method, Request
from polyclinic.core.pipeline import Transform, send_through
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees

Values = Callable[[str, int], Tree]


@savable("tests.SentSum", 1)
class Sum(NamedTuple):
    round: int
    params: Tree
    last: Tree
    weight: float


@dataclass(frozen=True)
class Told(Method[Sum]):
    """Sends ``values(site, round)``; the server keeps the last mean, and the sum of all means as ``params``."""

    values: Values
    weights: Mapping[str, float]
    uniform: bool = True
    part: str = "update"

    def init(self, params: Tree) -> Sum:
        return Sum(0, params, params, 0.0)

    def request(self, state: Sum) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        return Reply(
            {self.part: WeightedMean.of(self.values(site.name, request.round), self.weights.get(site.name, 1.0))}
        ), memory

    def server_update(self, state: Sum, reply: Reply, server: Site) -> Sum:
        mean = reply.mean(self.part)
        return Sum(state.round + 1, tree.add(state.params, mean.value), mean.value, mean.weight)


class Ran(NamedTuple):
    total: Tree
    last: Tree
    weight: float
    replies: list[dict[str, Reply]]
    memory: dict[str, Trees]
    states: list[Any]


def fake_entropy(seed: int) -> Callable[[int], bytes]:
    """Predictable noise, for tests that repeat."""
    rng = torch.Generator().manual_seed(seed)
    return lambda n: bytes(torch.randint(0, 256, (n,), generator=rng, dtype=torch.uint8).numpy())


def add(replies: list[Reply]) -> Reply:
    """The plain sum."""
    return list(itertools.accumulate(replies))[-1]


def run(
    values: Values,
    *transforms: Transform,
    sites: tuple[str, ...] = ("a", "b", "c"),
    rounds: int = 1,
    weights: Mapping[str, float] | None = None,
    merge: Callable[[dict[str, Reply]], Reply] = lambda replies: add(list(replies.values())),
    uniform: bool = True,
    part: str = "update",
) -> Ran:
    method = send_through(Told(values, weights or {}, uniform, part), *transforms)
    state = method.init(tree.zeros(values(sites[0], 0)))
    memory: dict[str, Trees] = {name: {} for name in sites}
    sent, states = [], []
    for _ in range(rounds):
        request, replies = method.request(state), {}
        for i, name in enumerate(sites):
            site = Site(name, entropy=fake_entropy(1000 * state.inner.round + i))
            replies[name], memory[name] = execute(method, saved.decode(saved.encode(request)), memory[name], site)
            replies[name] = saved.decode(saved.encode(replies[name]))  # everything travels, and can be saved
        state = method.server_update(state, merge(replies), Site("server"))
        state = saved.decode(saved.encode(state))
        sent.append(replies)
        states.append(state)
    return Ran(state.inner.params, state.inner.last, state.inner.weight, sent, memory, states)


def random_values(seed: int = 0, scale: float = 1.0) -> Values:
    """A small model's tensors, different for each site and round."""

    def values(site: str, round: int) -> Tree:
        rng = Site(site, seed=seed).rng(round)
        shapes = {"conv.weight": (6, 4, 3, 3), "conv.bias": (6,), "fc.weight": (3, 24), "one": (1,), "scalar": ()}
        return {name: torch.randn(shape, generator=rng) * scale for name, shape in shapes.items()}

    return values


def constant(values: Values) -> Values:
    """The same in every round."""
    return lambda site, round: values(site, 0)


def close(a: Tree, b: Tree, tolerance: float = 1e-5) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=tolerance, rtol=tolerance) for k in a)
