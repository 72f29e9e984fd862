"""Random studies: each ends with a report, or with a reason in the words of Polyclinic.

Data, network, methods, training, transforms, attacks and machines of a study are drawn independently. Keys that the
validation refuses are removed, so that many studies run.
"""

import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyclinic.attacks.adversaries import ATTACKS
from polyclinic.cli.run import write_report
from polyclinic.compression.transform_table import TRANSFORMS
from polyclinic.core.toml_text import dumps
from polyclinic.errors import PolyclinicError
from polyclinic.methods.catalog import METHODS
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.study_config import Study, parse
from polyclinic.studies.run.scheduler import run
from tests.support.small_runs import stopped_and_resumed

TASKS = {
    "two": "classification",
    "three": "classification",
    "labels": "multilabel",
    "numbers": "regression",
    "masks": "segmentation",
    "volumes": "classification",
    "table": "classification",
    "survival": "survival",
    "scans": "reconstruction",
}
NETWORKS = {"segmentation": "unet", "reconstruction": "residual-unet", "survival": "mlp", "table": "mlp"}
REQUIRED = {
    "clip": {"bound": 1.0},
    "adaptive-clip": {"start": 1.0},
    "gaussian": {"multiplier": 1.0},
    "top-k": {"fraction": 0.2},
}
PARTITIONS: tuple[Any, ...] = (
    {"partition": "iid", "count": 3},
    {"partition": "dirichlet", "count": 3, "least": 5, "alpha": 1.0},
    {"partition": "pathological", "count": 2, "classes": 1},
    "sex",
)
TRAINING: dict[str, tuple[Any, ...]] = {
    "epochs": (2,),
    "steps": (2,),
    "optimizer": ("adam", "adamw"),
    "momentum": (0.9,),
    "weight_decay": (0.001,),
    "lr_decay": (0.9,),
    "warmup_rounds": (1,),
    "cosine_rounds": (3,),
    "clip_norm": (1.0,),
    "schedule": ("poly",),
    "keep_optimizer": (True, False),
    "balance": (0.5, 1.0),
    "balance_patients": (True,),
    "nesterov": (True,),
    "milestones": ([1],),
    "private": ({"noise": 1.0}, {"noise": 1.0, "unit": "record"}),
}
TABLES: dict[str, tuple[Any, ...]] = {
    "folds": (2, "sites"),
    "sites_per_round": (1, 2),
    "min_replies": (2,),
    "privacy": ({"epsilon": 50.0, "delta": 1e-5}, {"epsilon": 1.0, "delta": 1e-5, "unit": "site"}),
    "machines": ({"seconds_per_batch": 1.0, "drop_out": 0.3}, {"up": 1e5, "minutes": 5.0, "seconds_per_batch": 1.0}),
    "attack": tuple({"name": name, "attackers": 1} for name in ATTACKS),
    "augmentation": ({"recipe": "light"}, {"recipe": "nnunet"}, {"recipe": "picture"}),
    "search": ({"trials": 2, "space": {"training.lr": [0.01, 0.1]}},),
}
DATA: dict[str, tuple[Any, ...]] = {
    "sites": PARTITIONS,
    "external": (["a"],),
    "unlabeled": (0.5,),
    "public": (["c"],),
    "scanners": (1.0,),
    "duplicates": ("drop",),
    "max_patients": (12,),
    "split": ([0.5, 0.2, 0.3],),
}
TASK: dict[str, tuple[Any, ...]] = {
    "class_weights": ([1.0, 2.0],),
    "label_smoothing": (0.1,),
    "ordered": (True,),
    "regions": ([[1, 2], [2]],),
    "batch_dice": (True,),
    "window": ([8, 8],),
    "hazards": ("proportional",),
    "residual": (False,),
}
EVALUATION: dict[str, tuple[Any, ...]] = {
    "interval": (2,),
    "select": ("last",),
    "metric": ("accuracy", "auc", "loss", "dice", "mae", "ibs", "psnr"),
    "subgroups": (["sex"],),
    "patience": (1,),
    "lesions": (True,),
}
SEEDS = (2, 10, 12, 18, 21, 23, 25, 27, 29, 39, 41, 50)
"""Studies that run, in less than a second. Draw others if the catalog of methods changes what these seeds draw."""
ERRORS = re.compile(r"failed: (?!(Config|Data|Protocol)Error)\w+")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small data sets of three sites, of each kind of task."""
    folder, rng, n = tmp_path_factory.mktemp("data"), np.random.default_rng(0), 72
    label, about = np.arange(n) % 2, {"site": np.repeat(["a", "b", "c"], n // 3), "patient": np.arange(n) // 2}
    columns: dict[str, Any] = {**about, "sex": np.where(rng.random(n) < 0.5, "f", "m")}
    columns["patient"] = [f"p{i}" for i in about["patient"]]

    def images(*shape: int) -> np.ndarray[Any, Any]:
        light = 40 * label.reshape(n, *[1] * len(shape))
        return (rng.normal(100, 30, (n, *shape)) + light).clip(0, 255).astype(np.uint8)

    masks = np.zeros((n, 32, 32), np.uint8)
    masks[:, 8:20, 10:22], masks[:, 16:24, 18:24] = 1, 2
    targets: dict[str, tuple[np.ndarray[Any, Any], dict[str, Any]]] = {
        "two": (images(16, 16), {"labels": label}),
        "three": (images(16, 16, 3), {"labels": np.arange(n) % 3}),
        "labels": (images(16, 16), {"labels": np.stack([label, np.arange(n) // 2 % 2, np.arange(n) // 4 % 2], 1)}),
        "numbers": (images(16, 16), {"labels": rng.normal(0, 1, n).astype(np.float32)}),
        "masks": (images(32, 32), {"masks": masks}),
        "volumes": (images(8, 8, 8), {"labels": label}),
        "scans": (images(32, 32), {"labels": label}),
    }
    for name, (pixels, target) in targets.items():
        np.savez(folder / f"{name}.npz", images=pixels, **target, **columns)
    rows = ["site,patient,label,time,event,sex,x1,x2"]
    for i in range(n):
        x1, x2, time = *rng.normal(label[i], 1, 2), rng.exponential(500) + 1
        event = int(rng.random() < 0.6)
        rows.append(f"{about['site'][i]},p{i},{label[i]},{time:.1f},{event},{columns['sex'][i]},{x1:.4f},{x2:.4f}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    return folder


def random_study(folder: Path, rng: random.Random) -> dict[str, Any]:
    """Draw a study, which may be one that is refused."""
    kind = rng.choice(sorted(TASKS))

    def some(options: dict[str, tuple[Any, ...]], share: float) -> dict[str, Any]:
        return {key: rng.choice(values) for key, values in options.items() if rng.random() < share}

    def transform() -> dict[str, Any]:
        name = rng.choice(sorted(TRANSFORMS))
        return {"name": name, **REQUIRED.get(name, {})}

    found: dict[str, Any] = {"path": str(folder / f"{kind}.npz"), "kind": "npz"}
    task: dict[str, Any] = {"kind": TASKS[kind], "network": NETWORKS.get(kind, NETWORKS.get(TASKS[kind], "cnn"))}
    if kind in ("table", "survival"):
        found = {"path": str(folder / "table.csv"), "kind": "table", "features": ["x1", "x2"]}
        found |= {"label": "label"} if kind == "table" else {"label": "time", "event": "event"}
    if kind == "numbers":
        found["regression"] = True
    if kind == "scans":
        found["accelerate"] = 4.0
    if kind == "survival":
        task["cuts"] = [200.0, 600.0, 1200.0]
    possible = [name for name, entry in METHODS.items() if not entry.tasks or task["kind"] in entry.tasks]
    methods: list[dict[str, Any]] = [{"name": name} for name in rng.sample(sorted(possible), rng.choice([1, 1, 2]))]
    for method in methods:
        if rng.random() < 0.3:
            method |= {"uplink": [transform() for _ in range(rng.choice([1, 1, 2]))]}
        if rng.random() < 0.2:
            method |= {"training": some(TRAINING, 0.1)}
    return {
        "name": "random",
        "rounds": rng.choice([1, 2, 3]),
        **some({key: TABLES[key] for key in ("folds", "sites_per_round", "min_replies")}, 0.1),
        "data": found | some(DATA, 0.12),
        "task": task | some(TASK, 0.08),
        "training": {"batch_size": rng.choice([1, 4, 16, 100]), "lr": 0.01, **some(TRAINING, 0.1)},
        **some({key: values for key, values in TABLES.items() if isinstance(values[0], dict)}, 0.12),
        "evaluation": some(EVALUATION, 0.12),
        "engine": {"kind": "in-process", "threads": rng.choice([0, 0, 2])},
        "methods": methods,
    }


def repaired(text: str) -> tuple[Study, str]:
    """Return a study without the lines that the validation refuses; the heading of a table means all its lines."""
    for _ in range(8):
        try:
            return parse(text), text
        except BadStudy as error:
            lines, wrong = text.split("\n"), {line for line, _, _ in error.lines}
            for n in sorted(wrong):
                if lines[n - 1].startswith("[") and not lines[n - 1].startswith("[["):
                    end = next((k for k in range(n, len(lines)) if lines[k].startswith("[")), len(lines))
                    wrong |= {
                        k + 1 for k in range(n, end) if not re.match("kind|network|cuts|path|label|event", lines[k])
                    }
            wrong = {n for n in wrong if not re.match(r"\[|name|kind|path|rounds", lines[n - 1])}
            if not wrong:
                raise
            text = "\n".join(line for n, line in enumerate(lines, 1) if n not in wrong)
    return parse(text), text


def outcome(folder: Path, seed: int, out: Path) -> str:
    """Run a random study and write its report; return "ran", "refused" if Polyclinic gives a reason, or what went wrong."""
    text, said = dumps(random_study(folder, random.Random(seed))), ""
    try:
        study, text = repaired(text)
        for event in run(study, text, out):
            said += str(event.lost)
        write_report(out)
        found = "ran"
    except PolyclinicError as error:
        found, said = "refused", str(error)
    except Exception as error:
        return f"seed {seed}: {type(error).__name__}: {error}\n{text}"
    return f"seed {seed}: {said}\n{text}" if ERRORS.search(said) else found


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_study_ends_with_a_report_or_a_reason(seed: int, data: Path, tmp_path: Path) -> None:
    assert outcome(data, seed, tmp_path / "run") == "ran"


@pytest.mark.slow
@pytest.mark.parametrize("group", range(10))
def test_many_random_studies(group: int, data: Path, tmp_path: Path) -> None:
    """At least a quarter of them run."""
    found = list[str]()
    for seed in range(100 + 20 * group, 120 + 20 * group):
        found.append(outcome(data, seed, tmp_path / "run"))
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert set(found) <= {"ran", "refused"}, "\n".join(found)
    assert found.count("ran") >= 5


RANDOM = ("gaussian", "sparse-vector", "uncalibrated-noise", "adaptive-clip", "secure-sum", "private")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(400, 440))
def test_a_random_study_has_the_same_bits_after_a_stop_and_with_workers(seed: int, data: Path, tmp_path: Path) -> None:
    """Privacy's noise is drawn anew; what uses it is left out."""
    text = dumps(random_study(data, random.Random(seed)))
    try:
        study, text = repaired(text)
        if any(f'"{name}"' in text or f"{name} =" in text for name in RANDOM):
            pytest.skip("draws other noise each time")
        for _ in run(study, text, tmp_path / "once"):
            pass
    except PolyclinicError:
        pytest.skip("refused")
    stopped_and_resumed(text, tmp_path / "resumed", 1 + seed % 4)
    workers = text.replace('kind = "in-process"', 'kind = "workers"\nworkers = 2\nparallel = "sites"')
    for _ in run(parse(workers), workers, tmp_path / "workers"):
        pass
    files = sorted(path.relative_to(tmp_path / "once") for path in (tmp_path / "once").glob("arms/*/model.safetensors"))
    assert files
    for other in ("resumed", "workers"):
        for file in files:
            assert (tmp_path / other / file).read_bytes() == (tmp_path / "once" / file).read_bytes(), (other, file)
