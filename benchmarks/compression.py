"""Codecs on a DenseNet-121 and real X-rays: bytes, accuracy after training, CPU seconds.

``python benchmarks/compression.py PNEUMONIAMNIST.npz [--rounds 20] [--only int8 top-k]``. Four sites, drawn with label
skew from one hospital's images (so the split is simulated), FedAvg, one epoch a round. One line a codec, as it ends.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyclinic.compression.powersgd import PowerSGD
from polyclinic.compression.quantization import QSGD, BFloat16, Int8, LowRank, Sign
from polyclinic.compression.topk import TopK
from polyclinic.compression.zstd import Zstd
from polyclinic.core.aggregates import merge
from polyclinic.core.execution import execute
from polyclinic.core.pipeline import Transform, send_through
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification, auc
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg

CODECS: dict[str, tuple[Transform, ...]] = {
    "none": (),
    "zstd": (Zstd(),),
    "bf16": (BFloat16(),),
    "bf16 + zstd": (BFloat16(), Zstd()),
    "int8": (Int8(),),
    "int8 + zstd": (Int8(), Zstd()),
    "qsgd 127 + zstd": (QSGD(127), Zstd()),
    "qsgd 7 + zstd": (QSGD(7), Zstd()),
    "qsgd 1 + zstd": (QSGD(1), Zstd()),
    "sign": (Sign(),),
    "top 10 %": (TopK(0.1),),
    "top 10 %, shared": (TopK(0.1, shared=True),),
    "top 1 %": (TopK(0.01),),
    "top 1 %, shared": (TopK(0.01, shared=True),),
    "low rank .95-.98": (LowRank(0.95, 0.98, 20),),
    "low rank + int8 + zstd": (LowRank(0.95, 0.98, 20), Int8(), Zstd()),
    "power 4": (PowerSGD(4),),
    "power 4, shared": (PowerSGD(4, shared=True),),
}


training: list[float] = []


class Timed(LocalTraining):
    """Plain training that tells how long it took, so that the rest of a site's time is the codec's."""

    def fit(self, *given: Any, **more: Any) -> Any:
        """As ``LocalTraining``."""
        begun = time.process_time()
        found = super().fit(*given, **more)
        training.append(time.process_time() - begun)
        return found


class Rays:
    """Images of 28 × 28, padded to the 32 × 32 that DenseNet-121 needs."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        """From bytes and class numbers."""
        padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
        self.x = torch.from_numpy(padded).float().div_(255)[:, None]
        self.y = torch.from_numpy(labels.reshape(-1).astype(np.int64))

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index]


def sites_of(data: np.lib.npyio.NpzFile, each: int, seed: int = 0, device: str = "cpu") -> dict[str, Site]:
    """Four sites of ``each`` images, with 20, 40, 60 and 80 per cent of pneumonia."""
    rng = np.random.default_rng(seed)
    labels = data["train_labels"].reshape(-1)
    by_class = [list(rng.permutation(np.flatnonzero(labels == c))) for c in (0, 1)]
    sites = {}
    for k, share in enumerate((0.2, 0.4, 0.6, 0.8)):
        sick = round(share * each)
        chosen = [by_class[1].pop() for _ in range(sick)] + [by_class[0].pop() for _ in range(each - sick)]
        mine = {"train": Rays(data["train_images"][chosen], labels[chosen])}
        sites[f"site-{k}"] = Site(f"site-{k}", mine, device=device, seed=seed)
    return sites


def measure(images: Path, name: str, each: int, rounds: int, seed: int = 0, device: str = "cpu") -> dict[str, float]:
    """What the codec ``name`` costs, and how good the model is after ``rounds`` rounds with it."""
    with np.load(images) as data:
        sites, test = sites_of(data, each, seed, device), Rays(data["test_images"], data["test_labels"])
    task = Classification(Network("densenet121", (1, 32, 32), 2))
    method = send_through(FedAvg(task, Timed(batch_size=32, optimizer="adam", lr=1e-3)), *CODECS[name])
    state, memory = method.init(task.first(seed)), dict[str, Trees].fromkeys(sites, {})
    up, down, at_site, at_server = list[int](), list[int](), 0.0, 0.0
    training.clear()
    for _ in range(rounds):
        request, replies = method.request(state), []
        assert request is not None
        for site in sites.values():
            begun = time.process_time()
            reply, memory[site.name] = execute(method, request, memory[site.name], site)
            at_site += time.process_time() - begun
            replies.append(reply)
            up.append(reply.nbytes)
            down.append(request.nbytes(site.name))
        begun = time.process_time()
        state = method.server_update(state, merge(replies), Site("server"))
        at_server += time.process_time() - begun
    model, scores = cached_model(task, state.params, device).eval(), []
    with torch.inference_mode():
        for chunk in torch.arange(len(test)).split(128):
            scores.append(model(test[chunk][0].to(device)).softmax(1)[:, 1].cpu())
    score = torch.cat(scores)
    return {
        "MB up": sum(up) / len(up) / 1e6,
        "MB, last": up[-1] / 1e6,
        "MB down": sum(down) / len(down) / 1e6,
        "AUC": auc(score, test.y == 1) or float("nan"),
        "accuracy": float(((score > 0.5) == (test.y == 1)).float().mean()),
        "site s": (at_site - sum(training)) / (rounds * len(sites)),
        "server s": at_server / rounds,
    }


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--each", type=int, default=256, help="images at a site")
    parser.add_argument("--seeds", type=int, default=1, help="splits, each with another start")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", default=list(CODECS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"DenseNet-121; 4 sites x {given.each} images; {given.rounds} rounds")
    for name in given.only:
        for seed in range(given.seeds):
            found = measure(given.images, name, given.each, given.rounds, seed, given.device)
            told = "".join(f"  {column} {figure:.3f}" for column, figure in found.items())
            print(f"{name:<24} seed {seed}{told}", flush=True)


if __name__ == "__main__":
    main()
