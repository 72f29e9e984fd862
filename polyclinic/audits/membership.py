"""Membership inference: can one tell from a model whether an example was trained on?

- Loss: Yeom, Giacomelli, Fredrikson and Jha, "Privacy Risk in Machine Learning", CSF 2018: members have smaller losses.
- LiRA: Carlini, Chien, Nasr, Song, Terzis and Tramèr, "Membership Inference Attacks From First Principles", S&P 2022,
  Algorithm 1 (online) and section V (offline), https://arxiv.org/abs/2112.03570, with one deviation for all examples,
  as they advise for few shadow models.
- RMIA: Zarifzadeh, Liu and Shokri, "Low-Cost High-Power Membership Inference Attacks", ICML 2024, equations 3 to 6,
  https://arxiv.org/abs/2312.03262.

All say how sure they are of each example; ``Found`` says how well that tells members apart. At low rates of false alarm
matters: an attacker who is sure of a few patients harms them, however poor it is on average.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.tasks.local import Local
from polyclinic.tasks.networks import Network
from polyclinic.tasks.task import Task, auc, borrow


@dataclass(frozen=True)
class Found:
    """How well an attack tells members apart.

    Attributes:
        auc: Area under the ROC curve; 0.5 is chance.
        tpr_at_1_percent: The share of members found where at most 1 % of others are taken for members.
        members: How many were tried. ``others``: how many that were not trained on.
    """

    auc: float
    tpr_at_1_percent: float
    members: int
    others: int

    @property
    def says(self) -> str:
        """In words, with what the numbers can bear."""
        few = "" if self.others >= 100 else f"; {self.others} others are too few for a rate of 1 %"
        return f"AUC {self.auc:.3f}, {self.tpr_at_1_percent:.1%} found at 1 % false alarms{few}"


def found(members: Tensor, others: Tensor) -> Found:
    """From scores [n] and [m], larger where an attack is surer of membership."""
    if not len(members) or not len(others):
        raise ValueError("membership needs examples that were trained on and examples that were not")
    score = torch.cat([members, others])
    truth = torch.cat([torch.ones(len(members)), torch.zeros(len(others))])
    area = auc(score, truth)
    assert area is not None
    allowed = int(0.01 * len(others))  # as many false alarms may be raised
    limit = others.sort(descending=True).values[allowed]
    return Found(area, float((members > limit).double().mean()), len(members), len(others))


def losses(task: Task, params: Tree, data: Any, index: Tensor | None = None, device: str = "cpu") -> Tensor:
    """The loss of each example of ``data`` alone. [n], float64."""
    model = borrow(task, params, device).eval()
    index = torch.arange(len(data)) if index is None else index
    each = []
    with torch.no_grad():
        for one in index.split(1):
            x, y = data[one]
            each.append(float(task.loss(model, (x.to(device), y.to(device)))))
    return torch.tensor(each, dtype=torch.float64).nan_to_num(1e30, 1e30)


def by_loss(task: Task, params: Tree, members: Any, others: Any, device: str = "cpu") -> Found:
    """The attack that needs nothing but the model: small losses are members'."""
    return found(-losses(task, params, members, device=device), -losses(task, params, others, device=device))


def confidence(task: Task, params: Tree, data: Any) -> Tensor:
    """p(y | x), the probability that a classifier gives to each example's class. [n], float64."""
    return torch.exp(-losses(task, params, data))


def stretched(p: Tensor) -> Tensor:
    """φ(p) = log p / (1 − p), which is close to normal over models. [...]"""
    p = p.clamp(1e-12, 1 - 1e-12)
    return p.log() - (1 - p).log()


class Shadows(NamedTuple):
    """Models trained on random halves of the examples at stake.

    Attributes:
        p: What each gives to each example's class, [models, n]. ``inside``: whether it was trained on it, bool.
    """

    p: Tensor
    inside: Tensor


def shadows(task: Task, local: Local, data: Any, count: int, seed: int = 0) -> Shadows:
    """Trains ``count`` models, each on half of ``data``, so that every example is in half of them."""
    p, inside = [], torch.zeros(count, len(data), dtype=torch.bool)
    for k in range(count):
        site = Site(f"shadow-{k}", seed=seed)
        if k % 2 == 0:
            order = torch.randperm(len(data), generator=site.rng("half"))
            half = order[: len(data) // 2]
        else:
            half = order[len(data) // 2 :]  # the other half, so that both kinds are there for everyone
        inside[k, half] = True
        end = local.fit(task, task.first(seed + k), site, 0, data=Part(data, half))
        p.append(confidence(task, end, data))
    return Shadows(torch.stack(p), inside)


def lira(target: Tensor, known: Shadows, *, online: bool = True) -> Tensor:
    """Scores [n] from the target's p [n].

    Online: log N(φ; μ_in, σ_in) − log N(φ; μ_out, σ_out). Offline, where no shadow may see the example: how far φ lies
    beyond what models that did not see it say, in deviations, which orders as the paper's Pr[Z > ...] does.
    """
    phi, all_ = stretched(target), stretched(known.p)
    mean_out, sigma_out = _moments(all_, ~known.inside)
    if not online:
        return (phi - mean_out) / sigma_out
    mean_in, sigma_in = _moments(all_, known.inside)
    return _log_normal(phi, mean_in, sigma_in) - _log_normal(phi, mean_out, sigma_out)


def rmia(target: Tensor, known: Shadows, population: Tensor, *, gamma: float = 2.0, a: float = 0.3) -> Tensor:
    """Scores [n], offline: the share of population examples z that x beats by γ in p(x | θ)/p(x) over p(z | θ)/p(z).

    p(x) = ((1 + a) p_out(x) + 1 − a) / 2, from models that did not see x; ``a`` makes up for those that would have.

    Args:
        target: p of every example, of which ``population`` [m] gives the positions of the z.
    """
    out = ~known.inside
    mean_out = (known.p * out).sum(0) / out.sum(0).clamp_min(1)
    ratio = target / ((1 + a) * mean_out + 1 - a).mul(0.5).clamp_min(1e-300)
    return (ratio[:, None] >= gamma * ratio[population][None, :]).double().mean(1)


@dataclass(frozen=True)
class Part:
    """Some examples of ``data``, by position."""

    data: Any
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Tensor) -> Any:
        return self.data[self.index[index]]


@dataclass(frozen=True)
class Shuffled:
    """The examples of ``data`` at the positions ``inputs``, with the targets of those at ``targets``."""

    data: Any
    targets: Tensor
    inputs: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: Tensor) -> Any:
        return self.data[self.inputs[index]][0], self.data[self.targets[index]][1]


@dataclass(frozen=True)
class Verdict:
    """What the loss tells of each site's examples, and of those that a control was made to memorise.

    Attributes:
        control: A network that memorised some examples, attacked in the same way.
        sites: By site.
    """

    control: Found
    sites: Mapping[str, Found]

    @property
    def says(self) -> str:
        """The verdict in a sentence."""
        if self.control.auc < 0.7:
            return "The attack did not even find what a network was made to memorise, so it shows nothing."
        worst = max(self.sites, key=lambda site: self.sites[site].auc)
        area = self.sites[worst].auc
        told = f"most at {worst} (AUC {area:.3f}; {self.control.auc:.3f} for a network made to memorise)"
        return f"Training examples can be told apart, {told}." if area > 0.6 else f"Little can be told, {told}."


def memorised(task: Task, params: Tree, data: Any, seed: int = 0, steps: int = 100, count: int = 16) -> Found:
    """The leaky control: a network is trained on some of ``data`` alone, again and again, then attacked likewise.

    Targets are dealt out anew among the examples, so that only memory helps. The network is fully connected, from
    random weights, since a small convolutional one may be unable to memorise; for masks it is a copy of the model.
    """
    site = Site("control", seed=seed)
    order = torch.randperm(len(data), generator=site.rng("half"))[: 2 * count]
    if len(order) < 2:
        raise ValueError("the control needs at least two examples")
    data = Shuffled(data, order[torch.randperm(len(order), generator=site.rng("targets"))], order)
    learned, left = torch.arange(len(order)).tensor_split(2)
    if task.kind in ("classification", "multilabel", "regression"):
        task = replace(task, network=Network("mlp", tuple(data[learned[:1]][0].shape[1:]), task.network.outputs))
        params = task.first(seed)
    hard = Local(steps=steps, batch_size=len(learned), optimiser="adam", lr=1e-2)
    end = hard.fit(task, params, site, 0, data=Part(data, learned))
    return by_loss(task, end, Part(data, learned), Part(data, left))


def _moments(values: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The mean by example [n] over the ``chosen`` models, and one deviation for all [] around these means."""
    count = chosen.sum(0)
    mean = (values * chosen).sum(0) / count.clamp_min(1)
    square = ((values - mean).square() * chosen).sum() / (count - 1).clamp_min(0).sum().clamp_min(1)
    return mean, square.sqrt().clamp_min(1e-6)


def _log_normal(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    return -((x - mean) / sigma).square() / 2 - sigma.log()
