"""A site's data as its training process sees it: by role, from the folder that the hospital chose.

The folder holds one file a role, ``train.npz``, ``val.npz``, ``test.npz``, ``unlabelled.npz``, with the arrays
``inputs`` [n, C, *spatial] or [n, F], ``targets``, and, so that patients are counted and not images, ``patients`` [n].
Or it holds ``data.toml``, the ``[data]`` table of a study, which says how the files there are to be read.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from polyclinic.data.examples import DataError, Examples, concat
from polyclinic.engines.flare.order import Order
from polyclinic.engines.plan import Plan

ROLES = ("train", "val", "test", "unlabelled")


class Held(NamedTuple):
    """What a site has: examples by role, and the names of the classes where the data name them."""

    roles: dict[str, Examples]
    classes: tuple[str, ...] = ()


def load(folder: Path, order: Order, plan: Plan, site: str) -> Held:
    """The site's examples, as the order needs them.

    Args:
        folder: The site's data folder.
        order: What it says about data, and whether ``site`` trains.
        plan: Says which shape inputs must have, unless the order is a survey, which asks for it.

    Raises:
        DataError: Where there are none that can be used, with every problem.
    """
    if order.data.get("rehearsal") is True:
        return Held(_imaginary(plan))
    roles, classes = read(folder, order.data, plan.seed)
    if site in order.external:  # nobody trains here, so all of it is test data
        labelled = [roles[role] for role in ROLES[:3] if role in roles]
        roles = {"test": concat(labelled)} if labelled else {}
    if not roles.keys() & {"train", "unlabelled", "test"}:
        raise DataError(f"{folder} holds no examples that this study could use")
    if order.mode != "survey" and (wrong := [r for r, data in roles.items() if len(data) and _differs(data, plan)]):
        raise DataError(
            [f"{role}: inputs have the shape {roles[role].shape}, and the study needs {plan.inputs}" for role in wrong]
        )
    return Held(roles, classes)


def read(folder: Path, table: Mapping[str, Any], seed: int = 0) -> Held:
    """What the folder holds. ``table``: the ``[data]`` of a study, as far as it is for sites.

    Raises:
        DataError: Where it cannot be read, with every problem.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not there: is the disk mounted? `data` in site.toml names the folder")
    if found := {role: _read(folder / f"{role}.npz") for role in ROLES if (folder / f"{role}.npz").is_file()}:
        return Held(found)
    if not (folder / "data.toml").is_file():
        raise DataError(f"{folder} holds no train.npz, and no data.toml that says how to read what is there")
    return _federated(folder / "data.toml", table, seed)


def _differs(data: Examples, plan: Plan) -> bool:
    return tuple(data.shape) != tuple(plan.inputs)


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


def _federated(path: Path, table: Mapping[str, Any], seed: int) -> Held:
    """One site's data, however they lie; everything in it is this site's, and paths begin at the folder."""
    from polyclinic.data.federation import DataSpec, federate

    try:
        given = {"sites": {"partition": "iid", "count": 1}, **tomllib.loads(path.read_text())}
        if isinstance(given.get("path"), str):
            given["path"] = str(path.parent / Path(given["path"]).expanduser())
        spec = DataSpec.model_validate({**given, **table})
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    found = federate(spec, seed)
    if len(found.sites) != 1:
        raise DataError(f"{path} describes {len(found.sites)} sites; at a hospital it describes one")
    return Held(dict(next(iter(found.sites.values()))), tuple(found.info.classes))


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
