"""Data as a study's ``[data]`` table describes it, and examples in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyclinic.core.site import Site
from polyclinic.data.config import DataSpec
from polyclinic.data.examples import Dataset, Examples
from polyclinic.data.federation import federate


def data_spec(**table: Any) -> DataSpec:
    """Return the specification of a ``[data]`` table, whose keys include options of the source."""
    return DataSpec(**table)


def read_sites(spec: DataSpec, paths: Mapping[str, Path], seed: int) -> dict[str, Site]:
    """Read the data of hospitals in this process, each at its path, as the hospital reads its own."""
    sites = {}
    for name, path in paths.items():
        own = spec.model_dump(exclude_unset=True) | {"path": str(path), "sites": {"partition": "iid", "count": 1}}
        (roles,) = federate(DataSpec.model_validate(own), seed).sites.values()
        sites[name] = Site(name, dict(roles))
    return sites


def loaded(data: Dataset) -> Examples:
    """Return ``data``, which are expected in memory."""
    assert isinstance(data, Examples)
    return data
