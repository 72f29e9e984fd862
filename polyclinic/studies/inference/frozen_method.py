"""A trained model that is evaluated as it is, at sites that do not train."""

from dataclasses import dataclass
from typing import Any

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.tasks.task import Task


@savable("frozen.State", 1)
@dataclass(frozen=True)
class State:
    """State of the server: the model. It never changes."""

    params: Tree
    round: int = 0


@dataclass(frozen=True)
class Frozen(Method[State]):
    """Requests no training. Evaluation jobs use the model with which the method began.

    Attributes:
        task: The task.
    """

    task: Task

    def init(self, params: Tree) -> State:
        """Return the state with the model ``params``."""
        return State(params)

    def request(self, state: State) -> Request | None:
        """Return None: there are no rounds."""
        return None

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        """Return an empty reply."""
        return Reply(), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        """Return the unchanged state."""
        return state

    @property
    def prediction_task(self) -> Any:
        """The task."""
        return self.task
