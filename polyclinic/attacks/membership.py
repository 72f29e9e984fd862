"""Membership inference: can a patient's use in training be inferred from a model?

- Loss: Yeom, Giacomelli, Fredrikson and Jha, "Privacy Risk in Machine Learning", CSF 2018: members have smaller losses,
  https://arxiv.org/abs/1709.01604.
- LiRA: Carlini, Chien, Nasr, Song, Terzis and Tramèr, "Membership Inference Attacks From First Principles", S&P 2022,
  Algorithm 1 (online) and section V (offline), https://arxiv.org/abs/2112.03570, with one variance for all examples,
  as they advise for few shadow models. Their published code uses medians; this uses means.
- RMIA: Zarifzadeh, Liu and Shokri, "Low-Cost High-Power Membership Inference Attacks", ICML 2024, equations 3 to 6,
  https://arxiv.org/abs/2312.03262.

Each attack gives every example a score, larger if membership is more certain. ``by_patient`` averages over a patient's
examples, since patients, not images, are members; ``separation`` measures how well scores separate members from others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyclinic.attacks.separation import Detectable, Found, detectable, found
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.statistics.multiple_tests import holm

__all__ = ["Found", "Verdict", "by_loss", "by_patient", "found", "lira", "losses", "memorized", "rmia", "shadows"]

SIGNIFICANT = 0.05
"""Probability with which a verdict may call a model leaky that is not, over all its tests together."""
ABLE = 0.75
"""A comparison that would miss an AUC of this size is reported as too small."""


def losses(task: Task, params: Tree, data: Any, index: Tensor | None = None, device: str = "cpu") -> Tensor:
    """Compute the loss of each example of ``data`` alone from the network's output in float64. [n], float64.

    The loss of a confident network is below the resolution of float32, and the attacks depend on such differences.
    """
    model = _Precise(cached_model(task, params, device).eval())
    index = torch.arange(len(data)) if index is None else index
    each = []
    with torch.no_grad():
        for one in index.split(1):
            x, y = data[one]
            each.append(float(task.loss(model, (x.to(device), y.to(device)))))
    return torch.tensor(each, dtype=torch.float64).nan_to_num(1e30, 1e30)


class _Precise(nn.Module):
    """A network whose outputs are float64."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        output = self.model(x)
        return output.double() if isinstance(output, Tensor) else type(output)(part.double() for part in output)


def by_loss(task: Task, params: Tree, members: Any, others: Any, device: str = "cpu") -> Found:
    """Attack with the model's losses alone: members have small ones. Each example is its own patient."""
    return found(-losses(task, params, members, device=device), -losses(task, params, others, device=device))


def by_patient(scores: Tensor, patients: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Return the mean score [p] of each patient's examples, and the patients in order of their names."""
    names = sorted(set(patients))
    place = {patient: i for i, patient in enumerate(names)}
    of = torch.tensor([place[patient] for patient in patients], dtype=torch.long)
    sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, of, scores.double())
    return sums / of.bincount(minlength=len(names)), tuple(names)


def confidence(loss: Tensor) -> Tensor:
    """Return ``p(y | x)``, the classifier's probability of each example's class. [...]"""
    return torch.exp(-loss)


def log_odds(loss: Tensor) -> Tensor:
    """Return ``φ = log p / (1 − p)``, p = exp(−loss), nearly normal over models (Carlini et al., section IV-C). [...]

    Computed from the loss, because 1 − p loses precision if p is close to 1.
    """
    loss = loss.clamp(1e-15, 700.0)
    return -loss - (-torch.expm1(-loss)).log()


class Shadows(NamedTuple):
    """Losses of models trained on random halves of the patients.

    Attributes:
        loss: Loss of each example under each model, [models, n].
        inside: Whether the model was trained on the example, bool.
    """

    loss: Tensor
    inside: Tensor


def halves(patients: Sequence[str], count: int, seed: int = 0, sites: Sequence[str] | None = None) -> Tensor:
    """Draw the members of ``count`` halves: bool [count, n]. A half has all examples of a patient, or none.

    Every second half is the complement of the previous one. If ``count`` is even, each patient is in half of them.

    Args:
        patients: The patient of each of the n examples.
        count: Number of halves.
        seed: Seed of the halves.
        sites: The site of each example; every site is divided separately.
    """
    where = list(sites) if sites is not None else [""] * len(patients)
    whose = list(zip(where, patients, strict=True))
    inside = torch.zeros(count, len(whose), dtype=torch.bool)
    for k in range(count):
        chosen: set[tuple[str, str]] = set()
        for site in sorted(set(where)):
            names = sorted({one for one in whose if one[0] == site})
            rng = Site(f"shadow-{k - k % 2}", seed=seed).rng("half", site)
            order, half = torch.randperm(len(names), generator=rng).tolist(), len(names) // 2
            chosen |= {names[i] for i in (order[:half] if k % 2 == 0 else order[half:])}
        inside[k] = torch.tensor([one in chosen for one in whose])
    return inside


def shadows(
    train: Callable[[int, Tensor], Tensor],
    patients: Sequence[str],
    count: int,
    seed: int = 0,
    sites: Sequence[str] | None = None,
) -> Shadows:
    """Return the losses of ``count`` models, each trained on a random half of the patients.

    Args:
        train: Trains model k on the examples at given indices, and returns its loss [n] on every example.
        patients: The patient of each of the n examples.
        count: Number of models: even, and at least 4.
        seed: Seed of the halves.
        sites: The site of each example; every site is divided separately.

    Raises:
        ValueError: If ``count`` is odd or below 4, so that no deviation could be estimated.
    """
    if count < 4 or count % 2:
        raise ConfigError(f"shadow models come in pairs, at least 2 pairs: give 4, 6, 8, ..., not {count}")
    inside = halves(patients, count, seed, sites)
    return Shadows(torch.stack([train(k, inside[k].nonzero().flatten()) for k in range(count)]), inside)


def lira(target: Tensor, known: Shadows, *, online: bool = True) -> Tensor:
    """Compute LiRA scores [n] from the target's loss [n] of each example.

    Online: ``log N(φ; μ_in, σ_in) − log N(φ; μ_out, σ_out)``. Offline, if no shadow model may use the example: the
    distance of φ from the mean of models without the example, in standard deviations; same order as ``Pr[Z > ...]``.
    """
    phi, all_ = log_odds(target), log_odds(known.loss)
    mean_out, sigma_out = _moments(all_, ~known.inside)
    if not online:
        return (phi - mean_out) / sigma_out
    mean_in, sigma_in = _moments(all_, known.inside)
    return _log_normal(phi, mean_in, sigma_in) - _log_normal(phi, mean_out, sigma_out)


def rmia(target: Tensor, known: Shadows, population: Tensor, *, gamma: float = 1.0, a: float = 0.3) -> Tensor:
    """Compute offline RMIA scores [n]: the share of z whose p(z | θ)/p(z) is at most 1/γ times p(x | θ)/p(x).

    ``p(x) = ((1 + a) p_out(x) + 1 − a) / 2`` from models without x; ``a`` corrects for the missing models with x.

    Args:
        target: The target's loss of every example, of which ``population`` [m] gives the indices of the z.
        known: The shadow models.
        population: Indices of examples on which the target was not trained.
        gamma: γ ≥ 1; 1 as in the authors' code. With few z a larger one makes many scores equal.
        a: 0.3 is the authors' choice if no other model can be attacked to tune it.
    """
    out, p = ~known.inside, confidence(target)
    mean_out = (confidence(known.loss) * out).sum(0) / out.sum(0).clamp_min(1)
    ratio = p / ((1 + a) * mean_out + 1 - a).mul(0.5).clamp_min(1e-300)
    return (ratio[:, None] >= gamma * ratio[population][None, :]).double().mean(1)


@dataclass(frozen=True)
class Part:
    """A subset of ``data``, by index."""

    data: Any
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Tensor) -> Any:
        return self.data[self.index[index]]


@dataclass(frozen=True)
class Shuffled:
    """The examples of ``data`` at the indices ``inputs``, with the targets of those at ``targets``."""

    data: Any
    targets: Tensor
    inputs: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: Tensor) -> Any:
        return self.data[self.inputs[index]][0], self.data[self.targets[index]][1]


@dataclass(frozen=True)
class Verdict:
    """Results of attacks on each site's patients, and on examples that a control was trained to memorize.

    Attributes:
        control: Result of the loss attack on a network that memorized some examples.
        sites: Result of each attack, by site and attack.
    """

    control: Found
    sites: Mapping[str, Mapping[str, Found]]

    @property
    def adjusted(self) -> dict[tuple[str, str], tuple[float, float]]:
        """By site and attack, the adjusted p-values of the AUC and of the exposure of a few members.

        Holm's adjustment over both tests of every attack at every site.
        """
        keys = [(site, attack) for site, attacks in self.sites.items() for attack in attacks]
        each = [p for site, attack in keys for p in _p_values(self.sites[site][attack])]
        right = holm(each)
        return {key: (right[2 * i], right[2 * i + 1]) for i, key in enumerate(keys)}

    @property
    def leaky(self) -> bool:
        """Whether training patients can be distinguished at any site."""
        return any(min(pair) <= SIGNIFICANT for pair in self.adjusted.values())

    def detectable(self, site: str) -> Detectable:
        """Return the smallest leak that would have been detected at ``site`` if it alone leaked."""
        tests = 2 * sum(len(attacks) for attacks in self.sites.values())
        one = next(iter(self.sites[site].values()))
        return detectable(one.members, one.others, SIGNIFICANT / tests)

    @property
    def says(self) -> str:
        """The result in sentences."""
        if self.control.p_auc > SIGNIFICANT:
            return "The attack did not detect even what a network was trained to memorize, so it shows nothing."
        if leaks := self._leaks():
            return "Training patients can be distinguished: " + "; ".join(leaks) + "."
        able = [site for site in self.sites if (self.detectable(site).auc or 1.0) <= ABLE]
        few = [site for site in self.sites if site not in able]
        sentences = []
        if able:
            sentences.append(f"No attack distinguished training patients at {', '.join(able)}: {self._limits(able)}.")
        if few:
            sentences.append(f"Inconclusive, with too few patients, at {', '.join(few)}: {self._limits(few)}.")
        return " ".join(sentences)

    def _leaks(self) -> list[str]:
        """Return the significant results, the most significant first, one for each site and kind."""
        leaks: dict[tuple[str, str], tuple[float, str]] = {}
        for (site, attack), pair in self.adjusted.items():
            one = self.sites[site][attack]
            above = "every patient" if not one.allowed else f"all but {one.allowed} of the patients"
            area = f"at {site} by {attack}, AUC {one.auc:.3f} ({one.low:.3f} to {one.high:.3f})"
            few = f"at {site} by {attack}, {one.exposed} of {one.members} score above {above} not trained on"
            for kind, p, text in (("auc", pair[0], area), ("few", pair[1], few)):
                if p <= SIGNIFICANT and p < leaks.get((site, kind), (1.0, ""))[0]:
                    leaks[site, kind] = p, f"{text} (adjusted p {'< 0.001' if p < 0.001 else f'= {p:.3f}'})"
        return [text for _, text in sorted(leaks.values())]

    def _limits(self, sites: Sequence[str]) -> str:
        """Describe the smallest leak that would have been detected at each of ``sites``."""
        each = [self.detectable(site) for site in sites]
        one = {site: next(iter(self.sites[site].values())) for site in sites}
        areas = [d.auc for d in each]
        shares = [None if d.exposed is None else d.exposed / one[s].members for d, s in zip(each, sites, strict=True)]
        area = None if None in areas else max(a for a in areas if a is not None)
        share = None if None in shares else max(s for s in shares if s is not None)
        if area is None and share is None:
            return "no result could have shown anything"
        seen = [] if area is None else [f"an AUC of {area:.2f} or more"]
        seen += [] if share is None else [f"{100 * share:.0f} % of the training patients exposed with certainty"]
        return f"{', or '.join(seen)}, would have been detected; less may have been missed"


def _p_values(one: Found) -> tuple[float, float]:
    return one.p_auc, one.p_exposed


def memorized(task: Task, params: Tree, data: Any, seed: int = 0, steps: int = 100, count: int = 16) -> Found:
    """Run the positive control: train a network repeatedly on some of ``data`` alone, then attack it by its losses.

    Targets are permuted among the examples, so that only memorization helps. The network is fully connected with random
    initial weights, since a small convolutional one may be unable to memorize; for masks it is a copy of the model.
    """
    site = Site("control", seed=seed)
    order = torch.randperm(len(data), generator=site.rng("half"))[: 2 * count]
    if len(order) < 2:
        raise ConfigError("the control needs at least two examples")
    data = Shuffled(data, order[torch.randperm(len(order), generator=site.rng("targets"))], order)
    learned, left = torch.arange(len(order)).tensor_split(2)
    if task.kind in ("classification", "multilabel", "regression", "survival"):
        task = replace(task, network=Network("mlp", tuple(data[learned[:1]][0].shape[1:]), task.network.outputs))
        params = task.first(seed)
    hard = LocalTraining(steps=steps, batch_size=len(learned), optimizer="adam", lr=1e-2)
    end = hard.fit(task, params, site, 0, data=Part(data, learned))
    return by_loss(task, end, Part(data, learned), Part(data, left))


def _moments(values: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean by example [n] over the ``chosen`` models, and a common standard deviation [] around it."""
    count = chosen.sum(0)
    mean = (values * chosen).sum(0) / count.clamp_min(1)
    square = ((values - mean).square() * chosen).sum() / (count - 1).clamp_min(0).sum().clamp_min(1)
    return mean, square.sqrt().clamp_min(1e-6)


def _log_normal(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    return -((x - mean) / sigma).square() / 2 - sigma.log()
