"""Writes a run folder with invented numbers, shaped like a real one, to develop and test the report against."""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from safetensors.numpy import save_file

Sites: TypeAlias = Mapping[str, tuple[str, int, float, float, float]]
SITES: Sites = {  # name: (role, test patients, share of positives, how hard, shift of the log odds)
    "utrecht": ("training", 120, 0.45, 0.0, 0.0),
    "lyon": ("training", 63, 0.35, 0.2, 0.2),
    "boston": ("training", 180, 0.5, -0.2, -0.3),
    "nairobi": ("training", 24, 0.6, 0.8, 0.9),
    "osaka": ("external", 90, 0.4, 0.5, 0.5),
}
METHODS = {  # label: (name, title, skill by site class, citation, leaves)
    "local": ("local", "every site trains alone", 1.15, "", "Nothing: each site trains alone."),
    "pooled": ("pooled", "all data in one place", 1.75, "", "All training examples: the upper bound, not federated."),
    "fedavg": (
        "fedavg",
        "federated averaging",
        1.55,
        "McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017",
        "The change of the model's weights after local training, weighted by the number of examples.",
    ),
    "fedprox": (
        "fedprox",
        "sites held near where they started",
        1.58,
        "Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020",
        "The change of the model's weights after local training, weighted by the number of examples.",
    ),
    "fedbn": (
        "fedbn",
        "normalization layers stay at the sites",
        1.62,
        "Li et al., FedBN: Federated Learning on Non-IID Features via Local Batch Normalization, ICLR 2021",
        "The change of all weights but those of normalization layers, which stay at the site.",
    ),
}
ROUNDS = 12


def rng_of(*key: object) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(repr(k).encode()) for k in key])


def write_run(
    path: Path,
    task: str = "classification",
    sites: Sites | None = None,
    methods: Sequence[str] = tuple(METHODS),
    seeds: Sequence[int] = (0, 1, 2),
    simulated: str | None = "The split into sites was made by a program (Dirichlet, α = 0.5).",
    finished: bool = True,
    privacy: bool = True,
    images: int = 1,
) -> Path:
    sites = SITES if sites is None else sites
    path.mkdir(parents=True, exist_ok=True)
    metric = {
        "classification": "auc",
        "multilabel": "auc",
        "segmentation": "dice",
        "regression": "mae",
        "survival": "c_index",
        "reconstruction": "psnr",
    }[task]
    classes = {
        "classification": ["benign", "malignant"],
        "multilabel": ["effusion", "edema", "nodule"],
        "segmentation": ["nodule"],
        "regression": [],
        "survival": [],
        "reconstruction": [],
    }[task]
    (path / "study.toml").write_text(f'name = "made-up"\ntask = "{task}"\nrounds = {ROUNDS}\nseeds = {list(seeds)}\n')
    info = {
        "name": "made-up",
        "title": "Lung nodules from radiologists' outlines, five sites",
        "hash": "7f3c2a91",
        "created": "2026-11-23T09:14:00Z",
        "task": task,
        "classes": classes,
        "metric": metric,
        "higher_is_better": metric != "mae",
        "data": {
            "title": "Invented patients",
            "license": "CC0",
            "citation": "No Author, No Journal, 2026",
            "url": "https://example.org/data",
            "notes": ["Outlines drawn by radiologists, not CT pixels."],
            "simulated": simulated,
            "fingerprint": "02d2a756759902d2a7567599",
            "sites_are": "acquisition protocols",
        },
        "sites": [
            {
                "name": s,
                "role": role,
                "patients": {"test": n} | ({"train": 3 * n, "val": n // 2} if role == "training" else {}),
                "examples": {"test": n * images} | ({"train": 3 * n, "val": n // 2} if role == "training" else {}),
                "classes": {"train": [int(3 * n * (1 - p)), int(3 * n * p)], "test": [n - int(n * p), int(n * p)]},
            }
            for s, (role, n, p, _, _) in sites.items()
        ],
        "methods": [
            {
                "label": m,
                "name": METHODS[m][0],
                "title": METHODS[m][1],
                "options": {"mu": 0.01} if m == "fedprox" else {},
                "citation": METHODS[m][3],
                "leaves": METHODS[m][4],
            }
            for m in methods
        ],
        "rounds": ROUNDS,
        "seeds": list(seeds),
        "engine": {"kind": "workers", "workers": 2, "device": "cpu"},
        "environment": {"python": "3.11.2", "torch": "2.13.0", "polyclinic": "0.1.0", "platform": "Linux x86_64"},
        "parameters": 105_354,
    }
    (path / "run.json").write_text(json.dumps(info, indent=1))
    lines: list[dict[str, Any]] = []
    for m in methods:
        for seed in seeds:
            lines += _records(m, seed, sites, metric, finished)
            if finished or (m, seed) != (methods[-1], seeds[-1]):
                arm = path / "arms" / f"{m}-seed{seed}"
                arm.mkdir(parents=True, exist_ok=True)
                save_file(_predictions(m, seed, sites, task, images, "test"), arm / "predictions.safetensors")
                if task in ("classification", "survival"):
                    own = {s: v for s, v in sites.items() if v[0] == "training"}
                    save_file(_predictions(m, seed, own, task, images, "val"), arm / "validation.safetensors")
    if privacy and "fedprox" in methods:
        for s in [s for s, v in sites.items() if v[0] == "training"]:
            lines.append(
                {
                    "kind": "privacy",
                    "method": "fedprox",
                    "seed": 0,
                    "round": ROUNDS,
                    "site": s,
                    "epsilon": 2.0,
                    "delta": 1e-5,
                    "unit": "patient",
                    "adjacency": "add or remove one patient",
                    "assumes": ["the number of patients counts as public"],
                    "accountant": "PLD",
                }
            )
    (path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _records(m: str, seed: int, sites: Sites, metric: str, finished: bool) -> Iterator[dict[str, Any]]:
    training = [s for s, v in sites.items() if v[0] == "training"]
    rng, size = rng_of("records", m, seed), 0 if m in ("local", "cross") else 421_416
    best, trainers = {"local": 5}.get(m, 10), ["pooled"] if m == "pooled" else training
    for r in range(1, ROUNDS + 1):
        lost = {"nairobi": "no reply within 30 s"} if (m, seed, r) == ("fedavg", 0, 4) and "nairobi" in sites else {}
        yield {
            "kind": "round",
            "method": m,
            "seed": seed,
            "round": r,
            "wall": 1.9 + float(rng.uniform()),
            "seconds": {s: 0.9 + 0.05 * float(rng.uniform()) for s in trainers},
            "bytes_up": {s: size for s in trainers if s not in lost},
            "bytes_down": dict.fromkeys(trainers, size),
            "asked": trainers,
            "lost": lost,
        }
        for s in training:
            skill = METHODS[m][2] * (1 - np.exp(-r / 3)) - 0.25 * sites[s][3]
            value = 0.5 + 0.42 * np.tanh(0.62 * skill) + 0.008 * float(rng.normal())
            if metric == "mae":
                value = 12 * (1.05 - value)
            n = sites[s][1] // 2
            metrics = {metric: float(value), "loss": float(0.9 - 0.5 * skill / 2), "accuracy": float(value - 0.05)}
            yield {
                "kind": "scores",
                "method": m,
                "seed": seed,
                "round": r,
                "role": "val",
                "site": s,
                "metrics": metrics,
                "n": n,
            }
    if m == "fedprox" and seed == 1 and "lyon" in sites:
        yield {
            "kind": "quarantine",
            "method": m,
            "seed": seed,
            "round": 7,
            "site": "lyon",
            "reason": "update.head.weight holds 3 values that are not finite",
        }
    for s in sites:
        yield {"kind": "test", "method": m, "seed": seed, "round": best, "site": s, "metrics": {}, "n": sites[s][1]}
    yield {"kind": "sealed", "method": m, "seed": seed, "opened": 1}


def _predictions(m: str, seed: int, sites: Sites, task: str, images: int, role: str) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    y: np.ndarray
    for s, (_, n, share, hard, shift) in sites.items():
        n = n if role == "test" else max(n // 2, 2)
        base, noise = rng_of("patients", s, role), rng_of("noise", m, seed, s, role)
        patient = np.repeat(np.arange(n), images)
        skill = (
            METHODS[m][2] - hard * (0.9 if m != "local" else 0.45) + (0.25 if m == "fedbn" and s == "nairobi" else 0)
        )
        common, own = base.normal(size=n)[patient], noise.normal(size=len(patient)) * 0.35
        if task == "classification":
            y = np.zeros(n, np.int64)
            y[: round(share * n)] = 1
            y = base.permutation(y)[patient]
            logit = 1.3 * (skill * (y - 0.5) * 1.6 + common + own) + shift
            p = 1 / (1 + np.exp(-logit))
            found[f"{s}/score"], found[f"{s}/target"] = np.stack([1 - p, p], 1).astype(np.float32), y
        elif task == "multilabel":
            y = (base.uniform(size=(n, 3)) < share).astype(np.float32)[patient]
            logit = skill * (y - 0.5) * 1.6 + base.normal(size=(n, 3))[patient] + own[:, None]
            found[f"{s}/score"], found[f"{s}/target"] = (1 / (1 + np.exp(-logit))).astype(np.float32), y
        elif task == "regression":
            y = base.normal(60, 12, size=n)[patient]
            guess = y + (8 / max(skill, 0.4)) * (0.8 * common + own) + 2 * shift
            found[f"{s}/score"], found[f"{s}/target"] = guess[:, None].astype(np.float32), y[:, None].astype(np.float32)
        elif task == "survival":
            months = 20 * base.exponential(size=n)[patient] + 0.5
            seen = np.minimum(months, base.uniform(5, 60, size=n)[patient])
            risk = 1 / (1 + np.exp(-(0.6 * skill * (1 - np.log(months / 20)) + 0.5 * own + shift - 1)))
            times = np.array([6.0, 12.0, 24.0])
            found[f"{s}/score"] = (np.exp(-risk[:, None] * times / 12)).astype(np.float32)
            found[f"{s}/target"] = np.stack([seen, months <= seen], 1).astype(np.float32)
            found[f"{s}/times"] = np.tile(times, (len(patient), 1)).astype(np.float32)
        elif task == "reconstruction":
            db = (26 + 2 * skill + 1.5 * common + 0.5 * own)[:, None]
            found[f"{s}/psnr"], found[f"{s}/nmse"] = db.astype(np.float32), (10 ** (-db / 15)).astype(np.float32)
            found[f"{s}/ssim"] = (1 - 10 ** (-db / 30)).astype(np.float32)
        else:
            rng = np.clip(0.72 + 0.07 * skill + 0.1 * common + 0.05 * own, 0.02, 0.98)[:, None]
            empty = base.uniform(size=(n, 1))[patient] < 0.03 + 0.05 * max(hard, 0)
            rng[empty] = 0.0
            hd = np.where(empty, 67.9, 2 + 14 * (1 - rng))
            found[f"{s}/dice"], found[f"{s}/hd95"] = rng.astype(np.float32), hd.astype(np.float32)
            found[f"{s}/nsd"], found[f"{s}/empty"] = np.clip(rng + 0.08, 0, 1).astype(np.float32), empty
            found[f"{s}/volume_error"] = (np.abs(1 - rng) * 0.7).astype(np.float32)
        found[f"{s}/patient"] = patient
    return {k: np.ascontiguousarray(v) for k, v in found.items()}


def write_groups(path: Path) -> None:
    """Sex and age of the invented patients, by the numbers in their predictions; few say nothing of themselves."""
    from safetensors.numpy import load_file

    first = next(iter(sorted(path.glob("arms/*/predictions.safetensors"))))
    ids = sorted({int(i) for k, v in load_file(first).items() if k.endswith("/patient") for i in v})
    groups = {
        "sex": {"female": ids[::2], "male": ids[1::2]},
        "age": {"below 40": ids[:1], "40 to 59": ids[1::2], "60 to 74": ids[2::2]},
    }
    (path / "groups.json").write_text(json.dumps(groups))


def write_maps(path: Path, shape: tuple[int, ...] = (16, 16), method: str = "fedbn", seed: int = 0) -> None:
    """Where an invented model looks: at the middle, and at one site slightly off it."""
    training = [s["name"] for s in json.loads((path / "run.json").read_text())["sites"] if s["role"] == "training"]
    leaves, grid = {}, np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    for k, site in enumerate(training):
        bump = np.exp(-4 * ((grid - 0.2 * (k == 1)) ** 2).sum(0)) + 0.1 * rng_of("map", site).uniform(size=shape)
        leaves[f"{site}/map"] = (bump / bump.sum()).astype(np.float32)
        leaves[f"{site}/untrained"] = np.full(shape, 1 / np.prod(shape), np.float32) * rng_of(site).uniform(size=shape)
        leaves[f"{site}/patients"] = np.array([10 + k])
    names = "" if len(shape) > 1 else "\n".join(f"region {i}" for i in range(shape[0]))
    leaves = {k: np.ascontiguousarray(v, v.dtype) for k, v in leaves.items()}
    save_file(leaves, path / "arms" / f"{method}-seed{seed}" / "explanations.safetensors", {"features": names})


if __name__ == "__main__":
    import sys

    write_run(Path(sys.argv[1]), task=sys.argv[2] if len(sys.argv) > 2 else "classification")
