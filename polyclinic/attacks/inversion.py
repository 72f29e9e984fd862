"""Gradient inversion: reconstruction of an image from the gradient that a site computed on it.

- DLG: Zhu, Liu and Han, "Deep Leakage from Gradients", NeurIPS 2019, Algorithm 1, https://arxiv.org/abs/1906.08935:
  searches an image whose gradient is as close as possible to the true one, by L-BFGS, here with a line search, without
  which it often diverges.
- Cosine distance and total variation: Geiping, Bauermeister, Dröge and Moeller, "Inverting Gradients", NeurIPS 2020,
  equation 4, by Adam on signs, https://arxiv.org/abs/2003.14053.
- Statistics of batch normalization, and the relative data leakage value: Hatamizadeh, Yin, Molchanov, Myronenko, Li,
  Dogra, Feng, Flores, Kautz, Xu and Roth, "Do Gradient Inversion Attacks Make Federated Learning Unsafe?", IEEE TMI
  2023, https://arxiv.org/abs/2202.06924. The formula of the value was not checked against the paper: RDLV =
  (SIM(x, x̂) − SIM(x, prior)) / SIM(x, prior). It measures the recovery beyond the prior, the attacker's guess
  without the gradient.

These attacks fail on many networks for reasons of optimization alone, so a failure proves little. ``audit`` therefore
first shows that the attack succeeds on a small network that is known to leak the image.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.learning.networks.model_tree import BATCH_NORMS, gradient, trainable
from polyclinic.learning.tasks.image_quality import psnr, ssim


@dataclass(frozen=True)
class Inversion:
    """Settings of the attacker's search.

    Attributes:
        match: ``l2`` with L-BFGS (DLG), or ``cosine`` with Adam on signs of the gradient (Geiping).
        steps: Number of steps; each L-BFGS step has up to 20 evaluations.
        lr: Learning rate of the search.
        restarts: Number of random starts; the result with the closest gradient is returned.
        variation: Weight of total variation.
        statistics: Weight of the distance from known batch statistics.
    """

    match: Literal["l2", "cosine"] = "l2"
    steps: int = 60
    lr: float = 1.0
    restarts: int = 3
    variation: float = 0.0
    statistics: float = 0.0

    def search(
        self,
        model: nn.Module,
        loss: Any,
        seen: Tree,
        shape: tuple[int, ...],
        target: Tensor,
        rng: torch.Generator,
        batches: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, float]:
        """Return the inputs [b, *shape] with the closest gradient, and its distance from ``seen``.

        Args:
            model: The model, in the mode in which the site computed. It is not changed.
            loss: Function of (model, (inputs, targets)), as a task's.
            seen: The gradient by parameter name.
            target: The targets [b, ...], known or inferred.
            batches: Mean and variance of the input of each batch normalization, by its name.
        """
        model, best = copy.deepcopy(model), (torch.zeros(len(target), *shape), math.inf)
        for _ in range(self.restarts):
            start = torch.randn(len(target), *shape, generator=rng)
            x, distance = self._descend(model, loss, seen, start.requires_grad_(), target, batches or {})
            if distance < best[1] and bool(x.isfinite().all()):
                best = x, distance
        return best

    def _descend(
        self,
        model: nn.Module,
        loss: Any,
        seen: Tree,
        x: Tensor,
        target: Tensor,
        batches: Mapping[str, tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, float]:
        signs = self.match == "cosine"
        optimizer: torch.optim.Optimizer = (
            torch.optim.Adam([x], self.lr)
            if signs
            else torch.optim.LBFGS(
                [x], self.lr, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
            )
        )
        best = x.detach().clone(), math.inf

        def closure() -> Tensor:
            nonlocal best
            optimizer.zero_grad()
            with _entering(model) as entered:
                own = _gradient(model, loss(model, (x, target)))
            distance = _distance(own, seen, self.match)
            if (now := float(distance.detach())) < best[1]:
                best = x.detach().clone(), now
            total = distance + self.variation * total_variation(x)
            for name, (mean, var) in batches.items() if self.statistics else ():
                m, v = entered.moments(name)
                total = total + self.statistics * ((m - mean).square().sum() + (v - var).square().sum())
            total.backward()  # type: ignore[no-untyped-call]
            if signs and x.grad is not None:
                x.grad.sign_()
            return total

        for _ in range(self.steps):
            value: Any = optimizer.step(closure)  # type: ignore[arg-type]
            if not math.isfinite(float(value.detach())):
                break
        return best


def batch_statistics(before: Tree, after: Tree, momentum: float = 0.1) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean and variance (n − 1) of the batch between two states of a model, by normalization layer.

    ``running ← (1 − m) running + m batch``, so an update with running statistics reveals those of the batch.
    """
    statistics = {}
    for name in before:
        if name.endswith("running_mean"):
            layer = name.removesuffix("running_mean")
            pair = [
                (after[layer + k] - (1 - momentum) * before[layer + k]) / momentum
                for k in ("running_mean", "running_var")
            ]
            statistics[layer.removesuffix(".")] = (pair[0], pair[1])
    return statistics


def obscured(seen: Tree, noise: float, rng: torch.Generator, clip: float | None = None) -> Tree:
    """Clip ``seen`` to norm ``clip`` and add noise of deviation ``noise`` · clip, as differential privacy does.

    Without ``clip``, ``noise`` is relative to the root mean square of the gradient's entries.
    """
    length = tree.norm(seen)
    if clip is None:
        deviation = noise * length / math.sqrt(tree.size(seen))
    else:
        deviation, seen = noise * clip, tree.scale(seen, min(1.0, clip / max(length, 1e-300)))
    return {name: leaf + deviation * torch.randn(leaf.shape, generator=rng) for name, leaf in seen.items()}


def total_variation(x: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbors along each axis of [b, C, *spatial]; 0 for tables."""
    steps = [x.diff(dim=d).abs().mean() for d in range(2, x.dim()) if x.shape[d] > 1]
    return torch.stack(steps).sum() if steps else x.new_zeros(())


def relative_leakage(truth: Tensor, drawn: Tensor, prior: Tensor) -> float:
    """Return RDLV of one image [C, *spatial]: 0 if the reconstruction is as similar as the prior, negative if less."""
    floor, reached = (float(ssim(image[None], truth[None])) for image in (prior, drawn))
    return (reached - floor) / max(abs(floor), 0.01)


@dataclass(frozen=True)
class Leak:
    """The reconstruction of one image.

    Attributes:
        psnr_db: PSNR of the reconstruction, in dB.
        guess_db: PSNR of the prior, in dB.
        rdlv: The relative data leakage value.
        image: The reconstruction, [C, *spatial].
    """

    psnr_db: float
    guess_db: float
    rdlv: float
    image: Tensor


@dataclass(frozen=True)
class Verdict:
    """The attack on one image in one gradient, and on the same image in a network that is known to leak.

    Attributes:
        control: Result for the control, without defense.
        found: Result for the audited model.
    """

    control: Leak
    found: Leak

    @property
    def says(self) -> str:
        """The result in a sentence."""
        result = f"{self.found.psnr_db:.1f} dB compared with {self.control.psnr_db:.1f} dB from a network known to leak"
        result += f" and {self.found.guess_db:.1f} dB for a guess"
        if self.control.psnr_db < max(20.0, self.control.guess_db + 6):
            return f"The attack did not succeed even on the control, so it shows nothing ({result})."
        if self.found.psnr_db > self.found.guess_db + 3:
            return f"The example leaks ({result})."
        return f"This attack recovered nothing beyond a guess ({result}); a stronger one might."


def leak(
    model: nn.Module,
    loss: Any,
    x: Tensor,
    target: Tensor,
    prior: Tensor,
    how: Inversion,
    rng: torch.Generator,
    *,
    noise: float = 0.0,
    clip: float | None = None,
) -> Leak:
    """Attack the gradient of one example x [1, *shape], with its target [1, ...] known to the attacker."""
    seen: Tree = {name: leaf.detach() for name, leaf in gradient(loss(model, (x, target)), model).items()}
    if noise or clip is not None:
        seen = obscured(seen, noise, rng, clip)
    drawn, _ = how.search(model, loss, seen, tuple(x.shape[1:]), target, rng)
    return Leak(float(psnr(drawn, x)), float(psnr(prior[None], x)), relative_leakage(x[0], drawn[0], prior), drawn[0])


def leaky(shape: tuple[int, ...], classes: int, rng: torch.Generator, width: int = 32) -> nn.Module:
    """Build the control: a small sigmoid network with weights from U(−0.5, 0.5), whose gradients reveal the image."""
    size = math.prod(shape)
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, width), nn.Sigmoid(), nn.Linear(width, classes))
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.copy_(torch.rand(leaf.shape, generator=rng) - 0.5)
            if leaf.dim() == 2 and leaf.shape[1] == size:
                leaf.mul_(min(1.0, 8 / math.sqrt(size)))  # otherwise large images saturate the sigmoids
    return model.eval()


def audit(
    model: nn.Module,
    loss: Any,
    x: Tensor,
    target: Tensor,
    prior: Tensor,
    how: Inversion = Inversion(),
    *,
    seed: int = 0,
    noise: float = 0.0,
    clip: float | None = None,
) -> Verdict:
    """Attack the gradient of ``model`` on one example, after a control has shown that the attack works on its image.

    Args:
        x: The image, [1, *shape].
        target: The target, as the task has it.
        prior: [*shape], such as the mean of other images.
        noise: Noise of the defense, as in ``obscured``. The control has no defense.
        clip: Clipping norm of the defense, as in ``obscured``.
    """
    rng = Site("attacker", seed=seed).rng("inversion")
    control_model = leaky(tuple(x.shape[1:]), 4, rng)
    control_loss = lambda m, batch: F.cross_entropy(m(batch[0]), batch[1])  # noqa: E731
    gentle = replace(how, match="l2", lr=1.0, variation=0.0, statistics=0.0, steps=max(how.steps, 60), restarts=2)
    control = leak(control_model, control_loss, x, torch.tensor([1]), prior, gentle, rng)
    return Verdict(control, leak(model, loss, x, target, prior, how, rng, noise=noise, clip=clip))


def _gradient(model: nn.Module, value: Tensor) -> Tree:
    names, parameters = zip(*trainable(model).items(), strict=True)
    gradients = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, g, p in zip(names, gradients, parameters, strict=True)}


def _distance(own: Tree, seen: Tree, match: str) -> Tensor:
    """Return ``‖∇ − ∇*‖² / ‖∇*‖²``, or ``1 − cos ∠(∇, ∇*)``."""
    square = torch.stack([seen[name].square().sum() for name in own]).sum().clamp_min(1e-30)
    if match == "l2":
        return torch.stack([(leaf - seen[name]).square().sum() for name, leaf in own.items()]).sum() / square
    inner = torch.stack([(leaf * seen[name]).sum() for name, leaf in own.items()]).sum()
    norm = torch.stack([leaf.square().sum() for leaf in own.values()]).sum().clamp_min(1e-30)
    return 1 - inner / (norm * square).sqrt()


class _entering:  # noqa: N801
    """Records the input of each batch normalization of ``model``."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: dict[str, Tensor] = {}
        self.hooks = [
            module.register_forward_pre_hook(lambda _, given, name=name: self.seen.__setitem__(name, given[0]))
            for name, module in model.named_modules()
            if isinstance(module, BATCH_NORMS)
        ]

    def __enter__(self) -> "_entering":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def moments(self, name: str) -> tuple[Tensor, Tensor]:
        """Return mean and variance by channel."""
        x = self.seen[name].transpose(0, 1).flatten(1)
        return x.mean(1), x.var(1)
