"""Execution of one request at one site, identical in every engine: timed, reproducible, and without exceptions."""

import hashlib
import logging
import os
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils import deterministic

from polyclinic.core.aggregates import Reply
from polyclinic.core.execution import Policy, Refused, execute
from polyclinic.core.method import Method, Request
from polyclinic.core.serialization import bytes_of
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.engines.request_schedule import marked
from polyclinic.engines.step_file import StepFile
from polyclinic.learning.training.step_progress import watched

log = logging.getLogger(__name__)


class Done(NamedTuple):
    """Result of one request at one site. Without a reply, ``lost`` gives the reason and the site state is unchanged."""

    reply: Reply | None
    memory: Trees
    lost: str
    seconds: float


def minibatches(method: Method[Any], site: Site) -> int:
    """Return the number of minibatches per round at ``site``; 0 if no job of ``method`` depends on it."""
    count = method.capabilities.minibatches
    return 0 if count is None else count(site.data["train"])


def marks_of(request: Request) -> dict[str, str]:
    """Return a digest of each of the request's trees by name, to determine whether two requests hold the same model."""
    return {name[:200]: _digest(request.trees[name]) for name in marked(list(request.trees))}


def _digest(leaves: Tree) -> str:
    hasher = hashlib.sha256()
    for name in sorted(leaves):
        leaf = leaves[name]
        hasher.update(f"{name}\n{leaf.dtype}{tuple(leaf.shape)}\n".encode())
        hasher.update(bytes_of(leaf))
    return hasher.hexdigest()[:32]


def work(
    method: Method[Any],
    request: Request,
    memory: Trees,
    site: Site,
    policy: Policy | None = None,
    progress: Path | None = None,
    worker: int = 0,
) -> Done:
    """Execute ``request`` at ``site``. Any failure becomes a reason in the result, not an exception.

    Args:
        progress: Folder in which the progress of local training is recorded, in the file of ``worker``.
    """
    begun = time.perf_counter()
    steps = StepFile(progress, worker, site.name, request.round, request.job) if progress else None
    try:
        with repeatable(site.device), watched(steps) if steps else nullcontext():
            reply, kept = execute(method, request, memory, site, policy)
        return Done(reply, kept, "", time.perf_counter() - begun)
    except Refused as refusal:
        reason = f"refused: {refusal}"
    except Exception as error:
        log.debug("%s failed", site.name, exc_info=True)
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"failed: {type(error).__name__}: {error} ({where.filename.rpartition('/')[2]}:{where.lineno})"
    return Done(None, memory, reason, time.perf_counter() - begun)


@contextmanager
def repeatable(device: str = "cpu") -> Iterator[None]:
    """Compute so that equal inputs give bit-identical results.

    On a CPU this uses one thread, so that the order of summation does not depend on the engine or machine. On a GPU it
    uses deterministic kernels; if PyTorch has none (3-D pooling, some interpolation), it uses another, and the last
    bits may differ between runs.
    """
    threads = torch.get_num_threads()
    if threads != 1:
        torch.set_num_threads(1)
    try:
        if device.startswith("cuda"):
            with _deterministic():
                yield
        else:
            yield
    finally:
        if threads != 1:
            torch.set_num_threads(threads)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Use PyTorch's deterministic GPU kernels within the context."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    tuned, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    memory: Any = deterministic  # PyTorch declares no types for it
    filled, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False  # it costs a tenth of the time
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = tuned
        memory.fill_uninitialized_memory = filled
