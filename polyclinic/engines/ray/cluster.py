"""Connection to a Ray cluster (https://docs.ray.io), which distributes simulations to several machines.

Ray trusts everyone who can reach its ports, so a cluster belongs to one researcher or one institution. Between
hospitals, studies run over NVIDIA FLARE. Tensors travel in Polyclinic's own format (``core.serialization``); Ray's own
serialization carries names, numbers and text.
"""

import hashlib
import json
import logging
import os
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from polyclinic.errors import MissingDependency, RunError

LOCAL = "local"
"""Address that starts a cluster on this machine for the duration of the run."""

ANSWER = 10.0
"""Seconds in which the head of a cluster must answer."""
_PREFACE, _SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0\0\0\x04\0\0\0\0\0"


class ClusterError(RunError):
    """A Ray cluster that cannot be reached or used. The message says what to change."""


def ray() -> Any:
    """Return the package ``ray``.

    Raises:
        MissingDependency: If it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use over the network
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray as package
    except ImportError as error:
        raise MissingDependency("ray", 'kind = "ray" needs Ray') from error
    return package


@contextmanager
def connected(address: str, workers: int | None = None) -> Iterator[None]:
    """Connect this process to the cluster at ``address``, unless it is connected, until the end of the context.

    Args:
        address: ``"auto"`` for the cluster that runs on this machine, ``"local"`` for one that this process starts and
            that ends with it, or the address of the head, such as ``"10.0.0.1:6379"``.
        workers: Number of CPU cores of a local cluster.

    Raises:
        ClusterError: If there is no such cluster.
    """
    package = ray()
    if package.is_initialized():
        yield
        return
    where = "on this machine" if address == "auto" else f"at {address}"
    if address == "auto" and (named := os.environ.get("RAY_ADDRESS")):
        address, where = named, f"at {named} (RAY_ADDRESS)"
    remedy = 'start one with `ray start --head`, give its address, or use address = "local"'
    if why := _silence(address):
        raise ClusterError(f"no Ray cluster can be reached {where} ({why}): {remedy}")
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": logging.ERROR}
    try:
        if address == LOCAL:
            # without the address, Ray would use a cluster that RAY_ADDRESS names or that runs on this machine
            package.init(address=LOCAL, num_cpus=workers, include_dashboard=False, **options)
        else:
            package.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())
        if "ersion mismatch" in why:
            remedy = "install the same versions of Ray and Python on every machine of the cluster"
        raise ClusterError(f"no Ray cluster can be reached {where} ({why}): {remedy}") from error
    try:
        yield
    finally:
        package.shutdown()


def _silence(address: str) -> str:
    """Return why no cluster can answer at ``address``, which Ray would notice after minutes; empty if one may.

    Ray's head uses HTTP/2 without encryption, unless ``RAY_USE_TLS`` is set: it answers the connection preface (RFC
    9113, 3.4) with a frame of settings.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or "//" in host:
        return ""
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return ""
            connection.sendall(_PREFACE + _SETTINGS)
            answer = connection.recv(len(_SETTINGS))
    except TimeoutError:
        return f"no answer within {ANSWER:g} s"
    except (OSError, ValueError, OverflowError) as error:
        return str(error)
    return "" if answer[3:4] == _SETTINGS[3:4] else "what answers there is not Ray"


def slots(cpus: float, gpus: float) -> int:
    """Return how many workers with ``cpus`` cores and ``gpus`` GPUs the cluster can run at once; at least 1.

    Raises:
        ClusterError: If not even one worker fits.
    """
    total = ray().cluster_resources()
    fits = [int(total.get(name, 0) / need + 1e-9) for name, need in (("CPU", cpus), ("GPU", gpus)) if need]
    if not min(fits, default=1):
        has = f"{total.get('CPU', 0):g} CPU cores and {total.get('GPU', 0):g} GPUs"
        raise ClusterError(f"a worker needs {cpus:g} CPU cores and {gpus:g} GPUs, and the cluster has {has}")
    return min(fits, default=1)


@cache
def installation() -> str:
    """Return versions and a hash of Polyclinic's files as JSON, by which two machines are compared."""
    package = Path(__file__).parents[2]
    hasher = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        hasher.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return json.dumps(
        {
            "polyclinic": hasher.hexdigest()[:16],
            "torch": torch.__version__,
            "python": ".".join(platform.python_version_tuple()[:2]),
        }
    )


def require_same_installation(other: str, node: str) -> None:
    """Require that the machine ``node`` has this process's installation, since others may give other results.

    Raises:
        ClusterError: If it differs. The message names what differs.
    """
    here, there = json.loads(installation()), json.loads(other)
    if different := [name for name in here if here[name] != there.get(name)]:
        told = ", ".join(f"{name} {there.get(name)} instead of {here[name]}" for name in different)
        raise ClusterError(f"the machine {node} has {told}: install the same versions on every machine of the cluster")
