"""Supervisor of a site with its notifications: ``python -m polyclinic.engines.flare.site_keeper HOME``."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from polyclinic.engines.flare.client import site_setup
from polyclinic.engines.flare.client.agent_status import Conditions
from polyclinic.engines.flare.protocol.paths import SetupError, SiteFolder
from polyclinic.engines.notifications import Notifier

log = logging.getLogger(__name__)


def run(home: SiteFolder) -> None:
    """Keep the site in ``home`` running until SIGTERM or Ctrl-C.

    Raises:
        SetupError: If the site has not joined, or is running already.
    """
    site_setup.run(home, notify=notifications_of(home))


def notifications_of(home: SiteFolder) -> Callable[[], None]:
    """Return a function that sends the notifications that are due at the site in ``home``."""
    conditions, notifier, problem = Conditions(home), Notifier(home.path), [""]

    def look() -> None:
        try:
            notifier.look(conditions.now())
        except (SetupError, OSError) as error:  # a file that cannot be read now must not end the site
            log.warning("no notifications: %s", error)
        if notifier.problem not in ("", problem[0]):
            print(notifier.problem, file=sys.stderr, flush=True)
        problem[0] = notifier.problem

    return look


if __name__ == "__main__":
    run(SiteFolder(Path(sys.argv[1])))
