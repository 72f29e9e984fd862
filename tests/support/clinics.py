"""Three clinics with little pictures, as one archive for a single machine and as a folder for each of them."""

from pathlib import Path

import numpy as np
import torch

from polyclinic.data.examples import in_memory
from polyclinic.data.federation import federate
from polyclinic.studies.config import study_config

STUDY = """
name = "spots"
title = "Is there a spot in the picture?"
rounds = 2
seeds = [3]

[data]
kind = "npz"
path = "PATH"
patient = "patient"
external = ["osaka"]

[task]
network = "cnn"
options = { width = 4, depth = 2, norm = "batch" }

[training]
lr = 0.1

[[methods]]
name = "local"

[[methods]]
name = "pooled"

[[methods]]
name = "ditto"
"""


def make(root: Path, study: str = STUDY) -> tuple[Path, dict[str, Path]]:
    """The study file, and each clinic's data folder: the same patients in the same roles as on one machine."""
    rng, rows = np.random.default_rng(5), {"lyon": 60, "oslo": 48, "osaka": 24}
    images, labels, sites, patients = [], [], [], []
    for site, count in rows.items():
        for i in range(count):
            picture, spot = rng.normal(0, 1, (8, 8)), i % 2
            picture[2:5, 2:5] += 1.5 * spot
            images.append(picture)
            labels.append(spot)
            sites.append(site)
            patients.append(f"{site}-{i // 2}")
    root.mkdir(parents=True, exist_ok=True)
    np.savez(
        root / "all.npz",
        images=np.array(images, np.float32),
        labels=np.array(labels),
        site=np.array(sites),
        patient=np.array(patients),
        label_names=np.array(["none", "spot"]),
    )
    file = root / "study.toml"
    file.write_text(study.replace("PATH", str(root / "all.npz")))
    read = study_config.read(file)
    folders = {site: root / "data" / site for site in rows}
    for site, roles in federate(read.data, read.seeds[0]).sites.items():
        folders[site].mkdir(parents=True)
        for role, held in roles.items():
            x = torch.stack([held[torch.tensor([i])][0][0] for i in range(len(held))])
            np.savez(
                folders[site] / f"{role}.npz",
                inputs=x.numpy(),
                targets=in_memory(held, "the test").targets.numpy(),
                patients=np.array(held.patients),
                ids=np.array(held.ids),
            )
    return file, folders
