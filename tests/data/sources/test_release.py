"""Sources free what they have read once the sites have copies of it, and read the file again when they are asked."""

import gc
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polyclinic.data.config import DataSpec
from polyclinic.data.federation import Federated, federate
from polyclinic.data.source import ReleasableSource, release

SITES = ("north", "south", "east")


def write_npz(folder: Path, images: int = 60, side: int = 8, shift: int = 0) -> DataSpec:
    pixels = np.random.default_rng(shift).integers(0, 255, (images, side, side, 3), dtype=np.uint8)
    site = np.array([SITES[i % 3] for i in range(images)])
    np.savez(folder / "images.npz", images=pixels, labels=np.arange(images) % 2, site=site)
    return DataSpec.model_validate({"path": str(folder / "images.npz"), "kind": "npz", "sites": "site"})


def write_table(folder: Path, rows: int = 60, shift: int = 0) -> DataSpec:
    values = np.random.default_rng(shift).normal(size=(rows, 3))
    lines = [f"{SITES[i % 3]},{i % 2}," + ",".join(f"{v:.4f}" for v in values[i]) for i in range(rows)]
    (folder / "rows.csv").write_text("\n".join(["site,ill,a,b,c", *lines]) + "\n")
    path = {"path": str(folder / "rows.csv"), "kind": "table", "label": "ill", "site": "site"}
    return DataSpec.model_validate(path)


def write_folders(folder: Path, images: int, side: int) -> DataSpec:
    rng = np.random.default_rng(0)
    for i in range(images):
        file = folder / "images" / SITES[i % 3] / "ab"[i % 2] / f"{i}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(file)
    path = {"path": str(folder / "images"), "kind": "folders", "levels": ["site", "class"]}
    return DataSpec.model_validate(path)


def same(a: Federated, b: Federated) -> bool:
    pairs = [(a.sites[s][role], b.sites[s][role]) for s in a.sites for role in a.sites[s]]
    return a.fingerprint == b.fingerprint and all(
        torch.equal(x.inputs, y.inputs) and torch.equal(x.targets, y.targets)  # type: ignore[attr-defined]
        for x, y in pairs
    )


def test_names_of_rows_take_at_most_60_bytes_each_once_a_table_is_distributed(tmp_path: Path) -> None:
    """As objects of Python, with the numbers of rows by name, it is about 270 bytes for each row."""
    spec = write_table(tmp_path, 3_000)
    source = spec.source()
    tracemalloc.start()
    try:
        data = federate(spec, 0, source=source)
        release(source)
        gc.collect()
        traced = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    examples = [part for roles in data.sites.values() for part in roles.values()]
    values = sum(part.inputs.nbytes + part.targets.nbytes for part in examples)  # type: ignore[attr-defined]
    assert sum(map(len, examples)) == 3_000
    assert sum(trace.size for trace in traced.traces) - values < 60 * 3_000


@pytest.mark.parametrize("write", [write_npz, write_table])
def test_a_released_source_gives_the_same_data(tmp_path: Path, write: type) -> None:
    spec: DataSpec = write(tmp_path)
    source = spec.source()
    assert isinstance(source, ReleasableSource)
    before, table = federate(spec, 0, source=source), source.table()
    release(source)
    again = source.table()
    assert (list(again.ids), list(again.patients)) == (list(table.ids), list(table.patients))
    assert same(federate(spec, 0, source=source), before)


@pytest.mark.parametrize("write", [write_npz, write_table])
def test_a_released_source_notices_that_its_file_has_changed(tmp_path: Path, write: type) -> None:
    source = write(tmp_path).source()
    before = source.fingerprint
    release(source)
    assert source.fingerprint == before
    release(source)
    write(tmp_path, shift=1)
    assert source.fingerprint != before


MEASURE = """
import gc, re
from pathlib import Path
from polyclinic.data.config import DataSpec
from polyclinic.data.federation import federate
from polyclinic.data.source import release

def resident():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def load(spec):
    source = spec.source()
    data = federate(spec, 0, source=source)
    release(source)
    gc.collect()
    return source, data

first = load(DataSpec.model_validate({small!r}))  # what is imported on first use does not count
before = resident()
source, data = load(DataSpec.model_validate({large!r}))
held = sum(e.inputs.numel() * e.inputs.element_size() for roles in data.sites.values() for e in roles.values())
print(held, resident() - before)
"""


ALLOCATOR = 32e6
"""Bytes of freed blocks that the C library may keep: it returns blocks above a threshold of at most 32 MB."""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="measures memory as Linux reports it")
@pytest.mark.parametrize("kind", ["npz", "folders"])
def test_data_are_held_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Data take at most 1.1 times their size, for an archive and for a folder that was decoded before."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    specs = []
    for name, images, side in (("small", 30, 8), ("large", 600, 224)):
        (tmp_path / name).mkdir()
        writer = write_npz if kind == "npz" else write_folders
        specs.append(writer(tmp_path / name, images, side).model_dump(exclude_unset=True))
    script = MEASURE.format(small=specs[0], large=specs[1])
    for _ in range(1 if kind == "npz" else 2):  # the first reading decodes the folder into the cache
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-800:]
    size, resident = map(int, re.findall(r"-?\d+", done.stdout))
    assert size > 90e6
    assert resident <= 1.1 * size + ALLOCATOR, (size, resident)
