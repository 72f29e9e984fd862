"""Deployment over NVIDIA FLARE 2.9: message transport, admission of sites, and recovery after a crash.

FLARE carries messages, authenticates participants (mutual TLS, signed jobs) and starts processes. Polyclinic implements
everything that decides results or protects sites: rounds, checkpoints, site state, policy, journals. Only this package
imports ``nvflare``, and only where a FLARE process needs it. See docs/how-to/deployment.md.
"""

from importlib.util import find_spec

from polyclinic.errors import MissingDependency


def require() -> None:
    """Check that NVIDIA FLARE is installed.

    Raises:
        MissingDependency: If it is not installed.
    """
    if find_spec("nvflare") is None:
        raise MissingDependency("flare", "deployed studies need NVIDIA FLARE")
