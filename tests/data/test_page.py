"""Every ``[data]`` table of docs/how-to/data.md is valid, and those on real data become federations."""

import re
import tomllib
from pathlib import Path

import pytest

from polyclinic.data.federation import DataSpec, federate
from tests.support.known import known

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "data.md"
TABLES = re.findall(r"^```toml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize(
    "text", TABLES, ids=lambda t: known(re.search(r'(?:use|path) = "([^"]*)"', t))[1].rpartition("/")[2]
)
def test_a_table_of_the_page_is_valid(text: str) -> None:
    """Every key and every value; and nothing that was written is dropped."""
    table = tomllib.loads(text)["data"]
    spec = DataSpec(**table)
    assert spec.model_dump(mode="json", exclude_unset=True).keys() == table.keys()
    assert spec.options.keys() == table.keys() - DataSpec.model_fields.keys()


def test_the_page_has_tables() -> None:
    """Or the test above would be about nothing."""
    assert len(TABLES) >= 5


@pytest.mark.parametrize(
    "text",
    [t for t in TABLES if "$POLYCLINIC_DATA" in t and "hippocampus" not in t and "brain" not in t],
    ids=lambda t: t[:40],
)
def test_a_table_on_real_data_becomes_a_federation(text: str, real_data: Path) -> None:
    """With at least three sites that train and test. (Hippocampus and brain are tried in test_real.)"""
    data = federate(DataSpec(**tomllib.loads(text)["data"]))
    assert len(data.training) >= 3
    assert all({"train", "test"} <= set(data.sites[site]) for site in data.training)
    assert (data.simulated is None) == ("partition" not in text)
