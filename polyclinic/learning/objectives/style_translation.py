"""Images in another style: translators, critics, and how they are trained against one another.

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
from polyclinic.learning.training.local import LocalTraining, seeded


def images_only(inputs: tuple[int, ...]) -> None:
    """Refuses tables.

    Raises:
        ValueError: Where ``inputs`` is not (C, *spatial).
    """
    if len(inputs) < 3:
        raise ConfigError(f"a style needs images or volumes, not inputs of shape {inputs}")


@dataclass(frozen=True)
class Translator:
    """Builds x ↦ x + f(x), f three convolutions that begin at 0. As a front it is fixed: nothing trains it there.

    Attributes:
        standardize: Whether each image is first given mean 0 and deviation 1 in each channel, which takes its style.
        fixed: Whether its parameters are kept from training.
    """

    inputs: tuple[int, ...]
    width: int = 16
    standardize: bool = False
    fixed: bool = True

    def __call__(self) -> nn.Module:
        """A new module."""
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
        """[b, C, *spatial] to the same."""
        x = standardized(x) if self.standardize else x
        found: Tensor = x + self.layers(x)
        return found


def standardized(x: Tensor) -> Tensor:
    """Each image with mean 0 and deviation 1 in each channel; constant channels are 0. [b, C, *spatial]"""
    axes = tuple(range(2, x.ndim))
    return (x - x.mean(axes, keepdim=True)) / x.std(axes, keepdim=True).clamp_min(1e-6)


def critic(inputs: tuple[int, ...], width: int) -> nn.Module:
    """Scores patches of images: [b, C, *spatial] to [b, 1, *smaller]."""
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
    """Two translators, ``there.…`` and ``back.…``, and a critic of each side, ``judge_there.…`` and ``judge_back.…``.

    Attributes:
        cycle: λ, the weight of coming back to where one began; 10 in the paper.
    """

    inputs: tuple[int, ...]
    width: int = 16
    cycle: float = 10.0

    def model(self) -> nn.ModuleDict:
        """A new module."""
        ways = {name: Translator(self.inputs, self.width, fixed=False)() for name in ("there", "back")}
        return nn.ModuleDict({**ways, **{f"judge_{name}": critic(self.inputs, self.width) for name in ways}})

    def first(self, seed: int = 0) -> Tree:
        """The parameters to begin from."""
        return initial(self.model, seed)

    def judge(self, model: nn.ModuleDict, own: Tensor, target: Tensor) -> Tensor:
        """The critics' loss on images ``own`` and ``target``."""
        with torch.no_grad():
            made, returned = model["there"](own), model["back"](target)
        there = tell_apart(model["judge_there"](target), model["judge_there"](made))
        return there + tell_apart(model["judge_back"](own), model["judge_back"](returned))

    def translate(self, model: nn.ModuleDict, own: Tensor, target: Tensor) -> Tensor:
        """The translators' loss: pass at the critics, and come back."""
        made, returned = model["there"](own), model["back"](target)
        passing = pass_for_real(model["judge_there"](made)) + pass_for_real(model["judge_back"](returned))
        round_trip = (model["back"](made) - own).abs().mean() + (model["there"](returned) - target).abs().mean()
        loss: Tensor = passing + self.cycle * round_trip
        return loss


@dataclass(frozen=True)
class Synthesis:
    """A generator of images, ``made.…``, and a Wasserstein critic with a gradient penalty, ``judge.…``.

    Attributes:
        penalty: Of critic gradients that are not of length 1; 10 in the paper.
    """

    inputs: tuple[int, ...]
    width: int = 16
    latent: int = 16
    penalty: float = 10.0

    def model(self) -> nn.ModuleDict:
        """A new module."""
        return nn.ModuleDict(
            {"made": Up(self.inputs, self.width, self.latent), "judge": critic(self.inputs, self.width)}
        )

    def first(self, seed: int = 0) -> Tree:
        """The parameters to begin from."""
        return initial(self.model, seed)

    def make(self, model: nn.ModuleDict, count: int, rng: torch.Generator, device: str = "cpu") -> Tensor:
        """``count`` images."""
        images: Tensor = model["made"](torch.randn(count, self.latent, generator=rng).to(device))
        return images

    def judge(self, model: nn.ModuleDict, real: Tensor, rng: torch.Generator) -> Tensor:
        """D(made) − D(real) + penalty · (‖∇D(between)‖ − 1)²"""
        with torch.no_grad():
            made = self.make(model, len(real), rng, str(real.device))
        share = torch.rand(len(real), *[1] * (real.ndim - 1), generator=rng).to(real)
        between = (share * real + (1 - share) * made).requires_grad_(True)
        slope = torch.autograd.grad(model["judge"](between).flatten(1).mean(1).sum(), between, create_graph=True)[0]
        steep = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        loss: Tensor = model["judge"](made).mean() - model["judge"](real).mean() + self.penalty * steep
        return loss

    def please(self, model: nn.ModuleDict, count: int, rng: torch.Generator, device: str) -> Tensor:
        """−D(made)"""
        loss: Tensor = -model["judge"](self.make(model, count, rng, device)).mean()
        return loss


@dataclass(frozen=True)
class Stain:
    """A generator that sees images without their style, ``made.…``, and a critic that knows one site's, ``judge.…``.

    Attributes:
        structure: λ, the weight of what the generator changes besides the style.
    """

    inputs: tuple[int, ...]
    width: int = 16
    structure: float = 10.0

    def model(self) -> nn.ModuleDict:
        """A new module."""
        made = Translator(self.inputs, self.width, standardize=True, fixed=False)()
        return nn.ModuleDict({"made": made, "judge": critic(self.inputs, self.width)})

    def first(self, seed: int = 0) -> Tree:
        """The parameters to begin from."""
        return initial(self.model, seed)

    def judge(self, model: nn.ModuleDict, own: Tensor) -> Tensor:
        """The critic's loss on a site's images."""
        with torch.no_grad():
            made = model["made"](own)
        return tell_apart(model["judge"](own), model["judge"](made))

    def restyle(self, model: nn.ModuleDict, own: Tensor) -> Tensor:
        """The generator's loss: pass at the critic, and change nothing but mean and deviation of each channel."""
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
    """Trains ``model`` in place on a site's images: in each step critics by ``judge``, then the rest by ``please``."""
    guess, make = local.stepper(model, trainable=in_judges), local.stepper(model, trainable=outside_judges)
    rng = site.rng(0, key)
    with seeded(rng, site.device):
        for x, _ in local.batches(site.data["train"], rng, site.device):
            guess(judge(x))
            make(please(x))


def in_judges(name: str) -> bool:
    """Whether a tensor belongs to a critic."""
    return name.startswith("judge")


def outside_judges(name: str) -> bool:
    """Whether it does not."""
    return not in_judges(name)


def _conv(inputs: tuple[int, ...]) -> Callable[..., nn.Module]:
    return nn.Conv2d if len(inputs) == 3 else nn.Conv3d
