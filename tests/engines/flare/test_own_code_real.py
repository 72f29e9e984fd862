"""Real processes, NVIDIA FLARE: the parts of a package, and weights that were really pretrained.

The sites install the packages and add the weights themselves. The results have the bits of one process.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tests.support.pretrained_networks as networks
from polyclinic.core import extensions
from polyclinic.core.plugin_packages import exact_rule, packages_of
from polyclinic.core.site import Site
from polyclinic.engines.flare.protocol.paths import WEIGHTS
from polyclinic.engines.flare.protocol.run_request import RunRequest
from polyclinic.learning.networks import architectures
from polyclinic.learning.weights import importer
from polyclinic.learning.weights.store import Card
from polyclinic.studies.config.new_plugin import write_plugin
from polyclinic.testing import equal
from tests.conftest import Rows, little_sites
from tests.learning.weights.test_real_files import EFFICIENT, taken
from tests.support.flare_deployment import POLICY, Hospitals, reference, study
from tests.support.local_deployment import TRAINING, write_data
from tests.support.plugin_package import installed, with_metadata

pytestmark = [pytest.mark.deploy, pytest.mark.slow]
LITE = """

def build(inputs, outputs, **options):
    return EfficientNetLite0(inputs[0], outputs, **options)


from polyclinic.learning.networks.architectures import Architecture

NET = Architecture(build, head=("_fc.",), summary="EfficientNet-Lite0")
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Two packages on the path of this process: the skeleton of ``polyclinic new --plugin``, and EfficientNet-Lite0."""
    root = Path(tmp_path_factory.mktemp("packages"))
    write_plugin(root / "acme")
    (root / "lite" / "litenet").mkdir(parents=True)
    shutil.copy(networks.__file__, root / "lite" / "litenet" / "__init__.py")
    with open(root / "lite" / "litenet" / "__init__.py", "a") as file:
        file.write(LITE)
    with_metadata(root / "lite", "litenet", "1.0", {"polyclinic.networks": {"lite0": "litenet:NET"}})
    with pytest.MonkeyPatch.context() as patch:
        for folder in (installed(root / "acme"), root / "lite"):
            patch.syspath_prepend(str(folder))
        extensions._loaded.cache_clear()
        architectures._foreign.cache_clear()
        yield [root / "acme", root / "lite"]
        for name in [name for name in sys.modules if name.split(".")[0] in ("acme", "litenet")]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def clinics(packages: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    """A server and three sites with both packages, whose policies allow exactly these."""
    pytest.importorskip("nvflare", reason="the extra [flare] is not installed")
    known = packages_of({"networks": ["acme-net", "lite0"]})
    allowed = POLICY.replace("[allow]\n", f"[allow]\npackages = {[exact_rule(package) for package in known]}\n")
    made = Hospitals(Path(tmp_path_factory.mktemp("clinics")), policy=allowed)
    made.env[WEIGHTS] = str(made.root / "weights")  # the server's own store
    made.env["PYTHONPATH"] += "".join(f":{folder}" for folder in packages)
    with made:
        yield made


def compared(clinics: Hospitals, an: RunRequest, sites: dict[str, Site]) -> Any:
    """Run ``an``, and compare the server's state with that of one process, to the bit."""
    an = clinics.order(an)
    clinics.finished(an.run)
    assert clinics.lost(an.run) == []
    state, expected = clinics.state(an.run), reference(an, sites)[0]
    assert equal(expected, state)
    return state


def test_the_parts_of_a_package_give_the_bits_of_one_process(clinics: Hospitals) -> None:
    """A network, a loss, a metric and an augmentation."""
    plan = {
        "network": "acme-net",
        "network_options": {"width": 8},
        "task": {"loss": "acme-focal", "metrics": ["acme-kappa"]},
        "training": {**TRAINING, "augmentation": {"own": ["acme-speckle"]}},
    }
    state = compared(clinics, study("acme", "fedper", rounds=2, score_every=1, plan=plan), little_sites())
    assert "body.0.weight" in state.params
    lines = (clinics.server.run("acme") / "records.jsonl").read_text().splitlines()
    scores = [record["metrics"] for record in map(json.loads, lines) if record["kind"] == "scores"]
    assert len(scores) == 2 * 3
    assert all(-1 <= found["acme-kappa"] <= 1 for found in scores)


def images(root: Path, names: list[str]) -> dict[str, Site]:
    """Breast ultrasound images at each site, in the place of the sites' data."""
    file = Path(os.environ.get("POLYCLINIC_DATA", "")) / "busi" / "busi_128.npz"
    if not file.is_file():
        pytest.skip("POLYCLINIC_DATA names no folder with busi/busi_128.npz")
    archive = np.load(file)
    x = F.interpolate(torch.from_numpy(archive["images"])[:, None].float() / 255, (32, 32), mode="area")
    y, order = (
        torch.from_numpy(archive["labels"]).long(),
        torch.randperm(780, generator=torch.Generator().manual_seed(0)),
    )
    found = {}
    for k, name in enumerate(names):
        parts = {"train": order[k:300:3][:16], "val": order[300 + k : 330 : 3], "test": order[400 + k : 430 : 3]}
        found[name] = Site(name, {role: Rows(x[at], y[at]) for role, at in parts.items()})
        write_data(root / "data" / name, found[name])
    return found


def test_really_pretrained_weights_over_three_sites(
    clinics: Hospitals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linear probe, adapters and all of EfficientNet-Lite0 from ImageNet, on ultrasound images."""
    file = taken(EFFICIENT, tmp_path)
    sites = images(clinics.root, list(clinics.homes))
    for home in clinics.homes.values():
        clinics.command("site", "weights", "add", str(file), "--license", "Apache-2.0", home=home.path)
    monkeypatch.setenv(WEIGHTS, clinics.env[WEIGHTS])
    item = importer.add(file, Card("efficientnet-lite0", "Apache-2.0")).stored
    start = {"weights": {"sha256": item.sha256, "stem": "sum"}}
    adapters = {**start, "train": ["adapters", "head"], "lora": {"rank": 2, "alpha": 4.0}}
    tunings = {
        "probe": ("fedavg", {**start, "train": ["head"]}),
        "lora": ("rolora", adapters),
        "full": ("fedavg", start),
    }
    sent = {}
    for name, (method, tuning) in tunings.items():
        plan = {"network": "lite0", "network_options": {}, "inputs": [1, 32, 32], "outputs": 3, "tuning": tuning}
        state = compared(clinics, study(f"lite-{name}", method, rounds=2, score_every=1, plan=plan), sites)
        sent[name] = sum(leaf.numel() for leaf in state.params.values())
        if name != "full":
            assert all(leaf.startswith("_fc.") or ".lora_" in leaf for leaf in state.params)
    assert sent["probe"] == 1280 * 3 + 3
    assert sent["lora"] < 0.02 * sent["full"]
