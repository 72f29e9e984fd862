"""Memory of training on more volumes than fit into it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from polyclinic.core import serialization
from polyclinic.data.cases import case_file

SIZE = (300, 512, 512)
CASES = 200
LIMIT = 1.5 * 2**30
TRAINING = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.data.cases.case_file import opened
from polyclinic.data.cases.cases import Cases
from polyclinic.engines.local.worker_pool import Workers
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg

patch = (96, 96, 96)
sites = {}
for name in ("a", "b"):
    files = tuple(opened(path) for path in sorted(Path(sys.argv[1]).glob(f"{name}*.safetensors")))
    names = tuple(map(str, range(len(files))))
    sites[name] = Site(name, {"train": Cases(files, patch, 1, names, names)})
task = Segmentation(Network("unet", (1, *patch), 2, (("width", 8),)))
method = FedAvg(task, LocalTraining(batch_size=2, steps=2))
with Workers(method, sites, workers=2) as engine:
    for step in train(method, engine, method.init(task.first(0)), rounds=1):
        assert not step.lost, step.lost
    for pid in engine.pids:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        print(sum(1024 * int(status[key].split()[0]) * sign for key, sign in (("VmHWM", 1), ("RssFile", -1))))
"""


def sparse(path: Path) -> None:
    """Write a case of 225 MiB whose image and mask take no space on the disk: all voxels are 0."""
    content = {
        "pixels": torch.zeros(1, dtype=torch.int16).expand(1, *SIZE),
        "mask": torch.zeros(1, dtype=torch.uint8).expand(SIZE),
        "places": {"1": torch.full((100, 3), 150, dtype=torch.int32)},
        "divisor": (1.0,),
        "shift": (0.0,),
        "labels": (0, 1),
        "box": (),
        "spacing_mm": (1.0, 1.0, 1.0),
        "values": {"picture": False, "full_scale": None, "low": 0.0, "high": 0.0},
        "notes": (),
        "geometry": None,
        "truth": None,
        "hashes": ("", ""),
    }
    head, tensors = serialization.header_of(content, {"case": str(case_file.VERSION)})
    with open(path, "wb") as file:
        file.write(head)
        file.write(tensors[0].numpy().tobytes())  # the places; the header sorts by the size of an element
        file.truncate(len(head) + sum(t.numel() * t.element_size() for t in tensors))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
@pytest.mark.slow
def test_two_workers_train_on_forty_gigabytes(tmp_path: Path) -> None:
    """200 volumes of 512 x 512 x 300: at most 1.5 GiB of anonymous memory in each worker, patches of 96³ in pairs."""
    for i in range(CASES):
        sparse(tmp_path / f"{'ab'[i % 2]}{i:03}.safetensors")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 40 * 2**30
    assert sum(path.stat().st_blocks for path in tmp_path.iterdir()) * 512 < 2**26
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, str(tmp_path)], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    peaks = [int(line) for line in done.stdout.split()]
    assert len(peaks) == 2
    assert max(peaks) <= LIMIT, f"{max(peaks) / 2**20:.0f} MiB"
    print("peak anonymous memory:", [f"{peak / 2**20:.0f} MiB" for peak in peaks])
