"""Data as a study's ``[data]`` table describes it, and examples in memory."""

from typing import Any

from polyclinic.data.config import DataSpec
from polyclinic.data.examples import Dataset, Examples


def data_spec(**table: Any) -> DataSpec:
    """Return the specification of a ``[data]`` table, whose keys include options of the source."""
    return DataSpec(**table)


def loaded(data: Dataset) -> Examples:
    """Return ``data``, which are expected in memory."""
    assert isinstance(data, Examples)
    return data
