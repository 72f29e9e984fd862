"""Between hospitals, over NVIDIA FLARE 2.9: how asks travel, who may join, what survives a crash.

FLARE carries messages, knows who is who (mutual TLS, signed jobs) and starts processes. Everything else is ours,
because it decides results or protects sites: rounds, checkpoints, site memory, policy, journals. Only this package
imports ``nvflare``, and only where a process of FLARE needs it. See docs/how-to/deployment.md.
"""

from importlib.util import find_spec

from polyclinic.errors import MissingDependency


def require() -> None:
    """Raises unless NVIDIA FLARE is installed.

    Raises:
        MissingDependency: If it is not.
    """
    if find_spec("nvflare") is None:
        raise MissingDependency("flare", "studies between hospitals need NVIDIA FLARE")
