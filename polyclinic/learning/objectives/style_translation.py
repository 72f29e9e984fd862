"""Style translation of images: translators, critics, and their adversarial training.

The cycle: Zhu, Park, Isola and Efros, "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial
Networks", ICCV 2017, https://arxiv.org/abs/1703.10593; the critic of generated images: Gulrajani, Ahmed, Arjovsky,
Dumoulin and Courville, "Improved Training of Wasserstein GANs", NeurIPS 2017, https://arxiv.org/abs/1704.00028.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.generative import Up
from polyclinic.learning.networks.model_tree import initial
from polyclinic.learning.objectives.adversarial import pass_for_real, tell_apart
from polyclinic.learning.training.local import LocalTraining
from polyclinic.learning.training.seeding import seeded


def images_only(inputs: tuple[int, ...]) -> None:
    """Refuse tables.

    Raises:
        ValueError: If ``inputs`` is not (C, *spatial).
    """
    if len(inputs) < 3:
        raise ConfigError(f"a style needs images or volumes, not inputs of shape {inputs}")


@dataclass(frozen=True)
class Translator:
    """Builds x ↦ x + f(x) with f three convolutions, initially 0. As an input front it is fixed and not trained.

    Attributes:
        standardize: Whether each channel of each image is first standardized to mean 0 and deviation 1, without style.
        fixed: Whether its parameters are excluded from training.
    """

    inputs: tuple[int, ...]
    width: int = 16
    standardize: bool = False
    fixed: bool = True

    def __call__(self) -> nn.Module:
        """Build a module."""
        return _Translated(self)


class _Translated(nn.Module):
    def __init__(self, build: Translator) -> None:
        super().__init__()
        self.standardize = build.standardize
        conv, channels, width = _conv(build.inputs), build.inputs[0], build.width
        self.layers = nn.Sequential(
            conv(channels, width, 3, padding=1),
            nn.ReLU(),
            conv(width, width, 3, padding=1),
            nn.ReLU(),
            conv(width, channels, 1),
        )
        for leaf in self.layers[-1].parameters():
            nn.init.zeros_(leaf)
        self.requires_grad_(not build.fixed)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, C, *spatial] to the same shape."""
        x = standardized(x) if self.standardize else x
        translated: Tensor = x + self.layers(x)
        return translated


def standardized(x: Tensor) -> Tensor:
    """Standardize each channel of each image to mean 0 and deviation 1; constant channels are 0. [b, C, *spatial]"""
    axes = tuple(range(2, x.ndim))
    return (x - x.mean(axes, keepdim=True)) / x.std(axes, keepdim=True).clamp_min(1e-6)


def critic(inputs: tuple[int, ...], width: int) -> nn.Module:
    """Build a network that scores patches of images: [b, C, *spatial] to [b, 1, *smaller]."""
    conv = _conv(inputs)
    return nn.Sequential(
        conv(inputs[0], width, 3, 2, 1),
        nn.LeakyReLU(0.2),
        conv(width, 2 * width, 3, 2, 1),
        nn.LeakyReLU(0.2),
        conv(2 * width, 1, 1),
    )


@dataclass(frozen=True)
class Cycle:
    """Two translators, ``there.…`` and ``back.…``, and a critic for each, ``judge_there.…`` and ``judge_back.…``.

    Attributes:
        cycle: λ, the weight of the cycle consistency loss; 10 in the paper.
    """

    inputs: tuple[int, ...]
    width: int = 16
    cycle: float = 10.0

    def model(self) -> nn.ModuleDict:
        """Build a module."""
        ways = {name: Translator(self.inputs, self.width, fixed=False)() for name in ("there", "back")}
        return nn.ModuleDict({**ways, **{f"judge_{name}": critic(self.inputs, self.width) for name in ways}})

    def first(self, seed: int = 0) -> Tree:
        """Return the initial parameters."""
        return initial(self.model, seed)

    def judge(self, model: nn.ModuleDict, own: Tensor, target: Tensor) -> Tensor:
        """Return the critics' loss on images ``own`` and ``target``."""
        with torch.no_grad():
            translated, returned = model["there"](own), model["back"](target)
        there = tell_apart(model["judge_there"](target), model["judge_there"](translated))
        return there + tell_apart(model["judge_back"](own), model["judge_back"](returned))

    def translate(self, model: nn.ModuleDict, own: Tensor, target: Tensor) -> Tensor:
        """Return the translators' loss: the adversarial loss plus the cycle consistency loss."""
        translated, returned = model["there"](own), model["back"](target)
        passing = pass_for_real(model["judge_there"](translated)) + pass_for_real(model["judge_back"](returned))
        round_trip = (model["back"](translated) - own).abs().mean() + (model["there"](returned) - target).abs().mean()
        loss: Tensor = passing + self.cycle * round_trip
        return loss


@dataclass(frozen=True)
class Synthesis:
    """A generator of images, ``made.…``, and a Wasserstein critic with a gradient penalty, ``judge.…``.

    Attributes:
        penalty: Weight of the penalty on critic gradients whose norm is not 1; 10 in the paper.
    """

    inputs: tuple[int, ...]
    width: int = 16
    latent: int = 16
    penalty: float = 10.0

    def model(self) -> nn.ModuleDict:
        """Build a module."""
        return nn.ModuleDict(
            {"made": Up(self.inputs, self.width, self.latent), "judge": critic(self.inputs, self.width)}
        )

    def first(self, seed: int = 0) -> Tree:
        """Return the initial parameters."""
        return initial(self.model, seed)

    def make(self, model: nn.ModuleDict, count: int, rng: torch.Generator, device: str = "cpu") -> Tensor:
        """Generate ``count`` images."""
        images: Tensor = model["made"](torch.randn(count, self.latent, generator=rng).to(device))
        return images

    def judge(self, model: nn.ModuleDict, real: Tensor, rng: torch.Generator) -> Tensor:
        """Critic loss ``D(made) − D(real) + penalty · (‖∇D(between)‖ − 1)²``."""
        with torch.no_grad():
            made = self.make(model, len(real), rng, str(real.device))
        share = torch.rand(len(real), *[1] * (real.ndim - 1), generator=rng).to(real)
        between = (share * real + (1 - share) * made).requires_grad_(True)
        slope = torch.autograd.grad(model["judge"](between).flatten(1).mean(1).sum(), between, create_graph=True)[0]
        steep = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        loss: Tensor = model["judge"](made).mean() - model["judge"](real).mean() + self.penalty * steep
        return loss

    def please(self, model: nn.ModuleDict, count: int, rng: torch.Generator, device: str) -> Tensor:
        """Generator loss ``−D(made)``."""
        loss: Tensor = -model["judge"](self.make(model, count, rng, device)).mean()
        return loss


@dataclass(frozen=True)
class Stain:
    """A generator that receives images without their style, ``made.…``, and a critic of one site's, ``judge.…``.

    Attributes:
        structure: λ, the weight of changes other than style.
    """

    inputs: tuple[int, ...]
    width: int = 16
    structure: float = 10.0

    def model(self) -> nn.ModuleDict:
        """Build a module."""
        made = Translator(self.inputs, self.width, standardize=True, fixed=False)()
        return nn.ModuleDict({"made": made, "judge": critic(self.inputs, self.width)})

    def first(self, seed: int = 0) -> Tree:
        """Return the initial parameters."""
        return initial(self.model, seed)

    def judge(self, model: nn.ModuleDict, own: Tensor) -> Tensor:
        """Return the critic's loss on a site's images."""
        with torch.no_grad():
            made = model["made"](own)
        return tell_apart(model["judge"](own), model["judge"](made))

    def restyle(self, model: nn.ModuleDict, own: Tensor) -> Tensor:
        """Return the generator's loss: the adversarial loss plus any change except in channel mean and deviation."""
        made = model["made"](own)
        change = (standardized(made) - standardized(own)).abs().mean()
        loss: Tensor = pass_for_real(model["judge"](made)) + self.structure * change
        return loss


def in_turn(
    model: nn.Module,
    local: LocalTraining,
    site: Site,
    key: str,
    judge: Callable[[Tensor], Tensor],
    please: Callable[[Tensor], Tensor],
) -> None:
    """Train ``model`` in place: in each step the critics with ``judge``, then the rest with ``please``."""
    guess, make = local.stepper(model, trainable=in_judges), local.stepper(model, trainable=outside_judges)
    rng = site.rng(0, key)
    with seeded(rng, site.device):
        for x, _ in local.batches(site.data["train"], rng, site.device):
            guess(judge(x))
            make(please(x))


def in_judges(name: str) -> bool:
    """Return whether a tensor belongs to a critic."""
    return name.startswith("judge")


def outside_judges(name: str) -> bool:
    """Return whether a tensor does not belong to a critic."""
    return not in_judges(name)


def _conv(inputs: tuple[int, ...]) -> Callable[..., nn.Module]:
    return nn.Conv2d if len(inputs) == 3 else nn.Conv3d
