"""What ε costs on real X-rays: ``python benchmarks/privacy_cost.py PNEUMONIAMNIST.npz [--epsilons 1 3 8]``.

A small network with group normalization, four sites with a quarter of the training images each, FedAvg, DP-SGD that
protects every image (the set does not state patients). Training without noise is first. One line per ε, when it ends.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification, auc
from polyclinic.learning.training.dp_sgd import DPSGD
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.privacy.accounting import plan

NETWORK = Network("cnn", (1, 28, 28), 2, (("width", 8), ("depth", 3), ("norm", "group")))


class Rays:
    """Images and their labels."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        """From bytes and class numbers."""
        self.x = torch.from_numpy(images).float().div_(255)[:, None]
        self.y = torch.from_numpy(labels.reshape(-1).astype(np.int64))

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--epsilons", type=float, nargs="*", default=[1.0, 3.0, 8.0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with np.load(given.images) as data:
        order = np.random.default_rng(0).permutation(len(data["train_labels"]))
        images, labels = data["train_images"][order], data["train_labels"][order]
        sites = {f"site-{k}": Site(f"site-{k}", {"train": Rays(images[k::4], labels[k::4])}) for k in range(4)}
        test = Rays(data["test_images"], data["test_labels"])
    task = Classification(NETWORK)
    units = min(len(site.data["train"]) for site in sites.values())
    rate, steps, delta = given.batch / units, -(-units // given.batch), 1e-4
    print(f"{units} images a site, batch {given.batch}, {given.rounds} rounds of {steps} steps, δ = {delta:g}")
    print(f"{'ε':>6}{'noise':>8}{'AUC, mean':>11}{'least':>7}{'most':>7}   of {given.seeds} seeds")
    for epsilon in [None, *given.epsilons]:
        noise = 0.0 if epsilon is None else plan(epsilon, delta, rate, given.rounds, steps=steps).noise
        local = (
            LocalTraining(batch_size=given.batch, lr=0.1, momentum=0.9)
            if epsilon is None
            else (DPSGD(batch_size=given.batch, lr=0.5, momentum=0.9, noise=noise, bound=0.5, unit="record"))
        )
        areas = []
        for seed in range(given.seeds):
            method = FedAvg(task, local)
            state = method.init(task.first(seed))
            for step in train(method, InProcess(method, sites, seed=seed), state, rounds=given.rounds):
                state = step.state
            model = cached_model(task, state.params).eval()
            with torch.inference_mode():
                areas.append(auc(model(test.x).softmax(1)[:, 1], test.y == 1) or 0.0)
        label = "∞" if epsilon is None else f"{epsilon:g}"
        print(
            f"{label:>6}{noise:>8.3f}{sum(areas) / len(areas):>11.3f}{min(areas):>7.3f}{max(areas):>7.3f}", flush=True
        )


if __name__ == "__main__":
    main()
