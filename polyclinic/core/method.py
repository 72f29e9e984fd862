"""Interface of a federated method: server requests, site updates and server updates."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply
from polyclinic.core.job_enumeration import Job as Job
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees

State = TypeVar("State")
Layer = TypeVar("Layer")


@savable("core.Request", 1)
@dataclass(frozen=True)
class Request:
    """A request of the server to its sites.

    Attributes:
        round: Number of rounds that the server had completed when it made the request. A round may take several
            requests.
        trees: Trees for every recipient.
        job: The method's job to execute.
        per_site: Trees for one site only, by site name.
        secure: Whether the server may see only the sum of the replies.
        recipients: The sites to ask, if the method chooses them; else None, and the driver samples them.
    """

    round: int
    trees: Trees
    job: str = "train"
    per_site: Mapping[str, Trees] = field(default_factory=dict)
    secure: bool = False
    recipients: tuple[str, ...] | None = None

    def for_site(self, site: str) -> "Request":
        """Return the request as ``site`` receives it: the common trees and its own."""
        return replace(self, trees={**self.trees, **self.per_site.get(site, {})}, per_site={})

    def nbytes(self, site: str) -> int:
        """Return the size in bytes of the tensors sent to ``site``."""
        return sum(tree.nbytes(t) for t in self.for_site(site).trees.values())


@dataclass(frozen=True)
class Capabilities:
    """What a method declares to the code that runs it.

    Attributes:
        needs_each_reply: Whether the server needs the reply of each site, so that their sum does not suffice.
        uniform: Whether all sites have equal weight.
        recipients: The fewest sites that a request goes to, if the method chooses them; None if it goes to all.
        discount: The weight of a reply by its age, in steps of the server; None if age does not matter.
        minibatches: The number of minibatches that a round takes of a site's training data, for jobs that are requested
            once per minibatch.
    """

    needs_each_reply: bool = False
    uniform: bool = True
    recipients: int | None = None
    discount: Callable[[int], float] | None = None
    minibatches: Callable[[Any], int] | None = None


def together(first: Capabilities, second: Capabilities) -> Capabilities:
    """Return what a method declares that runs one method before another; all that is not listed is of ``second``."""
    counts = [one.recipients for one in (first, second) if one.recipients is not None]
    return replace(
        second,
        needs_each_reply=first.needs_each_reply or second.needs_each_reply,
        uniform=first.uniform and second.uniform,
        recipients=min(counts, default=None),
    )


class Method(ABC, Generic[State]):
    """A federated method: hyperparameters are fields, everything else is passed as arguments.

    The functions are pure. They do not modify their arguments, keep nothing between calls, and draw random numbers only
    from the given site. A method can therefore be copied, hashed, logged, sent to a worker, and resumed from its saved
    state with bit-identical results.

    ``State`` is a ``NamedTuple`` or frozen dataclass marked ``@savable``. Its server model, if there is one, is named
    ``params``.
    """

    @abstractmethod
    def init(self, params: Tree) -> State:
        """Return the initial server state for the initial model ``params``."""

    @abstractmethod
    def request(self, state: State) -> Request | None:
        """Return the next request, or None if the method has finished."""

    @abstractmethod
    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        """Execute ``request.job`` at ``site``.

        Args:
            request: The request as this site received it.
            memory: The site state after this site's last job; empty at first. It never leaves the site.
            site: The site that executes the job.

        Returns:
            The reply, which the server receives merged over sites; and the new site state.
        """

    @abstractmethod
    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        """Return the server state after the merged ``reply``."""

    @property
    def jobs(self) -> tuple[Job, ...]:
        """All requests that the method makes of a site, by job, rounds and count. A site refuses all others."""
        return (Job("train"),)

    @property
    def capabilities(self) -> Capabilities:
        """What the method declares to the code that runs it."""
        return Capabilities()

    @property
    def wrapped(self) -> tuple["Method[Any]", ...]:
        """The methods that this one runs; empty unless it is built from others."""
        return ()

    def site_model(self, request: Request, memory: Trees) -> Tree:
        """Return the model with which a site predicts. Personalized methods override this."""
        return request.trees["params"]

    def adapted_model(self, request: Request, memory: Trees, site: Site, role: str) -> Tree:
        """Return the model with which ``site`` predicts for its data of ``role``.

        It is ``site_model``, unless the method adapts it to the inputs of a site that never trained. Targets must not
        be used.
        """
        return self.site_model(request, memory)

    def kept_at_sites(self, name: str) -> bool:
        """Return whether leaf ``name`` of ``site_model`` is each site's own, so that the server has no trained one."""
        return False

    def shared_model(self, state: State) -> Tree:
        """Return the trained leaves that the server has of the model with which sites predict, for a file."""
        model = self.site_model(self.evaluation_request(state), {})
        return tree.select(model, lambda name: not self.kept_at_sites(name))

    @property
    def prediction_task(self) -> Any:
        """The task whose model ``site_model`` returns, if it differs from the study's; else None."""
        return None

    def evaluation_request(self, state: State) -> Request:
        """Return the request with which the state is evaluated: the next one or, after the last, the final model.

        Its round is the number of completed rounds. A method that finishes needs a state with ``round`` and ``params``,
        or overrides this.
        """
        request = self.request(state)
        return Request(state.round, {"params": state.params}) if request is None else request  # type: ignore[attr-defined]


class MethodWrapper(Method[State]):
    """A method that changes another one, its field ``inner``, and delegates to it whatever it does not override.

    A wrapper with a state of its own overrides the functions that take or return a state.
    """

    inner: Method[Any]

    @property
    def wrapped(self) -> tuple[Method[Any], ...]:
        """The inner method."""
        return (self.inner,)

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The jobs of the inner method."""
        return self.inner.jobs

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities of the inner method."""
        return self.inner.capabilities

    @property
    def prediction_task(self) -> Any:
        """The prediction task of the inner method."""
        return self.inner.prediction_task

    def init(self, params: Tree) -> State:
        """Return the inner method's initial state."""
        state: State = self.inner.init(params)
        return state

    def request(self, state: State) -> Request | None:
        """Return the inner method's request."""
        return self.inner.request(state)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        """Run the inner method's site update."""
        return self.inner.site_update(request, memory, site)

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        """Run the inner method's server update."""
        updated: State = self.inner.server_update(state, reply, server)
        return updated

    def site_model(self, request: Request, memory: Trees) -> Tree:
        """Return the inner method's site model."""
        return self.inner.site_model(request, memory)

    def kept_at_sites(self, name: str) -> bool:
        """Return whether the inner method's sites have their own leaf ``name``."""
        return self.inner.kept_at_sites(name)

    def adapted_model(self, request: Request, memory: Trees, site: Site, role: str) -> Tree:
        """Return the inner method's adapted model; ``site_model`` if the wrapper has another model for a site."""
        if type(self).site_model is not MethodWrapper.site_model:
            return self.site_model(request, memory)
        return self.inner.adapted_model(request, memory, site, role)

    def evaluation_request(self, state: State) -> Request:
        """Return the inner method's evaluation request."""
        return self.inner.evaluation_request(state)


def layers(method: Method[Any]) -> Iterator[Method[Any]]:
    """Yield ``method`` and all methods that it is built from, from the outermost inwards."""
    yield method
    for inner in method.wrapped:
        yield from layers(inner)


def unwrap(method: Method[Any], kind: type[Layer]) -> Layer | None:
    """Return the outermost layer of ``method`` that is a ``kind``; None if there is none."""
    return next((layer for layer in layers(method) if isinstance(layer, kind)), None)
