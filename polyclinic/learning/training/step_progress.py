"""Progress within local training: how many minibatches of the current call of ``fit`` were taken.

Nothing is counted without a watcher, and watching changes no result.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Watch = Callable[[int, int], None]
_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched(by: Watch) -> Iterator[None]:
    """Call ``by`` with the number of minibatches that were taken and their total, before each and at the end."""
    token = _watch.set(by)
    try:
        yield
    finally:
        _watch.reset(token)


def counted(batches: Iterable[T], total: int) -> Iterator[T]:
    """Yield ``batches``, of which there are ``total``."""
    watch = _watch.get()
    if watch is None:
        yield from batches
        return
    done = 0
    for done, batch in enumerate(batches, start=1):
        watch(done - 1, total)
        yield batch
    watch(done, total)
