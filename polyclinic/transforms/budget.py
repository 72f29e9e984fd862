"""A site's policy for privacy: nothing leaves that was not paid for."""

from typing import Any

from polyclinic.core.execute import Refused
from polyclinic.core.journal import Broken
from polyclinic.core.method import Ask, Method
from polyclinic.core.site import Site
from polyclinic.core.stats import Reply
from polyclinic.tasks.dpsgd import Spend, metered
from polyclinic.transforms.ledger import Exhausted, Ledger


class Budget:
    """Pays from a ledger for every reply, before it leaves.

    It does not ask a method what it claims. What ran at this site told the meter what noise it added; a reply for
    which nothing was spent is refused.
    """

    def __init__(self, ledger: Ledger, free: tuple[str, ...] = ("score",)) -> None:
        """Pays from ``ledger``.

        Args:
            ledger: The budget.
            free: Jobs whose replies are allowed without payment: evaluation, which shows counts and scores. An empty
                tuple refuses these, too.
        """
        self.ledger, self.free = ledger, free
        self._counting: Any = None
        self._spent: list[Spend] = []

    def admit(self, method: Method[Any], ask: Ask, site: Site) -> None:
        """Begins to count."""
        self._stop()
        self._counting = metered()
        self._spent = self._counting.__enter__()

    def release(self, method: Method[Any], ask: Ask, reply: Reply, site: Site) -> None:
        """Pays for what was counted, before the reply leaves.

        Raises:
            Refused: Where nothing was counted, or the budget is used up.
        """
        spent = self._spent
        self._stop()
        if not reply.parts or (not spent and ask.job.partition("/")[0] in self.free):
            return
        if not spent:
            raise Refused(f"this site releases only what noise protects, and the job {ask.job!r} added none: train "
                          "with DPSGD, or send the method through Clip and Gaussian")  # fmt: skip
        try:
            self.ledger.reserve(spent, {"round": ask.round, "job": ask.job})
        except (Exhausted, Broken) as reason:
            raise Refused(str(reason)) from reason

    def _stop(self) -> None:
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
        self._counting = None
