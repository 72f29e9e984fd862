"""A study between hospitals as data: what is requested of sites, and the run folder that is written from their results."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.core import serialization as states
from polyclinic.core.audit_log import Journal, verify
from polyclinic.engines.plan import Plan
from polyclinic.evaluation.records.method_runs import PLAN
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.methods import registry
from polyclinic.studies.config.study_config import Study, parse
from polyclinic.studies.run import deployment
from polyclinic.studies.run.run_directory import read_plan, read_tensors
from tests.support.start_weights import weights_of

TEXT = """
name = "spots"
title = "Is there a spot?"
rounds = 3
seeds = [3, 1]
sites_per_round = 2
min_replies = 2
deadline = 60
[data]
kind = "npz"
path = "pictures.npz"
patient = "patient"
external = ["osaka"]
split = [0.5, 0.2, 0.3]
[task]
network = "cnn"
options = { width = 4, depth = 2, norm = "group" }
[training]
lr = 0.1
batch_size = 8
[evaluation]
interval = 3
[[evaluation.compare]]
method = "far"
reference = "local"
[[methods]]
name = "fedprox"
label = "far"
mu = 0.5
training = { lr = 0.2 }
uplink = [{ name = "clip", bound = 2.0 }]
downlink = [{ name = "int8" }]
[[methods]]
name = "pooled"
[[methods]]
name = "local"
"""
ROLES = {"train": 7, "val": 3, "test": 4}


def described(classes: list[str], hidden: bool = False, **more: Any) -> dict[str, Any]:
    """What a site says of its data: some patients with two pictures each, in two classes."""
    roles = {r: {"patients": n, "examples": 2 * n, "classes": [n, n]} for r, n in ROLES.items()}
    if hidden:
        roles["val"] = {"patients": None, "examples": None, "classes": [None, None]}
    return {"inputs": [1, 8, 8], "outputs": 2, "classes": classes, "roles": roles} | more


def read(text: str = TEXT) -> Study:
    return parse(text)


def test_the_method_runs_have_all_that_the_study_says() -> None:
    found, notes = deployment.method_runs(read(), ("lyon", "osaka", "oslo"), {"inputs": [1, 8, 8], "outputs": 2})
    training = read().training_of(read().methods[2])
    common = {
        "kind": "classification",
        "network": "cnn",
        "rounds": 3,
        "task": {},
        "network_options": {"width": 4, "depth": 2, "norm": "group"},
        "sites": ["lyon", "oslo"],
        "inputs": [1, 8, 8],
        "outputs": 2,
    }
    far = {
        "method": "fedprox",
        "options": {"mu": 0.5},
        "training": training | {"lr": 0.2},
        "uplink": [{"name": "clip", "bound": 2.0}],
        "downlink": [{"name": "int8"}],
    }
    local = {"method": "local", "options": {}, "training": training, "uplink": []}
    assert training == {**training, "lr": 0.1, "batch_size": 8}
    assert found == [
        {"label": label, "seed": seed, "plan": common | own | {"seed": seed}, "external": external}
        for label, own, external in (("far", far, ["osaka"]), ("local", local, []))
        for seed in (3, 1)
    ]
    assert found == json.loads(json.dumps(found)), "as the sites receive them"
    assert notes == [
        "pooled is left out: it needs all data in one place, and here they stay at the sites",
        "[data] patient: not sent; each hospital says this of its own data, in its data.toml",
    ]
    assert "inputs" not in deployment.method_runs(read(), ("lyon", "osaka"))[0][0]["plan"]


def test_requests_share_the_settings_of_the_study() -> None:
    shared = {"sites_per_round": 2, "min_replies": 2, "deadline": 60.0, "data": {"split": [0.5, 0.2, 0.3]}}
    scored = {"best": {"metric": "auc", "higher": True}, "score_every": 3, "test": "predict/test"}
    assert deployment.how(read()) == shared | scored
    last = read(TEXT.replace("interval = 3", 'interval = 3\nselect = "last"\nmetric = "loss"'))
    assert deployment.how(last) == shared | scored | {"best": {}}
    lowest = read(TEXT.replace("interval = 3", 'interval = 3\nmetric = "loss"'))
    assert deployment.how(lowest)["best"] == {"metric": "loss", "higher": False}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "rounds = 3",
            "rounds = 3\nfolds = 3",
            r"the study cross-validates \(folds\), which it can on one machine only",
        ),
        (
            '[[methods]]\nname = "local"',
            '[[methods]]\nname = "local"\n[search]\ntrials = 2\n[search.space]\ntraining.lr = [0.1, 0.2]\n',
            r"searches for settings \(search\).*take \[search\] out",
        ),
        (
            "[evaluation]",
            "[machines]\nseconds_per_batch = 1.0\n[evaluation]",
            r"simulates machines \(machines\).*take \[machines\] out",
        ),
        (
            "[evaluation]",
            '[attack]\nname = "sign-flip"\nattackers = 1\n[evaluation]',
            r"simulates an attack \(attack\)",
        ),
        ("interval = 3", "interval = 3\npatience = 2", r"ends baselines early \(evaluation.patience\)"),
        (
            'external = ["osaka"]',
            'external = ["rome"]',
            "external site rome is not admitted; there are lyon, osaka, oslo",
        ),
        ('external = ["osaka"]', 'external = ["osaka"]\npublic = ["lyon"]', r"public images \(data.public\)"),
    ],
)
def test_what_needs_one_machine_is_refused_with_its_key(old: str, new: str, message: str) -> None:
    with pytest.raises(deployment.NotElsewhere, match=message):
        deployment.method_runs(read(TEXT.replace(old, new)), ("lyon", "osaka", "oslo"))


@pytest.mark.parametrize("name", ["case-statistics", "duplicate-search"])
def test_what_trains_no_model_is_not_scored(name: str) -> None:
    """Statistics of cases need no shape of an example either, which the sites would have to be asked for."""
    text = TEXT.partition("[[evaluation.compare]]")[0] + f'[[methods]]\nname = "{name}"\n'
    shared = deployment.how(read(text))
    assert (shared["best"], shared["score_every"], shared["test"]) == ({}, 0, "")
    (first, _), _ = deployment.method_runs(read(text), ("lyon", "osaka", "oslo"))
    if name == "duplicate-search":
        assert first["plan"]["network"] == "cnn"
        return
    none = {"network": "mlp", "network_options": {}, "task": {}, "inputs": [1], "outputs": 1, "kind": "classification"}
    assert none.items() <= first["plan"].items()
    assert Plan.from_json(json.dumps(first["plan"])).build_task().model()


def test_without_sites_nothing_can_run() -> None:
    with pytest.raises(deployment.NotElsewhere, match="osaka is not admitted; there are none yet"):
        deployment.method_runs(read(), ())
    inside = read(TEXT.replace('external = ["osaka"]', ""))
    with pytest.raises(deployment.NotElsewhere, match="no site can train: every admitted site is external, or none"):
        deployment.method_runs(inside, ())
    own = read().model_copy(update={"methods": read().methods[1:2]})
    with pytest.raises(deployment.NotElsewhere, match="no method is left: pooled is left out: it needs all data"):
        deployment.method_runs(own, ("lyon", "osaka", "oslo"))


def finished(root: Path, arm: dict[str, Any], predictions: bool) -> Path:
    """The server's folder of a finished run: three exchanges in the second round, and a test of the first."""
    root.mkdir()
    who = {"method": arm["label"], "seed": arm["seed"]}

    def exchange(job: str, round: int, site: str, **more: Any) -> dict[str, Any]:
        sums = {"bytes_up": {site: 10}, "bytes_down": {site: 4}, "seconds": {site: 1.5}}
        return (
            {"kind": "round", **who, "round": round, "job": job, "asked": [site], "lost": {}, "wall": 2.0} | sums | more
        )

    score = {"kind": "scores", **who, "round": 1, "role": "val", "site": "lyon", "metrics": {"auc": 0.5}, "n": 6}
    test = {"kind": "test", **who, "round": 1, "site": "lyon", "metrics": {"auc": 0.75}, "n": 8}
    lines = [
        exchange("train", 1, "lyon"),
        score,
        exchange("train", 1, "oslo", lost={"oslo": "no answer"}),
        exchange("more", 1, "oslo", bytes_down={"lyon": 1}),
        exchange("train", 2, "lyon"),
        test,
    ]
    (root / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    states.save(root / "model.safetensors", {"w": torch.arange(3.0)})
    if predictions:
        states.save(root / "predictions.safetensors", {"lyon/score": torch.ones(2, 2)})
        states.save(root / "validation.safetensors", {"lyon/score": torch.zeros(3, 2)})
    journal = Journal(root / "journal.jsonl")
    for event in ("begun", "finished"):
        journal.write(event)
    journal.close()
    return root


def collected(root: Path, study: Study, descriptions: dict[str, Any], **more: Any) -> tuple[dict[str, Any], list[str]]:
    """``run.json`` of the folder ``root / "out"``, and the method runs that are missing."""
    found, _ = deployment.method_runs(study, ("lyon", "oslo", "osaka"), {"inputs": [1, 8, 8], "outputs": 2})
    runs = {f"run-{i}": arm for i, arm in enumerate(found)}
    folders = {run: finished(root / run, arm, run == "run-0") for run, arm in runs.items() if run != "run-1"}
    missing = deployment.collect(study, TEXT, "the title", runs, descriptions, folders, root / "out", **more)
    return json.loads((root / "out" / "run.json").read_text()), missing


def test_a_run_folder_describes_the_study_its_sites_and_its_methods(tmp_path: Path) -> None:
    study = read()
    descriptions = {
        "lyon": described(["none", "spot"]),
        "oslo": described([], hidden=True),
        "osaka": described(["none", "spot"]),
    }
    info, missing = collected(tmp_path, study, descriptions)
    assert missing == ["far (seed 1)"]
    counts = {"patients": ROLES, "examples": {r: 2 * n for r, n in ROLES.items()}}
    classes = {r: [n, n] for r, n in ROLES.items()}
    every: dict[str, dict[str, Any]] = {**counts, "classes": classes}
    few = {key: {role: n for role, n in of.items() if role != "val"} for key, of in every.items()}
    network = Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2), ("norm", "group")))
    environment = info.pop("environment")
    assert {"polyclinic", "python", "torch"} <= environment.keys()
    assert info.pop("created").endswith("Z")
    about = {name: registry.entry(name) for name in ("fedprox", "local")}
    assert info == {
        "name": "the title",
        "title": "Is there a spot?",
        "hash": study.hash,
        "task": "classification",
        "classes": ["none", "spot"],
        "metric": "auc",
        "higher_is_better": True,
        "data": {
            "title": "the data of 3 hospitals",
            "notes": [
                "The data stayed at their hospitals, which ran this study over NVIDIA FLARE.",
                "oslo has a group with fewer patients than its policy allows to be counted.",
                "oslo named no classes, so the order of their classes was not checked.",
            ],
            "sites_are": "hospitals",
        },
        "sites": [
            {"name": "lyon", "role": "training", **counts, "classes": classes},
            {"name": "osaka", "role": "external", **counts, "classes": classes},
            {"name": "oslo", "role": "training", **few},
        ],
        "methods": [
            {
                "label": label,
                "name": name,
                "title": about[name].summary,
                "citation": about[name].paper,
                "leaves": about[name].leaves,
                "options": options,
            }
            for label, name, options in (
                ("far", "fedprox", {"mu": 0.5, "uplink": ["clip"], "downlink": ["int8"]}),
                ("local", "local", {}),
            )
        ],
        "rounds": 3,
        "seeds": [3, 1],
        "engine": {"kind": "flare"},
        "compare": [{"method": "far", "reference": "local", "kind": "difference"}],
        "inputs": [1, 8, 8],
        "outputs": 2,
        "parameters": sum(p.numel() for p in network().parameters()),
    }


def test_a_run_folder_has_the_records_models_and_journals_of_the_sites(tmp_path: Path) -> None:
    study = read()
    collected(tmp_path, study, {}, plan=b"version = 1")
    out = tmp_path / "out"
    assert (out / "study.toml").read_text() == TEXT
    assert (out / PLAN).read_bytes() == b"version = 1"
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    who = {"method": "far", "seed": 3}
    first, score, second, test = (r for r in records if (r["method"], r["seed"]) == ("far", 3))
    assert [r["method"] for r in records] == ["far"] * 4 + ["local"] * 8
    same = {"kind": "round", **who}
    assert first == same | {
        "round": 1,
        "asked": ["lyon"],
        "lost": {},
        "wall": 2.0,
        "bytes_up": {"lyon": 10},
        "bytes_down": {"lyon": 4},
        "seconds": {"lyon": 1.5},
    }
    assert second == same | {
        "round": 2,
        "asked": ["lyon", "oslo"],
        "lost": {"oslo": "no answer"},
        "wall": 6.0,
        "bytes_up": {"lyon": 10, "oslo": 20},
        "bytes_down": {"lyon": 5, "oslo": 4},
        "seconds": {"lyon": 1.5, "oslo": 3.0},
    }
    assert (score["kind"], score["site"], test["kind"], test["metrics"]) == ("scores", "lyon", "test", {"auc": 0.75})
    arm = out / "arms" / "far-seed3"
    assert {f.name for f in arm.iterdir()} == {f"{n}.safetensors" for n in ("model", "predictions", "validation")}
    assert [f.name for f in (out / "arms" / "local-seed1").iterdir()] == ["model.safetensors"]
    assert not (out / "arms" / "far-seed1").exists()
    assert torch.equal(read_tensors(arm / "model.safetensors")["w"], torch.arange(3.0))
    assert read_tensors(arm / "predictions.safetensors")["lyon/score"].sum() == 4
    assert read_tensors(arm / "validation.safetensors")["lyon/score"].shape == (3, 2)
    plan = deployment.method_runs(study, ("lyon", "oslo", "osaka"), {"inputs": [1, 8, 8], "outputs": 2})[0][0]["plan"]
    assert read_plan(arm / "model.safetensors") == Plan.from_json(json.dumps(plan))
    from safetensors import safe_open

    with safe_open(arm / "model.safetensors", "pt") as file:
        meta = file.metadata()
    assert {k: v for k, v in meta.items() if k != "plan"} == {"study": study.hash, "method": "far", "round": "1"}
    entries = list(verify(out / "journal.jsonl"))
    assert [(e["event"], e["method"], e["seed"], e["run"], e["entries"]) for e in entries] == [
        ("collected", label, seed, run, 2)
        for label, seed, run in (("far", 3, "run-0"), ("local", 3, "run-2"), ("local", 1, "run-3"))
    ]
    assert entries[0]["head"] == list(verify(tmp_path / "run-0" / "journal.jsonl"))[-1]["hash"]


@pytest.mark.parametrize(
    ("kind", "classes"),
    [("regression", []), ("classification", ["class 0", "class 1"]), ("multilabel", ["class 0", "class 1"])],
)
def test_without_descriptions_the_shape_is_that_of_the_plan(tmp_path: Path, kind: str, classes: list[str]) -> None:
    text = TEXT.replace("[task]", f'[task]\nkind = "{kind}"').replace('"Is there a spot?"', '""')
    info, _ = collected(tmp_path, read(text), {})
    assert (info["inputs"], info["outputs"], info["classes"], info["title"]) == ([1, 8, 8], 2, classes, "spots")
    assert info["data"]["notes"] == ["The data stayed at their hospitals, which ran this study over NVIDIA FLARE."]
    empty: dict[str, Any] = {"patients": {}, "examples": {}, "classes": {}}
    assert info["sites"][0] == {"name": "lyon", "role": "training", **empty}


def test_start_weights_grades_and_masks_are_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCLINIC_WEIGHTS", str(tmp_path / "weights"))
    weights_of(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2), ("norm", "group"))))
    info, _ = collected(tmp_path, read(TEXT.replace("[task]", '[task]\nweights = "given"\ntrain = ["head"]')), {})
    start = info["start"]
    assert (start["name"], start["train"]) == ("given", ["head"])
    assert 0 < start["trained"] == info["parameters"] < start["numbers"]
    (tmp_path / "grades").mkdir()
    grades = read(TEXT.replace("[task]", "[task]\nordered = true"))
    info, _ = collected(tmp_path / "grades", grades, {"lyon": described(["1", "2", "3"], outputs=3)})
    assert (info["ordered"], info["classes"]) == (True, ["1", "2", "3"])
    (tmp_path / "masks").mkdir()
    masks = TEXT.replace("[task]", '[task]\nkind = "segmentation"').replace('"cnn"', '"unet"')
    masks = masks.replace('width = 4, depth = 2, norm = "group"', "width = 8")
    info, _ = collected(tmp_path / "masks", read(masks), {})
    assert (info["space"], info["metric"]) == ("native", "dice")
    for kind, more in (("reconstruction", ""), ("survival", "\ncuts = [6, 18]")):
        (tmp_path / kind).mkdir()
        values = masks.replace('"segmentation"', f'"{kind}"{more}')
        values = values.replace('"unet"', '"mlp"').replace("width = 8", "width = 4") if kind == "survival" else values
        info, _ = collected(tmp_path / kind, read(values), {"lyon": described(["1", "2"])})
        assert info["classes"] == []
        assert "space" not in info
        assert info["outputs"] == 2
