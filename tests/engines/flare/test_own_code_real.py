"""Real processes, NVIDIA FLARE: the parts of a package, which the sites install, give the bits of one process."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polyclinic.core import extensions
from polyclinic.core.plugin_packages import exact_rule, packages_of
from polyclinic.core.site import Site
from polyclinic.engines.flare.protocol.run_request import RunRequest
from polyclinic.learning.networks import architectures
from polyclinic.studies.config.new_plugin import write_plugin
from polyclinic.testing import equal
from tests.conftest import little_sites
from tests.support.flare_deployment import POLICY, Hospitals, reference, study
from tests.support.local_deployment import TRAINING
from tests.support.plugin_package import installed

pytestmark = [pytest.mark.deploy, pytest.mark.slow]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """The skeleton of ``polyclinic new --plugin``, on the path of this process."""
    root = Path(tmp_path_factory.mktemp("packages"))
    write_plugin(root / "acme")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(installed(root / "acme")))
        extensions._loaded.cache_clear()
        architectures._foreign.cache_clear()
        yield [root / "acme"]
        for name in [name for name in sys.modules if name.split(".")[0] == "acme"]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def clinics(packages: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    """A server and three sites with the package, whose policies allow exactly this one."""
    pytest.importorskip("nvflare", reason="the extra [flare] is not installed")
    known = packages_of({"networks": ["acme-net"]})
    allowed = POLICY.replace("[allow]\n", f"[allow]\npackages = {[exact_rule(package) for package in known]}\n")
    made = Hospitals(Path(tmp_path_factory.mktemp("clinics")), policy=allowed)
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
