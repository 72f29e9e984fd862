"""Memory that data take after they were distributed to sites, over the size of the sites' inputs and targets.

What counts is the anonymous memory of a new process (Linux), against that before the data were read; a small data set
of the same kind was read before, so that modules do not count. One JSON line for each kind.

    python benchmarks/data_memory.py [table] [large-table] [wide-table] [npz] [folders]
"""

import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

COUNTS = {
    "table": (200, 20_000),
    "large-table": (200, 200_000),
    "wide-table": (200, 4_000),
    "npz": (60, 3_000),
    "folders": (60, 3_000),
}
"""Rows or images of the small and of the large data set, by kind."""
FEATURES = {"wide-table": 3_000}
"""Features of a table, by kind; 60 if it is not listed."""


def write_table(features: int, folder: Path, rows: int) -> dict[str, object]:
    """Write a table of three hospitals."""
    rng = np.random.default_rng(0)
    path = folder / f"table-{rows}.csv"
    with open(path, "w") as file:
        file.write(",".join(["site", "patient", "label", *(f"x{i}" for i in range(features))]) + "\n")
        for i, values in enumerate(rng.standard_normal((rows, features))):
            file.write(f"hospital-{i % 3},p{i},{i % 2},{','.join(map(repr, values.tolist()))}\n")
    return {"path": str(path), "kind": "table", "label": "label"}


def write_npz(folder: Path, images: int) -> dict[str, object]:
    """Write an archive of images of 224 x 224 of three hospitals."""
    rng, path = np.random.default_rng(0), folder / f"images-{images}.npz"
    pixels = rng.integers(0, 256, (images, 224, 224), np.uint8)
    sites = np.array([f"hospital-{i % 3}" for i in range(images)])
    np.savez(path, images=pixels, labels=np.arange(images) % 2, site=sites)
    return {"path": str(path), "kind": "npz"}


def write_folder(folder: Path, images: int) -> dict[str, object]:
    """Write PNG images of 224 x 224 in a folder for each of three hospitals and two classes."""
    from PIL import Image

    rng, root = np.random.default_rng(0), folder / f"images-{images}"
    for i in range(images):
        path = root / f"hospital-{i % 3}" / f"class-{i // 3 % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (224, 224), np.uint8)).save(path)
    return {"path": str(root), "kind": "folders", "levels": ["site", "class"]}


def anonymous() -> int:
    """Return the anonymous memory of this process in bytes."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def measure(kind: str, little: dict[str, object], large: dict[str, object]) -> None:
    """Read both data sets, and print what the second one takes."""
    from polyclinic.data.config import DataSpec
    from polyclinic.data.federation import Federated, federate
    from polyclinic.data.source import Source, release

    def read(given: dict[str, object]) -> tuple[Federated, Source]:
        spec = DataSpec.model_validate(given)
        source = spec.source()
        data = federate(spec, source=source)
        release(source)
        return data, source  # a run keeps both

    kept = read(little)
    del kept
    gc.collect()
    before, begun = anonymous(), time.process_time()
    data, _source = read(large)
    spent = time.process_time() - begun
    gc.collect()
    after = anonymous()
    examples = [one for roles in data.sites.values() for one in roles.values()]  # type: ignore[attr-defined]
    size = sum(t.nbytes for one in examples for t in (one.inputs, one.targets))
    line = {"kind": kind, "data_mb": size / 1e6, "ratio": (after - before) / size, "read_cpu_s": spent}
    print(json.dumps({key: round(value, 2) if isinstance(value, float) else value for key, value in line.items()}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], *map(json.loads, sys.argv[3:5]))
        sys.exit()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for kind in sys.argv[1:] or COUNTS:
            write = {"npz": write_npz, "folders": write_folder}.get(kind, partial(write_table, FEATURES.get(kind, 60)))
            pair = [json.dumps(write(place, count)) for count in COUNTS[kind]]
            subprocess.run([sys.executable, __file__, "--measure", kind, *pair], check=True)
