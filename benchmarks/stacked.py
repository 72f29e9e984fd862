"""Training of 100 small sites one after the other, and stacked by ``torch.func.vmap``: CPU time and rounding.

Both take the same SGD steps from the same model on the same batches, each in plain PyTorch, so that the ratio is an upper bound of what
stacking could gain in a round. Decision record 15 uses the numbers.

    python benchmarks/stacked.py
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

SITES, LR, MOMENTUM = 100, 0.05, 0.9
Params = dict[str, Tensor]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))


def cnn() -> nn.Module:
    stages: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32)):
        stages += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(4, after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))


@dataclass
class Work:
    """A model, and the batches of all sites: inputs [sites, steps, batch, ...] and classes [sites, steps, batch]."""

    model: nn.Module
    inputs: Tensor
    classes: Tensor

    def __post_init__(self) -> None:
        self.start = {name: leaf.detach().clone() for name, leaf in self.model.named_parameters()}

    def one_after_another(self) -> Params:
        """Return the parameters [sites, ...] after training each site in turn."""
        done: list[Params] = []
        for inputs, classes in zip(self.inputs, self.classes, strict=True):
            with torch.no_grad():
                for name, leaf in self.model.named_parameters():
                    leaf.copy_(self.start[name])
            optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=MOMENTUM)
            for x, y in zip(inputs, classes, strict=True):
                optimizer.zero_grad()
                F.cross_entropy(self.model(x), y).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            done.append({name: leaf.detach().clone() for name, leaf in self.model.named_parameters()})
        return {name: torch.stack([params[name] for params in done]) for name in self.start}

    def stacked(self) -> Params:
        """Return the parameters [sites, ...] after training all sites at once."""

        def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(self.model, params, (x,)), y)

        gradients = vmap(grad(loss))
        params = {name: leaf.expand(len(self.inputs), *leaf.shape).clone() for name, leaf in self.start.items()}
        velocity = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
        for step in range(self.inputs.shape[1]):
            for name, change in gradients(params, self.inputs[:, step], self.classes[:, step]).items():
                velocity[name].mul_(MOMENTUM).add_(change)
                params[name].sub_(velocity[name], alpha=LR)
        return params


def cpu_ms(train: Callable[[], Params], times: int = 3) -> float:
    """Return the median CPU time of ``train`` for each site, in milliseconds."""
    spent = []
    for _ in range(times):
        begun = time.process_time()
        train()
        spent.append(time.process_time() - begun)
    return 1000 * statistics.median(spent) / SITES


def main() -> None:
    """Compare both, for tables and small images."""
    torch.set_num_threads(1)
    for name, model, shape, batch, steps in (
        ("mlp", mlp, (30,), 20, 1),
        ("mlp", mlp, (30,), 20, 10),
        ("cnn", cnn, (1, 14, 14), 16, 3),
        ("cnn", cnn, (1, 28, 28), 8, 5),
        ("cnn", cnn, (1, 28, 28), 32, 3),
    ):
        torch.manual_seed(0)
        inputs, classes = torch.randn(SITES, steps, batch, *shape), torch.randint(0, 2, (SITES, steps, batch))
        work = Work(model(), inputs, classes)
        one, all_ = work.one_after_another(), work.stacked()
        apart = max(float((one[leaf] - all_[leaf]).abs().max()) for leaf in one)
        alone, together = cpu_ms(work.one_after_another), cpu_ms(work.stacked)
        line = {"model": name, "input": shape, "batch": batch, "steps": steps, "ms one by one": round(alone, 3)}
        line |= {"ms stacked": round(together, 3), "gain": round(alone / together, 2), "largest difference": apart}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
