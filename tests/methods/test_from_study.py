"""Every method runs from a study file by its name: in process, over workers, and after being stopped, to the bit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.weights.store import VARIABLE
from polyclinic.methods.catalog import METHODS
from polyclinic.methods.frozen_networks import NEEDS
from polyclinic.methods.published_settings import PUBLISHED
from polyclinic.studies.config.method_study import with_method
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.scheduler import run
from tests.support.small_runs import facts, same
from tests.support.start_weights import weights_of

# What a method is run with where its defaults would take long on a few tiny images, and what it cannot do without.
OPTIONS: Mapping[str, str] = {
    "vafl": "epochs = 1",
    "stain-norm": "epochs = 1\nexchanges = 1",
    "fedreplay": "epochs = 1\nexamples = 8",
    "histofl": "noise = 0.0",  # which nobody can repeat
    "fedad": "distil_epochs = 1",
    "feddf": "distil_epochs = 1",
    "fcl": "queue = 16\nexchange = 4",
    "fedmoco": "queue = 16",
    "krum": "corrupt = 0.0",
    "multi-krum": "corrupt = 0.0",
    "bulyan": "corrupt = 0.0",
    "fl-mrcm": 'target = "e"',
    "fednorm": 'modalities = ["mr", "ct", "mr"]',
    "flora": "ranks = [1, 2, 1, 2, 1]",
}
IMAGES = 'kind = "npz"\nsites = "site"\nmin_patients = 1\n'
UNET = 'network = "unet"\noptions = { width = 2, norm = "batch" }'
OTHER = ("histofl", "fcl", "fedcy")
"""Methods for classification that need bags, heights or videos."""
ADAPTERS = [name for name, (parts, _) in NEEDS.items() if "adapters" in parts]
# By kind of data: the [data] table, the [task] table, and the methods that are run on it.
KINDS: Mapping[str, tuple[str, str, Sequence[str]]] = {
    "images": (
        IMAGES + 'external = ["d"]\npublic = ["p"]\nunlabeled = 0.25\nannotations = { c = "none" }',
        'network = "cnn"\noptions = { width = 4, depth = 2, dropout = 0.2 }',
        [
            n
            for n, e in METHODS.items()
            if (not e.tasks or "classification" in e.tasks) and n not in (*ADAPTERS, *OTHER)
        ],
    ),
    "adapters": (
        IMAGES + 'external = ["d"]',
        'network = "cnn"\noptions = { width = 4, depth = 2 }\nweights = "given"\nlora = { rank = 2 }',
        [name for name in ADAPTERS if name != "flora"],
    ),
    "adapters and their layers": (
        IMAGES + 'external = ["d"]',
        'network = "cnn"\noptions = { width = 4, depth = 2 }\nweights = "given"\nlora = { rank = 2 }\n'
        'train = ["adapters", "head", "*.base.weight"]',
        ["flora"],
    ),
    "masks": (
        IMAGES
        + 'public = ["p"]\nposition = "height"\nannotations = { a = "full", b = "boxes", c = "labels", d = "none", e = "full" }',
        'kind = "segmentation"\n' + UNET,
        ["fedavg", "fedmix", "fedsemi", "fcl", "feddf", "feddg", "fedsm", "iop-fl"],
    ),
    "masks of all": (IMAGES, 'kind = "segmentation"\n' + UNET, ["lc-fed", "ditto", "fedbn", "feda3i"]),
    "fast scans": (
        IMAGES + 'accelerate = 4.0\ncenter = 0.2\nexternal = ["d"]',
        'kind = "reconstruction"\n' + UNET,
        ["pooled", "fedavg", "fedmri", "fl-mrcm", "silobn"],
    ),
    "bags": (IMAGES, 'network = "attention-mil"\noptions = { width = 8, attention = 4 }', ["histofl", "fedprox"]),
    "videos": (
        IMAGES + 'patient = "video"\nvideo = "video"\nunlabeled = 0.5',
        'network = "cnn"\noptions = { width = 4, depth = 2 }',
        ["fedcy", "fedavg"],
    ),
    "labels": (
        IMAGES + 'public = ["p"]',
        'kind = "multilabel"\noptions = { width = 4, depth = 2 }',
        ["site-graph", "fedmd", "split", "u-split", "fedni", "fedmlp"],
    ),
}
SLOW = ("images", "masks", "masks of all", "fast scans", "labels")


@pytest.fixture(autouse=True)
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "weights"))
    weights_of(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2))))


def npz(folder: Path, kind: str) -> Path:
    """Six sites with a few noisy images each, brighter where there is something to find."""
    rng, side, sites = (
        np.random.default_rng(0),
        8 if kind in ("images", "adapters", "adapters and their layers", "labels", "videos") else 16,
        "abcdep",
    )
    n = (24 if side == 8 else 12) * len(sites)
    classes = rng.integers(0, 2, n)
    grid = np.indices((side, side)) - side / 2 + 0.5
    masks = ((grid**2).sum(0) < (side / 4) ** 2) * classes[:, None, None]
    images = (rng.normal(100, 30, (n, side, side)) + 60 * masks).clip(0, 255).astype(np.uint8)
    arrays: dict[str, Any] = {"images": images, "site": np.array(list(sites))[np.arange(n) % len(sites)]}
    if kind.startswith("masks"):
        arrays |= {"masks": masks.astype(np.uint8), "height": np.arange(n) / n}
    elif kind == "labels":
        arrays["labels"] = np.stack([classes, 1 - classes, classes], 1).astype(np.float32)
    else:
        arrays["labels"] = classes
    if kind == "bags":
        arrays["images"] = images.astype(np.float32) / 255
    if kind == "videos":  # six frames each
        arrays["video"] = np.array([f"{i % len(sites)}-{i // (6 * len(sites))}" for i in range(n)])
    folder.mkdir(exist_ok=True)
    path = folder / "small.npz"
    np.savez(path, **arrays)
    return path


def text(folder: Path, kind: str, names: Sequence[str], engine: str = "in-process") -> str:
    data, task, _ = KINDS[kind]
    methods = "\n".join(f'[[methods]]\nname = "{name}"\n{OPTIONS.get(name, "")}\n' for name in names)
    return (
        f'name = "every-method"\nrounds = 2\n[data]\npath = "{npz(folder, kind)}"\n{data}\n[task]\n{task}\n'
        f'[training]\nbatch_size = 6\nlr = 0.01\n[engine]\nkind = "{engine}"\nworkers = 2\nparallel = "sites"\n{methods}'
    )


def whole(study: str, path: Path) -> list[dict[str, Any]]:
    """Runs a study to its end. Nobody may be lost on the way."""
    list(run(parse(study), study, path))
    found = facts(path)
    lost = [(f["method"], f["lost"]) for f in found if f["kind"] == "round" and f["lost"]]
    assert not lost, "\n".join(map(str, lost))
    return found


def test_every_method_is_run_here() -> None:
    assert {name for _, _, names in KINDS.values() for name in names} == METHODS.keys()


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in KINDS])
def test_by_name(kind: str, tmp_path: Path) -> None:
    """In process, from beginning to end; every site but the public one is tested."""
    check(kind, KINDS[kind][2], tmp_path)


def test_some_by_name(tmp_path: Path) -> None:
    """Of those that take long, a few: an average, site states, the server's images, a merge of heads."""
    check("images", ["fedavg", "scaffold", "feddf", "split"], tmp_path)
    check("fast scans", ["silobn"], tmp_path / "scans")


@pytest.mark.parametrize("name", [n if n == "cfl" else pytest.param(n, marks=pytest.mark.slow) for n in PUBLISHED])
def test_a_study_with_published_settings_is_run(name: str, tmp_path: Path) -> None:
    """``polyclinic new --method``: one round of the method and the baselines, with the settings that it writes."""
    kind = next(kind for kind, (_, _, names) in KINDS.items() if name in names)
    study = with_method(text(tmp_path, kind, [name]).replace("rounds = 2", "rounds = 1"), name)
    found = whole(study, tmp_path / "run")
    rounds = [f["method"] for f in found if f["kind"] == "round"]
    assert rounds.count(name) == 1
    assert name in {f["method"] for f in found if f["kind"] == "test"}


def check(kind: str, names: Sequence[str], tmp_path: Path) -> None:
    """Runs ``names`` on one kind of data."""
    found = whole(text(tmp_path, kind, names), tmp_path / "run")
    for name in names:
        tested = {f["site"] for f in found if f["kind"] == "test" and f["method"] == name}
        expected = set("abcde")
        if not METHODS[name].newcomers:  # it has no model for a site that did not train
            expected -= {"d"} if "external" in KINDS[kind][0] else set()
            expected -= {"c"} if kind == "images" else set()
        assert expected <= tested, name
        assert "p" not in tested or "public" not in KINDS[kind][0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_over_workers_and_after_a_stop_in_every_arm(kind: str, tmp_path: Path) -> None:
    """Each arm is left after its first round and taken up again by the other engine."""
    names = KINDS[kind][2]
    whole(text(tmp_path, kind, names), tmp_path / "whole")
    study = text(tmp_path, kind, names, "workers")
    resume, seen, stopped = False, "", set[str]()
    while seen != "end":
        events = run(parse(study), study, tmp_path / "parts", resume)
        for event in events:
            seen = "end"
            if event.what == "round" and event.label not in stopped:
                stopped.add(event.label)
                seen = "stopped"
                break
        events.close()
        resume = True
    assert stopped == set(names)
    assert same(tmp_path / "whole", tmp_path / "parts")
