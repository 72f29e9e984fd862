"""A site's data as its training process sees it: by role, from the folder that the hospital chose.

The folder holds one file a role, ``train.npz``, ``val.npz``, ``test.npz``, ``unlabelled.npz``, with the arrays
``inputs`` [n, C, *spatial] or [n, F], ``targets``, and, so that patients are counted and not images, ``patients`` [n].
Or it holds ``data.toml``, the ``[data]`` table of a study, which says how the files there are to be read.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyclinic.data.examples import DataError, Examples
from polyclinic.engines.plan import Plan

ROLES = ("train", "val", "test", "unlabelled")


def load(folder: Path, table: Mapping[str, Any], plan: Plan) -> dict[str, Examples]:
    """The site's examples by role.

    Args:
        folder: The site's data folder.
        table: What the order says about data.
        plan: Says which shape inputs must have.

    Raises:
        DataError: Where there are none that can be used, with every problem.
    """
    if table.get("rehearsal") is True:
        return _imaginary(plan)
    if not folder.is_dir():
        raise DataError(f"{folder} is not there: is the disk mounted? `data` in site.toml names the folder")
    found = {role: _read(folder / f"{role}.npz") for role in ROLES if (folder / f"{role}.npz").is_file()}
    if not found and (folder / "data.toml").is_file():
        found = _federated(folder / "data.toml", table, plan)
    if "train" not in found and "unlabelled" not in found:
        raise DataError(f"{folder} holds no train.npz, and no data.toml that says how to read what is there")
    if wrong := [role for role, data in found.items() if len(data) and tuple(data.shape) != tuple(plan.inputs)]:
        raise DataError(
            [f"{role}: inputs have the shape {found[role].shape}, and the study needs {plan.inputs}" for role in wrong]
        )
    return found


def _read(path: Path) -> Examples:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            inputs, targets = torch.from_numpy(arrays["inputs"]), torch.from_numpy(arrays["targets"])
            patients = (
                [str(p) for p in arrays["patients"]] if "patients" in arrays else [str(i) for i in range(len(targets))]
            )
            ids = [str(i) for i in arrays["ids"]] if "ids" in arrays else [str(i) for i in range(len(targets))]
    except (ValueError, OSError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return Examples(inputs, targets, tuple(patients), tuple(ids))


def _federated(path: Path, table: Mapping[str, Any], plan: Plan) -> dict[str, Examples]:
    from polyclinic.data.federation import DataSpec, federate

    try:
        spec = DataSpec.model_validate({**tomllib.loads(path.read_text()), **table})
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    sites = federate(spec, plan.seed).sites
    if len(sites) != 1:
        raise DataError(f"{path} describes {len(sites)} sites; at a hospital it describes one")
    return dict(next(iter(sites.values())))


def _imaginary(plan: Plan) -> dict[str, Examples]:
    """Examples that nobody has, to try a connection with: two clouds of points."""
    dice = torch.Generator().manual_seed(plan.seed)
    found = {}
    for role, count in (("train", 64), ("val", 32)):
        targets = torch.arange(count) % max(plan.outputs, 2)
        inputs = torch.randn(count, *plan.inputs, generator=dice) + targets.view(-1, *[1] * len(plan.inputs))
        names = tuple(f"nobody-{i}" for i in range(count))
        found[role] = Examples(inputs, targets, names, names)
    return found
