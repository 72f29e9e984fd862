"""Checks of the contracts of methods, transforms and engines, in the manner of scikit-learn's check_estimator.

Use them on your own: ``check_method(MyMethod(task), task.first(), sites)`` raises ``Broken`` with the promise that was
not kept, or returns nothing.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch

from polyclinic.core import serialization as states
from polyclinic.core.aggregates import PerSite, Reply, merge
from polyclinic.core.method import Method, Request
from polyclinic.core.pipeline import Transform, send_through
from polyclinic.core.rounds import Federation, train
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.engines.site_runtime import minibatches, work
from polyclinic.learning.networks.architectures import Architecture
from polyclinic.learning.networks.model_tree import load, params_of, trainable
from polyclinic.learning.tasks.own_metrics import OwnMetric


class Broken(AssertionError):
    """A promise that was not kept. The message says which."""


def check_method(
    method: Method[Any],
    params: Tree,
    sites: Mapping[str, Site],
    rounds: int = 2,
    entropy: bool = True,
    server: Site = Site("server"),
) -> None:
    """Raises unless ``method`` is pure, deterministic, portable and independent of the order of arrival.

    Args:
        params: The model's first parameters, as ``task.first()`` gives them.
        sites: At least two, small.
        rounds: How many rounds to follow.
        entropy: Whether to replace the sites' secret dice by fixed ones, so that noise can be compared too.
        server: The site on which the server's half runs, with the server's own data, if any.
    """
    if entropy:
        sites = {name: replace(site, entropy=_fixed) for name, site in sites.items()}
    _promise(is_dataclass(method) and method.__dataclass_params__.frozen, "a method is a frozen dataclass")  # type: ignore[attr-defined]
    _promise(_same(copy.deepcopy(method), method), "a method is its fields: a copy equals it")
    given = copy.deepcopy(params)
    asked = Asked(method, sites)
    state, memory = method.init(params), dict[str, Trees]((name, {}) for name in sorted(sites))
    _promise(equal(params, given), "init changes none of its arguments")
    for _ in range(20 * rounds):
        request = method.request(state)
        if request is None or request.round >= rounds:
            break
        _promise(equal(request, method.request(state)), "ask depends on its state alone")
        replies: dict[str, Reply] = {}
        asked.note(request, method.evaluation_request(state))
        for name in sorted(request.recipients if request.recipients is not None else sites):
            replies[name], memory[name] = _check_site(method, request, memory[name], sites[name])
        state = _check_server(method, state, list(replies.values()), server)
        after = method.request(state)
        _promise(after is None or (after.round, after.job) >= (request.round, ""), "rounds never go back")
    else:
        raise Broken(f"ask.round must reach {rounds}: a round takes a bounded number of asks")
    trial = method.evaluation_request(state)
    _promise(trial.round == asked.complete(request), "trial has the round of the state: the number of complete rounds")
    for name in sorted(sites):
        model = method.site_model(trial.for_site(name), memory[name])
        _promise(len(model) > 0, "model_at gives a site the model it predicts with")


class Asked:
    """What a method has asked so far, checked against the schedule that it declares (``Method.jobs``)."""

    def __init__(self, method: Method[Any], sites: Mapping[str, Site]) -> None:
        """Nothing was asked of ``sites`` yet."""
        self.method, self.sites = method, sites
        self._counts = Counter[tuple[int, str, str]]()
        self._trial: Request | None = None
        self._last = -1

    def note(self, request: Request, trial: Request) -> None:
        """Notes an ask, and ``trial`` of the state that made it.

        Raises:
            Broken: If the method does not declare it, or it holds another model than the round began with.
        """
        if self._trial is None or request.round > self._last:
            self._trial = trial
        self._last = max(self._last, request.round)
        known = [job for job in self.method.jobs if job.name == request.job and job.comes_in(request.round)]
        here = f"{request.job!r} in round {request.round}"
        _promise(bool(known), f"jobs declares every ask: {here} is not among {self.method.jobs}")
        (job, *more) = known
        _promise(not more, f"jobs declares each ask once, and {here} more than once")
        for name in request.recipients if request.recipients is not None else self.sites:
            self._counts[request.round, request.job, name] += 1
            count, most = (
                self._counts[request.round, request.job, name],
                job.most(minibatches(self.method, self.sites[name])),
            )
            _promise(
                count <= most,
                f"{here} came {count} times at {name}, but jobs declares at most {most}",
            )
            _promise(
                not job.sites or name in job.sites, f"jobs declares the recipients: {request.job!r} is not for {name}"
            )
            if job.at_start and request.round:  # nothing is scored before the first round
                one, other = request.for_site(name).trees, self._trial.for_site(name).trees
                same = all(equal(one[key], other[key]) for key in one.keys() & other.keys())
                _promise(same, f"{here} holds the model that the round begins with, or has at_start=False")

    def complete(self, request: Request | None) -> int:
        """Return the number of complete rounds if ``request`` is the next request of the method."""
        return self._last + 1 if request is None else request.round


def _check_site(method: Method[Any], request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
    given = copy.deepcopy((request, memory))
    first = work(method, request, memory, site)
    if first.reply is None:
        raise Broken(f"site_update raises nothing on good data, but it raised: {first.lost}")
    _promise(equal(given, (request, memory)), "site_update changes none of its arguments")
    apart = [part for part, stat in first.reply.parts.items() if isinstance(stat, PerSite)]
    _promise(
        not apart or method.capabilities.needs_each_reply,
        f"capabilities declares needs_each_reply if a reply has parts that stay separate by site: {apart}",
    )
    same_ask, same_memory = portable_copy((request, memory))
    torch.randn(7)  # the global dice have moved on, which must not matter
    again = work(copy.deepcopy(method), same_ask, same_memory, site)
    _promise(equal((first.reply, first.memory), (again.reply, again.memory)), "site_update repeats itself to the bit")
    _promise(
        equal((first.reply, first.memory), portable_copy((first.reply, first.memory))),
        "what a site sends and keeps survives being saved",
    )
    return first.reply, first.memory


def _check_server(method: Method[Any], state: Any, replies: list[Reply], server: Site) -> Any:
    forth, back = merge(replies), merge(reversed(replies))
    _promise(close(forth, back), "replies merge in any order")
    before = copy.deepcopy((state, forth))
    after = method.server_update(state, forth, server)
    _promise(equal(before, (state, forth)), "server_update changes none of its arguments")
    _promise(equal(after, method.server_update(state, forth, server)), "server_update repeats itself to the bit")
    saved = portable_copy(after)
    _promise(equal(after, saved), "the server's state survives being saved")
    return saved


def check_network(architecture: Architecture, inputs: tuple[int, ...], outputs: int = 2, examples: int = 4) -> None:
    """Check that ``architecture`` builds networks that methods can train.

    Args:
        architecture: The architecture, as a package provides it.
        inputs: The shape of an example: (C, *spatial) or (F,).
        outputs: The number of outputs.
        examples: The size of a batch.

    Raises:
        Broken: If it does not. The message says which promise was not kept.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = architecture.build(inputs, outputs)
        torch.manual_seed(0)
        twin = architecture.build(inputs, outputs)
    names = list(params_of(model))
    _promise(equal(params_of(model), params_of(twin)), "one seed gives one network, and nothing else is random")
    for what, prefixes in (("head", architecture.head), ("encoder", architecture.encoder)):
        missing = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in names)]
        _promise(
            not missing, f"tensors of the {what} begin with {', '.join(missing)}; there are {', '.join(names[:5])}"
        )
    _promise(bool(architecture.head), "an architecture names its head")
    head = [name for name in names if name.startswith(architecture.head)]
    _promise(len(head) < len(names), "the head is not the whole network")
    x = torch.randn(examples, *inputs, generator=torch.Generator().manual_seed(1))
    model.eval()
    with torch.no_grad():
        first = model(x)
        _promise(isinstance(first, torch.Tensor), "the network returns its prediction, one tensor")
        shape = tuple(first.shape)
        _promise(shape[:2] == (examples, outputs), f"a prediction has the shape [b, outputs, ...], not {shape}")
        _promise(_same(first, model(x)), "in evaluation mode, predictions repeat themselves to the bit")
        _promise(close(first[:1], model(x[:1])), "in evaluation mode, examples do not affect each other")
        load(twin, params_of(model)).eval()
        _promise(_same(first, twin(x)), "the state of the network is in its tensors, which survive being sent")
    model.train()
    model(x).sum().backward()
    unused = [name for name, p in trainable(model).items() if p.grad is None]
    _promise(not unused, f"every parameter affects the prediction, and {', '.join(unused[:3])} does not")


def check_metric(metric: OwnMetric, predictions: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> None:
    """Check that ``metric`` is a function of a set of cases.

    Args:
        metric: The metric, as a package provides it.
        predictions: Predictions for which it is defined, as ``OwnMetric`` describes them.
        targets: Their targets.

    Raises:
        Broken: If it is not. The message says which promise was not kept.
    """
    _promise(isinstance(metric, OwnMetric), "a package provides an OwnMetric")
    given = predictions.copy(), targets.copy()
    value = metric.function(predictions, targets)
    kept = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(given, (predictions, targets), strict=True))
    _promise(kept, "a metric changes none of its arguments")
    _promise(np.ndim(value) == 0 and bool(np.isfinite(value)), f"the value is one number, not {value!r}")
    _promise(metric.function(*given) == value, "a metric repeats itself")
    back = metric.function(predictions[::-1].copy(), targets[::-1].copy())
    _promise(bool(np.isclose(back, value)), f"the order of cases has no effect: it is {value:g}, and {back:g} reversed")


def check_augmentation(
    augmentation: Callable[..., Any], inputs: tuple[int, ...], target: torch.Tensor | None = None
) -> None:
    """Check that ``augmentation`` returns another sample of the same form, which follows from its generator alone.

    Args:
        augmentation: The function of image, target and generator.
        inputs: The shape of an image, (C, *spatial).
        target: The target; by default class 1, as in classification. For segmentation a mask, int64 [*spatial].

    Raises:
        Broken: If it does not. The message says which promise was not kept.
    """
    image = torch.rand(inputs, generator=torch.Generator().manual_seed(1))
    target = torch.tensor(1) if target is None else target
    found = list[Any]()
    for seed in (0, 0):
        torch.randn(7)  # the global generators have moved on, which must not matter
        np.random.rand(7)
        found.append(augmentation(image.clone(), target.clone(), torch.Generator().manual_seed(seed)))
    first = found[0]
    _promise(isinstance(first, tuple | list) and len(first) == 2, "an augmentation returns image and target")
    forms = [(leaf.shape, leaf.dtype) for leaf in first]
    _promise(forms == [(leaf.shape, leaf.dtype) for leaf in (image, target)], "shapes and types remain as they are")
    _promise(bool(first[0].isfinite().all()), "the image has finite values")
    _promise(_same(tuple(first), tuple(found[1])), "random numbers come from the generator that it is given")


def check_transform(inner: Method[Any], *transforms: Transform, params: Tree, sites: Mapping[str, Site]) -> None:
    """Check that ``inner``, sent through ``transforms``, is a method that fulfills the contract."""
    check_method(send_through(inner, *transforms), params, sites)


def check_engine(
    engine: Callable[[Method[Any], Mapping[str, Site]], Federation],
    method: Method[Any],
    params: Tree,
    sites: Mapping[str, Site],
    rounds: int = 3,
    server_data: Mapping[str, Any] | None = None,
) -> None:
    """Raises unless ``engine`` gives ``method`` the same bits as the reference engine does with the same data."""
    from polyclinic.engines.local.in_process import InProcess

    sites = {name: replace(site, entropy=_fixed) for name, site in sites.items()}  # noise that can be compared

    def run(federation: Federation) -> Any:
        state = method.init(params)
        for step in train(method, federation, state, rounds=rounds):
            _promise(not step.lost, f"no site is lost: {dict(step.lost)}")
            state = step.state
        return state

    expected, reference = run(here := InProcess(method, sites, server_data=server_data)), here.memory
    there = engine(method, sites)
    _promise(equal(expected, run(there)), "an engine changes no bit of the server's state")
    memory = getattr(there, "memory", reference)
    _promise(equal(reference, memory), "an engine changes no bit of a site's memory")


def portable_copy(value: Any) -> Any:
    """``value`` after being written to bytes and read back."""
    return states.decode(states.encode(value))


def equal(a: Any, b: Any) -> bool:
    """Whether two nests of containers and tensors are identical, to the bit."""
    return _same(a, b)


def close(a: Any, b: Any) -> bool:
    """Whether two nests of containers and tensors agree up to rounding."""
    return _same(a, b, lambda x, y: torch.allclose(x.double(), y.double(), rtol=1e-4, atol=1e-6))


def _bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    same = x.dtype == y.dtype and torch.equal(x, y)
    return same or (
        x.dtype == y.dtype
        and x.is_floating_point()
        and torch.equal(x.nan_to_num(), y.nan_to_num())
        and torch.equal(x.isnan(), y.isnan())
    )


def _same(a: Any, b: Any, leaf: Callable[[torch.Tensor, torch.Tensor], bool] = _bits) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and leaf(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k], leaf) for k in a)
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(_same(x, y, leaf) for x, y in zip(a, b, strict=True))
    if is_dataclass(a) and not isinstance(a, type):
        return type(a) is type(b) and all(_same(getattr(a, f.name), getattr(b, f.name), leaf) for f in fields(a))
    return bool(a == b) or (isinstance(a, float) and isinstance(b, float) and abs(a - b) <= 1e-9 * max(abs(a), abs(b)))


def _promise(kept: bool, promise: str) -> None:
    if not kept:
        raise Broken(promise)


def _fixed(size: int) -> bytes:
    """Entropy that a test can repeat."""
    generator = torch.Generator().manual_seed(size)
    return bytes(torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8).tolist())
