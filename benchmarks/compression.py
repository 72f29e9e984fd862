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

from polyclinic.core import tree
from polyclinic.core.execute import execute
from polyclinic.core.pipeline import Transform, send_through
from polyclinic.core.site import Site
from polyclinic.core.stats import merge
from polyclinic.core.tree import Trees
from polyclinic.methods.fedavg import FedAvg
from polyclinic.tasks.classification import Classification
from polyclinic.tasks.local import Local
from polyclinic.tasks.networks import Network
from polyclinic.tasks.task import auc, borrow
from polyclinic.transforms.compression import QSGD, BFloat16, Int8, LowRank, Sign
from polyclinic.transforms.powersgd import PowerSGD
from polyclinic.transforms.topk import TopK
from polyclinic.transforms.zstd import Zstd

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


class Timed(Local):
    """Plain training that tells how long it took, so that the rest of a site's time is the codec's."""

    def fit(self, *given: Any, **more: Any) -> Any:
        """As ``Local``."""
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


def sites_of(data: np.lib.npyio.NpzFile, each: int) -> dict[str, Site]:
    """Four sites of ``each`` images, with 20, 40, 60 and 80 per cent of pneumonia."""
    dice = np.random.default_rng(0)
    labels = data["train_labels"].reshape(-1)
    by_class = [list(dice.permutation(np.flatnonzero(labels == c))) for c in (0, 1)]
    sites = {}
    for k, share in enumerate((0.2, 0.4, 0.6, 0.8)):
        sick = round(share * each)
        chosen = [by_class[1].pop() for _ in range(sick)] + [by_class[0].pop() for _ in range(each - sick)]
        sites[f"site-{k}"] = Site(f"site-{k}", {"train": Rays(data["train_images"][chosen], labels[chosen])})
    return sites


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--each", type=int, default=256, help="images at a site")
    parser.add_argument("--only", nargs="*", default=list(CODECS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    with np.load(given.images) as data:
        sites, test = sites_of(data, given.each), Rays(data["test_images"], data["test_labels"])
    task = Classification(Network("densenet121", (1, 32, 32), 2))
    first = task.first(0)
    print(f"DenseNet-121, {tree.size(first):,} numbers; 4 sites x {given.each} images; {given.rounds} rounds")
    columns = ("MB up", "MB, last", "MB down", "AUC", "accuracy", "site s", "server s")
    print(f"{'codec':<24}" + "".join(f"{column:>10}" for column in columns))
    for name in given.only:
        method = send_through(FedAvg(task, Timed(batch_size=32, optimiser="adam", lr=1e-3)), *CODECS[name])
        state, memory = method.init(first), dict[str, Trees].fromkeys(sites, {})
        up, down, at_site, at_server = list[int](), list[int](), 0.0, 0.0
        for _ in range(given.rounds):
            ask, replies = method.ask(state), []
            assert ask is not None
            for site in sites.values():
                begun = time.process_time()
                reply, memory[site.name] = execute(method, ask, memory[site.name], site)
                at_site += time.process_time() - begun
                replies.append(reply)
                up.append(reply.nbytes)
                down.append(ask.nbytes(site.name))
            begun = time.process_time()
            state = method.server_update(state, merge(replies), Site("server"))
            at_server += time.process_time() - begun
        model, scores = borrow(task, state.params).eval(), []
        with torch.inference_mode():
            for chunk in torch.arange(len(test)).split(128):
                scores.append(model(test[chunk][0]).softmax(1)[:, 1])
        score = torch.cat(scores)
        area = auc(score, test.y == 1) or float("nan")
        right = float(((score > 0.5) == (test.y == 1)).float().mean())
        count = given.rounds * len(sites)
        codec = (at_site - sum(training)) / count
        figures = (sum(up) / len(up) / 1e6, up[-1] / 1e6, sum(down) / len(down) / 1e6, area, right, codec,
                   at_server / given.rounds)  # fmt: skip
        print(f"{name:<24}" + "".join(f"{figure:>10.3f}" for figure in figures), flush=True)
        training.clear()


if __name__ == "__main__":
    main()
