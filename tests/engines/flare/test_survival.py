"""Survival between hospitals: tables with times and events train to the bits of one process, and are scored there."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from polyclinic.core import serialization as states
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.engines.flare.protocol.run_request import RunRequest
from polyclinic.learning.networks.model_tree import load
from polyclinic.studies.config.study_config import Study, parse
from polyclinic.studies.run import deployment
from polyclinic.testing import equal
from tests.conftest import little_sites
from tests.support.data_sets import read_sites
from tests.support.flare_deployment import PATIENCE, Hospitals, reference
from tests.support.local_deployment import LocalCarrier, approve, coordinator, make_site

STUDY = """
name = "relapse"
rounds = 3
[data]
kind = "table"
path = "PATH"
label = "months"
event = "status"
patient = "id"
statistics = "site"
split = [0.6, 0.2, 0.2]
[task]
kind = "survival"
network = "mlp"
options = { width = 6, depth = 1 }
cuts = [6, 12, 24]
hazards = "HAZARDS"
[training]
batch_size = 16
lr = 0.3
[[methods]]
name = "fedavg"
[evaluation]
interval = 3
"""
DATA = 'kind = "table"\npath = "p.csv"\nlabel = "months"\nevent = "status"\npatient = "id"\nstatistics = "site"\n'


def write_table(folder: Path, k: int) -> None:
    """Write the patients of hospital ``k``: exponential times that depend on two of three covariates, a third censored."""
    rng = np.random.default_rng(k)
    folder.mkdir(parents=True, exist_ok=True)
    x = rng.normal(size=(60, 3))
    time = rng.exponential(12 * np.exp(x[:, 0] - 0.5 * x[:, 1]))
    end = rng.exponential(24, 60)
    with (folder / "p.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "age", "dose", "grade", "months", "status"])
        for i in range(60):
            months = max(0.1, round(min(time[i], end[i]), 3))
            rows.writerow([f"h{k}-{i}", *(round(v, 4) for v in x[i]), months, int(time[i] <= end[i])])
    (folder / "data.toml").write_text(DATA)


def requested(hazards: str, folder: Path, sites: list[str], patience: float) -> tuple[RunRequest, Study]:
    """Return the study, and its request to the hospitals."""
    read = parse(STUDY.replace("PATH", str(folder / "p.csv")).replace("HAZARDS", hazards))
    (arm,), _ = deployment.method_runs(read, sites, {"inputs": [3]})
    shared = {key: value for key, value in deployment.how(read).items() if value is not None}
    return RunRequest(f"relapse-{hazards}", arm["plan"], patience=patience, **shared), read


def recorded(records: Path) -> dict[tuple[str, str], float]:
    """Return the C-index of each site that the server has, by kind of record."""
    lines = map(json.loads, records.read_text().splitlines())
    return {
        (line["kind"], line["site"]): line["metrics"]["c_index"] for line in lines if line["kind"] in ("scores", "test")
    }


@torch.no_grad()
def computed(an: RunRequest, params: Tree, sites: dict[str, Site]) -> dict[tuple[str, str], float]:
    """Compute the same from a model and the patients themselves."""
    task = an.build_plan().build_task()
    model, found = load(task.model(), params).eval(), {}
    for name, site in sites.items():
        for kind, role in (("scores", "val"), ("test", "test")):
            rows = site.data[role]
            outputs = task.outputs(model, rows[torch.arange(len(rows))], full_metrics=kind == "test")
            found[kind, name] = task.summary(outputs)["c_index"]
    return found


@pytest.mark.parametrize("hazards", ["discrete", "proportional"])
def test_hospitals_train_and_score_survival_as_one_process_does(
    hazards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    homes = {}
    for k, (name, site) in enumerate(little_sites(count=3).items()):
        homes[name] = make_site(tmp_path / name, name, site)
        write_table(tmp_path / name / "files", k)
        homes[name].settings.write_text(f'site = "{name}"\ndata = "{tmp_path / name / "files"}"\n')
    an, read = requested(hazards, tmp_path / "site-1" / "files", list(homes), 5.0)
    for home in homes.values():
        approve(home, an)
    assert coordinator(tmp_path, an, LocalCarrier(homes, an)).run() == "finished"
    sites = read_sites(read.data, {name: tmp_path / name / "files" / "p.csv" for name in homes}, an.plan["seed"])
    state = states.load(tmp_path / "server" / an.run / "checkpoint.safetensors").state
    assert equal(reference(an, sites)[0], state)
    assert recorded(tmp_path / "server" / an.run / "records.jsonl") == pytest.approx(computed(an, state.params, sites))


@pytest.mark.deploy
@pytest.mark.slow
def test_real_processes_train_survival(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvflare", reason="the extra [flare] is not installed")
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    hospitals = Hospitals(tmp_path)
    for k, name in enumerate(hospitals.homes):
        shutil.rmtree(tmp_path / "data" / name)
        write_table(tmp_path / "data" / name, k)
    with hospitals:
        for hazards in ("discrete", "proportional"):
            made, read = requested(hazards, tmp_path / "data" / "site-1", list(hospitals.homes), PATIENCE)
            an = hospitals.order(made)
            hospitals.finished(an.run)
            assert hospitals.lost(an.run) == []
            sites = read_sites(
                read.data, {name: tmp_path / "data" / name / "p.csv" for name in hospitals.homes}, an.plan["seed"]
            )
            state = hospitals.state(an.run)
            assert equal(reference(an, sites)[0], state)
            records = hospitals.server.run(an.run) / "records.jsonl"
            assert recorded(records) == pytest.approx(computed(an, state.params, sites))
        hospitals.journals_hold()
