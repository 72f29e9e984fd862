"""A site's data by role, read by its training process from the folder that the hospital chose.

The folder contains one file per role, ``train.npz``, ``val.npz``, ``test.npz``, ``unlabeled.npz``, with the arrays
``inputs`` [n, C, *spatial] or [n, F], ``targets``, and ``patients`` [n], so that patients are counted instead of
images. Alternatively it contains ``data.toml``, the ``[data]`` table of a study, which says how to read the files. A
study may add the keys in ``data_restrictions.FROM_STUDY`` to that table, and no others.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from polyclinic.data.examples import DataError, Dataset, Examples, concat
from polyclinic.engines.flare.protocol import data_restrictions
from polyclinic.engines.flare.protocol.paths import SetupError
from polyclinic.engines.flare.protocol.run_request import RunRequest
from polyclinic.engines.plan import Plan

if TYPE_CHECKING:
    from polyclinic.data.config import DataSpec

ROLES = ("train", "val", "test", "unlabeled")
TRAINS = ("train", "unlabeled", "boxed", "tagged")
MEASURES = "case-statistics"
"""The method whose data are what is measured of each training image before preprocessing, and not images."""
UNREADABLE = "the data cannot be read as the study needs them: see `polyclinic site status` at the site"


class UnsuitableData(DataError):
    """Data that a run request cannot use.

    Attributes:
        reported: Reason as reported to the server: without paths and without values of the data.
    """

    def __init__(self, problems: Sequence[str] | str, reported: str) -> None:
        super().__init__(problems)
        self.reported = reported


class SiteData(NamedTuple):
    """Data of a site: examples by role, and the names of the classes if the data name them."""

    roles: dict[str, Dataset]
    classes: tuple[str, ...] = ()


def load(folder: Path, order: RunRequest, plan: Plan, site: str) -> SiteData:
    """Return the site's examples, as the run request needs them.

    Args:
        folder: The site's data folder.
        order: Its data settings, and whether ``site`` trains.
        plan: Its input shape, which the data must have unless the request is a survey.

    Raises:
        DataError: If no data can be used, with every problem; ``UnsuitableData`` if the reason may be sent to the
            server.
    """
    if order.rehearsal:
        return SiteData(_imaginary(plan))
    if plan.method == MEASURES and order.mode != "survey":
        return SiteData({"train": _measured(folder, order.data, plan.seed)})
    roles, classes = read(folder, order.data, plan.seed)
    if site in order.external:  # no training at this site, so all of it is test data
        labeled = [roles[role] for role in ROLES[:3] if role in roles]
        roles = {"test": concat(labeled)} if labeled else {}
    if not roles.keys() & {*TRAINS, "test"}:
        raise UnsuitableData(
            f"{folder} contains no examples that this study could use", "there are no examples here for this study"
        )
    if order.mode == "survey":
        return SiteData(roles, classes)
    if site in plan.sites and not roles.keys() & set(TRAINS):
        raise UnsuitableData(
            f"{folder} contains no training examples, and the study trains here", "there are no training examples here"
        )
    if wrong := [role for role, data in roles.items() if len(data) and _differs(data, plan)]:
        raise UnsuitableData(
            [f"{role}: inputs have the shape {roles[role].shape}, and the study needs {plan.inputs}" for role in wrong],
            f"inputs ({', '.join(wrong)}) do not have the shape that the study needs, {_by(plan.inputs)}",
        )
    return SiteData(roles, classes)


def read(folder: Path, table: Mapping[str, Any], seed: int = 0) -> SiteData:
    """Return the data in the folder. ``table``: the ``[data]`` table of a study, limited to the keys for sites.

    A folder of ``.npz`` files by role is already split and preprocessed, so ``table`` does not apply to it.

    Raises:
        DataError: If it cannot be read, with every problem.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist: is the disk mounted? `data` in site.toml names the folder")
    if wrong := data_restrictions.refused(table):
        raise UnsuitableData(wrong, "; ".join(wrong))
    roles: dict[str, Dataset] = {
        role: _read(folder / f"{role}.npz") for role in ROLES if (folder / f"{role}.npz").is_file()
    }
    if roles:
        return SiteData(roles)
    try:
        own = data_restrictions.of_hospital(folder)
    except SetupError as error:
        raise DataError(str(error)) from None
    if own is None:
        raise DataError(f"{folder} contains neither train.npz nor a data.toml that says how to read its files")
    if differ := data_restrictions.conflicts(own, table):
        keys = ", ".join(differ)
        raise UnsuitableData(
            list(differ.values()), f"the study and this hospital set different values for its data: {keys}"
        )
    return _federated(folder / data_restrictions.FILE, own, table, seed)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _differs(data: Dataset, plan: Plan) -> bool:
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
    """Return one site's data; paths in the table are relative to the folder."""
    from polyclinic.data.federation import federate

    federation = federate(_spec(path, own, table), seed)
    if len(federation.sites) != 1:
        raise DataError(f"{path} describes {len(federation.sites)} sites; at a hospital it describes one")
    return SiteData(dict(next(iter(federation.sites.values()))), tuple(federation.info.classes))


def _spec(path: Path, own: Mapping[str, Any], table: Mapping[str, Any]) -> "DataSpec":
    """Return the table of a hospital's data, completed with a study's; paths are relative to the folder."""
    from polyclinic.data.config import DataSpec

    given = {"sites": {"partition": "iid", "count": 1}, **table, **own}
    if isinstance(given.get("path"), str):
        given["path"] = str(path.parent / Path(given["path"]).expanduser())
    try:
        return DataSpec.model_validate(given)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def _measured(folder: Path, table: Mapping[str, Any], seed: int) -> Any:
    """Return what is measured of each training image: rows, or the examples of ``train.npz`` that rows are made of."""
    from polyclinic.data.federation import rows_by_site

    if not folder.is_dir():
        raise DataError(f"{folder} does not exist: is the disk mounted? `data` in site.toml names the folder")
    if (folder / "train.npz").is_file():
        return _read(folder / "train.npz")
    try:
        own = data_restrictions.of_hospital(folder)
    except SetupError as error:
        raise DataError(str(error)) from None
    if own is None:
        raise DataError(f"{folder} contains neither train.npz nor a data.toml that says how to read its files")
    spec = _spec(folder / data_restrictions.FILE, own, {key: table[key] for key in ("split",) if key in table})
    sites = rows_by_site(spec, seed, spec.source())
    if len(sites) != 1:
        raise DataError(
            f"{folder / data_restrictions.FILE} describes {len(sites)} sites; at a hospital it describes one"
        )
    return next(iter(sites.values()))


def _imaginary(plan: Plan) -> dict[str, Dataset]:
    """Return synthetic examples for a rehearsal: two clouds of points."""
    rng = torch.Generator().manual_seed(plan.seed)
    roles: dict[str, Dataset] = {}
    for role, count in (("train", 64), ("val", 32)):
        targets = torch.arange(count) % max(plan.outputs, 2)
        inputs = torch.randn(count, *plan.inputs, generator=rng) + targets.view(-1, *[1] * len(plan.inputs))
        names = tuple(f"nobody-{i}" for i in range(count))
        roles[role] = Examples(inputs, targets, names, names)
    return roles
