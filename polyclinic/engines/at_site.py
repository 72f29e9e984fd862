"""Doing one ask at one site, the same way in every engine: timed, on one thread, and never raising."""

import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from polyclinic.core.execute import Policy, Refused, execute
from polyclinic.core.method import Ask, Method
from polyclinic.core.site import Site
from polyclinic.core.stats import Reply
from polyclinic.core.tree import Trees

log = logging.getLogger(__name__)


class Done(NamedTuple):
    """What came of one ask at one site. Without a reply, ``lost`` says why, and the memory is as it was."""

    reply: Reply | None
    memory: Trees
    lost: str
    seconds: float


def work(method: Method[Any], ask: Ask, memory: Trees, site: Site, policy: Policy | None = None) -> Done:
    """Does ``ask`` at ``site``. Whatever goes wrong there is a reason, not an exception."""
    begun = time.perf_counter()
    try:
        with one_thread():
            reply, kept = execute(method, ask, memory, site, policy)
        return Done(reply, kept, "", time.perf_counter() - begun)
    except Refused as refusal:
        reason = f"refused: {refusal}"
    except Exception as error:
        log.debug("%s failed", site.name, exc_info=True)
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"failed: {type(error).__name__}: {error} ({where.filename.rpartition('/')[2]}:{where.lineno})"
    return Done(None, memory, reason, time.perf_counter() - begun)


@contextmanager
def one_thread() -> Iterator[None]:
    """Computes on one thread, so that sums come in one order: the same bits on every engine and machine size."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
