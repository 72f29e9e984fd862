"""Privacy policy of a site: every reply is charged to a privacy budget before it leaves."""

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
    """Charges a ledger for every reply before it leaves.

    The charge does not depend on declarations of the method. Code at this site meters the noise that it adds; a reply
    whose job spent nothing is refused, with its parts named. The release audit shows beforehand that a job with noise
    sends nothing else (``engines.policy.coverage``).
    """

    def __init__(self, ledger: Ledger, free: tuple[str, ...] = SCORES) -> None:
        """Charge replies to ``ledger``.

        Args:
            ledger: The ledger of the budget.
            free: Evaluation jobs, by their full names, whose replies are allowed without a charge. These contain counts
                and scores. An empty tuple refuses them, too.
        """
        self.ledger, self.free = ledger, free
        self._counting: Any = None
        self._spent: list[Spend] = []

    def admit(self, method: Method[Any], request: Request, site: Site) -> None:
        """Start metering."""
        self._stop()
        self._counting = metered()
        self._spent = self._counting.__enter__()

    def release(self, method: Method[Any], request: Request, reply: Reply, site: Site) -> None:
        """Charge the metered spending before the reply is sent.

        Raises:
            Refused: If nothing was metered, or the budget is exhausted.
        """
        spent = self._spent
        self._stop()
        if not reply.parts or (not spent and self._is_free(method, request, reply)):
            return
        if not spent:
            raise Refused(
                f"this site releases only values protected by noise, and the job {request.job!r} added none: train "
                "with DPSGD, or send the method through Clip and Gaussian. The reply contains "
                f"{', '.join(sorted(reply.parts))}"
            )
        try:
            self.ledger.reserve(spent, {"round": request.round, "job": request.job})
        except (Exhausted, Broken) as reason:
            raise Refused(str(reason)) from reason

    def _is_free(self, method: Method[Any], request: Request, reply: Reply) -> bool:
        """Return whether this is an evaluation, by the answering class and its parts, not by the job name alone."""
        # An exact type: a subclass, or a wrapper around it, could answer the evaluation job with anything.
        evaluated = type(method) is Evaluated and set(reply.parts) == {request.job.partition("/")[0]}
        return evaluated and request.job in self.free

    def _stop(self) -> None:
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
        self._counting = None
