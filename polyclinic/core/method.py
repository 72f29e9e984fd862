"""The one interface: what the server asks, what a site does, what the server makes of it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply
from polyclinic.core.job_enumeration import Job as Job
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees

State = TypeVar("State")


@savable("core.Request", 1)
@dataclass(frozen=True)
class Request:
    """What the server asks of the sites next.

    Attributes:
        round: How many rounds the server had completed when it asked. A round may take several asks.
        trees: What every asked site receives.
        job: Which of the method's jobs to do.
        per_site: What only one site receives, by site name.
        secure: Whether the server may see only the sum of the replies.
        recipients: Whom to ask, where the method chooses; else the driver's cohort.
    """

    round: int
    trees: Trees
    job: str = "train"
    per_site: Mapping[str, Trees] = field(default_factory=dict)
    secure: bool = False
    recipients: tuple[str, ...] | None = None

    def for_site(self, site: str) -> "Request":
        """The ask as ``site`` receives it: what is for all, and what is for it alone."""
        return replace(self, trees={**self.trees, **self.per_site.get(site, {})}, per_site={})

    def nbytes(self, site: str) -> int:
        """The bytes of the tensors that travel to ``site``."""
        return sum(tree.nbytes(t) for t in self.for_site(site).trees.values())


class Method(ABC, Generic[State]):
    """A federated method: hyper-parameters as fields, everything else as arguments.

    The functions are pure. They change none of their arguments, keep nothing between calls, and draw
    randomness only from the site they are given. So a method can be copied, hashed, logged, sent to a worker,
    and resumed from its saved state, to the bit.

    ``State`` is a ``NamedTuple`` or frozen dataclass marked ``@savable``; where a server model exists it is
    called ``params``.
    """

    @abstractmethod
    def init(self, params: Tree) -> State:
        """The server's state before the first ask, from the model's first ``params``."""

    @abstractmethod
    def request(self, state: State) -> Request | None:
        """What to ask next, or None when the method has finished."""

    @abstractmethod
    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        """Does ``request.job`` at ``site``.

        Args:
            request: What the server asked, as this site received it.
            memory: What this site kept from its last job; empty at first. It never leaves the site.
            site: Where this runs.

        Returns:
            What the server will receive, merged over sites; and what the site keeps.
        """

    @abstractmethod
    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        """The server's state after the merged ``reply``."""

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Every request that the method makes of a site, by job, rounds and count. A site answers nothing else."""
        return (Job("train"),)

    def site_model(self, request: Request, memory: Trees) -> Tree:
        """The model with which a site predicts. Personal methods override this."""
        return request.trees["params"]

    @property
    def prediction_task(self) -> Any:
        """The task whose model ``model_at`` fills, where it is another than the study's; else None."""
        return None

    def evaluation_request(self, state: State) -> Request:
        """The ask under which the state is evaluated: the next one, or, when finished, the final model.

        Its round is the number of rounds that are complete. A method that finishes has a state with ``round``, or
        overrides this.
        """
        request = self.request(state)
        return Request(state.round, {"params": state.params}) if request is None else request  # type: ignore[attr-defined]
