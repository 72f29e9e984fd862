"""The course of methods in which each site trains once and sends one message, which the server merges."""

from dataclasses import dataclass

from polyclinic.core.method import Request
from polyclinic.core.tree import Tree
from polyclinic.methods.base.site_weights import SizeWeighted
from polyclinic.methods.optimization.fedavg import State


@dataclass(frozen=True)
class OneMessage(SizeWeighted[State]):
    """A method of one round: sites train from the common model, and the method is finished after the merge."""

    def init(self, params: Tree) -> State:
        return State(0, params)

    def request(self, state: State) -> Request | None:
        return None if state.round else Request(0, {"params": state.params})

    def evaluation_request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})
