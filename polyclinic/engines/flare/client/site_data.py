"""A site's data as its training process sees it: by role, from the folder that the hospital chose.

The folder holds one file a role, ``train.npz``, ``val.npz``, ``test.npz``, ``unlabeled.npz``, with the arrays
``inputs`` [n, C, *spatial] or [n, F], ``targets``, and, so that patients are counted and not images, ``patients`` [n].
Or it holds ``data.toml``, the ``[data]`` table of a study, which says how the files there are to be read. A study may
add to that table what ``data_table.FROM_STUDY`` names, and nothing else.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from polyclinic.data.examples import DataError, Examples, concat
from polyclinic.engines.flare.protocol import data_restrictions
from polyclinic.engines.flare.protocol.paths import SetupError
from polyclinic.engines.flare.protocol.run_request import RunRequest
from polyclinic.engines.plan import Plan

ROLES = ("train", "val", "test", "unlabeled")
TRAINS = ("train", "unlabeled", "boxed", "tagged")
UNREADABLE = "the data cannot be read as the study needs them: `polyclinic site status` at the site says why"


class UnsuitableData(DataError):
    """Data that an order cannot use.

    Attributes:
        told: Why, as the server may read it: without paths, and without values of the data.
    """

    def __init__(self, problems: Sequence[str] | str, told: str) -> None:
        super().__init__(problems)
        self.told = told


class SiteData(NamedTuple):
    """What a site has: examples by role, and the names of the classes where the data name them."""

    roles: dict[str, Examples]
    classes: tuple[str, ...] = ()


def load(folder: Path, order: RunRequest, plan: Plan, site: str) -> SiteData:
    """The site's examples, as the order needs them.

    Args:
        folder: The site's data folder.
        order: What it says about data, and whether ``site`` trains.
        plan: Says which shape inputs must have, unless the order is a survey, which asks for it.

    Raises:
        DataError: If there are none that can be used, with every problem; ``UnsuitableData`` where the server may be told why.
    """
    if order.rehearsal:
        return SiteData(_imaginary(plan))
    roles, classes = read(folder, order.data, plan.seed)
    if site in order.external:  # nobody trains here, so all of it is test data
        labeled = [roles[role] for role in ROLES[:3] if role in roles]
        roles = {"test": concat(labeled)} if labeled else {}
    if not roles.keys() & {*TRAINS, "test"}:
        raise UnsuitableData(
            f"{folder} holds no examples that this study could use", "there are no examples here for this study"
        )
    if order.mode == "survey":
        return SiteData(roles, classes)
    if site in plan.sites and not roles.keys() & set(TRAINS):
        raise UnsuitableData(
            f"{folder} holds no training examples, and the study trains here", "there are no training examples here"
        )
    if wrong := [role for role, data in roles.items() if len(data) and _differs(data, plan)]:
        raise UnsuitableData(
            [f"{role}: inputs have the shape {roles[role].shape}, and the study needs {plan.inputs}" for role in wrong],
            f"inputs ({', '.join(wrong)}) do not have the shape that the study needs, {_by(plan.inputs)}",
        )
    return SiteData(roles, classes)


def read(folder: Path, table: Mapping[str, Any], seed: int = 0) -> SiteData:
    """What the folder holds. ``table``: the ``[data]`` of a study, as far as it is for sites.

    A folder of ``.npz`` files by role is divided and prepared already, so nothing of ``table`` applies to it.

    Raises:
        DataError: Where it cannot be read, with every problem.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not there: is the disk mounted? `data` in site.toml names the folder")
    if wrong := data_restrictions.refused(table):
        raise UnsuitableData(wrong, "; ".join(wrong))
    if found := {role: _read(folder / f"{role}.npz") for role in ROLES if (folder / f"{role}.npz").is_file()}:
        return SiteData(found)
    try:
        own = data_restrictions.of_hospital(folder)
    except SetupError as error:
        raise DataError(str(error)) from None
    if own is None:
        raise DataError(f"{folder} holds no train.npz, and no data.toml that says how to read what is there")
    if differ := data_restrictions.conflicts(own, table):
        keys = ", ".join(differ)
        raise UnsuitableData(
            list(differ.values()), f"the study and this hospital say different things about its data: {keys}"
        )
    return _federated(folder / data_restrictions.FILE, own, table, seed)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


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


def _federated(path: Path, own: Mapping[str, Any], table: Mapping[str, Any], seed: int) -> SiteData:
    """One site's data, however they lie; everything in it is this site's, and paths begin at the folder."""
    from polyclinic.data.federation import DataSpec, federate

    given = {"sites": {"partition": "iid", "count": 1}, **table, **own}
    if isinstance(given.get("path"), str):
        given["path"] = str(path.parent / Path(given["path"]).expanduser())
    try:
        spec = DataSpec.model_validate(given)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    found = federate(spec, seed)
    if len(found.sites) != 1:
        raise DataError(f"{path} describes {len(found.sites)} sites; at a hospital it describes one")
    return SiteData(dict(next(iter(found.sites.values()))), tuple(found.info.classes))


def _imaginary(plan: Plan) -> dict[str, Examples]:
    """Examples that nobody has, to try a connection with: two clouds of points."""
    rng = torch.Generator().manual_seed(plan.seed)
    found = {}
    for role, count in (("train", 64), ("val", 32)):
        targets = torch.arange(count) % max(plan.outputs, 2)
        inputs = torch.randn(count, *plan.inputs, generator=rng) + targets.view(-1, *[1] * len(plan.inputs))
        names = tuple(f"nobody-{i}" for i in range(count))
        found[role] = Examples(inputs, targets, names, names)
    return found
