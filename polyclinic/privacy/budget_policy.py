"""A site's policy for privacy: nothing leaves that was not paid for."""

from typing import Any

from polyclinic.core.aggregates import Reply
from polyclinic.core.audit_log import Broken
from polyclinic.core.execution import Refused
from polyclinic.core.metering import Spend, metered
from polyclinic.core.method import Method, Request
from polyclinic.core.site import Site
from polyclinic.learning.tasks.task_evaluation import Evaluated
from polyclinic.privacy.ledger import Exhausted, Ledger

SCORES = ("score/val", "score/test")


class Budget:
    """Pays from a ledger for every reply, before it leaves.

    It does not ask a method what it claims. What ran at this site told the meter what noise it added; a reply whose job
    spent nothing is refused, with every part named. That a job which did spend sends nothing else is what the release
    audit shows of the method beforehand (``engines.policy.coverage``).
    """

    def __init__(self, ledger: Ledger, free: tuple[str, ...] = SCORES) -> None:
        """Pays from ``ledger``.

        Args:
            ledger: The budget.
            free: Evaluation jobs, by their whole names, whose replies are allowed without payment. They show counts and
                scores. An empty tuple refuses these, too.
        """
        self.ledger, self.free = ledger, free
        self._counting: Any = None
        self._spent: list[Spend] = []

    def admit(self, method: Method[Any], request: Request, site: Site) -> None:
        """Begins to count."""
        self._stop()
        self._counting = metered()
        self._spent = self._counting.__enter__()

    def release(self, method: Method[Any], request: Request, reply: Reply, site: Site) -> None:
        """Pays for what was counted, before the reply leaves.

        Raises:
            Refused: If nothing was counted, or the budget is used up.
        """
        spent = self._spent
        self._stop()
        if not reply.parts or (not spent and self._is_free(method, request, reply)):
            return
        if not spent:
            raise Refused(
                f"this site releases only what noise protects, and the job {request.job!r} added none: train "
                "with DPSGD, or send the method through Clip and Gaussian. What would have left: "
                f"{', '.join(sorted(reply.parts))}"
            )
        try:
            self.ledger.reserve(spent, {"round": request.round, "job": request.job})
        except (Exhausted, Broken) as reason:
            raise Refused(str(reason)) from reason

    def _is_free(self, method: Method[Any], request: Request, reply: Reply) -> bool:
        """Whether this is an evaluation, by who answers and with what, and not by the name of a job alone."""
        return request.job in self.free and _evaluates(method) and set(reply.parts) == {request.job.partition("/")[0]}

    def _stop(self) -> None:
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
        self._counting = None


def _evaluates(method: Any) -> bool:
    """Whether evaluation jobs are answered by the library's own evaluation: a method could answer with anything."""
    while method is not None:
        if isinstance(method, Evaluated):
            return True
        method = getattr(method, "inner", None)
    return False
