"""The two network parts of LC-Fed: channel selection for a site, and a head that uses the disagreement between sites.

Wang, Jin and Wang, "Personalizing Federated Medical Image Segmentation via Local Calibration", ECCV 2022, sections 3.2
and 3.3. https://arxiv.org/abs/2207.04655. After the published code (``multi_lcnet.py``). Departure: probabilities are a
softmax over classes, the background included, instead of one sigmoid for each foreground class.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from polyclinic.learning.networks.composite import Composed
from polyclinic.learning.networks.latent import head_name
from polyclinic.learning.networks.model_mixture import prediction
from polyclinic.learning.networks.model_tree import params_of


@dataclass(frozen=True)
class ChannelSelected(Composed):
    """A network whose bottleneck channels are weighted for the site that the buffer ``site`` [sites] encodes.

    Attributes:
        bottleneck: Name of the encoder's last module.
        channels: Number of its output channels.
        sites: Number of sites.
    """

    bottleneck: str
    channels: int
    sites: int

    def __call__(self) -> nn.Module:
        """Build the network with unchanged tensor names, plus ``select.…`` and ``site``."""
        model = self.network()
        model.add_module("select", _Selection(self.channels, self.sites))
        model.register_buffer("site", torch.zeros(self.sites))

        def weigh(_: nn.Module, __: Any, given: Tensor) -> Tensor:
            found: Tensor = model.get_submodule("select")(given, model.get_buffer("site"))
            return found

        model.get_submodule(self.bottleneck).register_forward_hook(weigh)
        return model

    def in_encoder(self, name: str) -> bool:
        """Return whether a tensor belongs to the network's encoder."""
        return not name.startswith(("select.", "site")) and self.network.in_encoder(name)


class _Selection(nn.Module):
    """``x ↦ x · h + x`` with ``h = σ(f(avg x, e) + f(max x, e))``, for the embedding e of a site."""

    def __init__(self, channels: int, sites: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(sites, channels, False), nn.ReLU(), nn.Linear(channels, channels, False))
        narrow = max(1, channels // 16)
        self.gate = nn.Sequential(nn.Linear(2 * channels, narrow, False), nn.ReLU(), nn.Linear(narrow, channels, False))

    def forward(self, x: Tensor, site: Tensor) -> Tensor:
        flat, e = x.flatten(2), self.embed(site).expand(len(x), -1)
        summed = sum(self.gate(torch.cat([part, e], 1)) for part in (flat.mean(2), flat.amax(2)))
        h = torch.as_tensor(summed).sigmoid().view(*x.shape[:2], *[1] * (x.ndim - 2))
        return x * h + x


@dataclass(frozen=True)
class Calibrated(Composed):
    """A trained segmentation network ``net.…`` and a second head ``calibrate.…`` on its features.

    The features are multiplied with two blurred maps for every class: the peaks of the disagreement of the heads of the
    other sites, stored in the buffer ``heads`` [sites, size], with the first head, and the first head's probability of
    the class. If the buffer ``use`` is 0, the network predicts without the second head. Only the second head can be
    trained.

    Attributes:
        features: Number of features that enter the head.
        sites: Number of heads.
        window: Window of the blur and of the search for peaks, in pixels.
    """

    features: int
    sites: int
    window: int = 31

    def __call__(self) -> nn.Module:
        """Build a module with random parameters."""
        return _Calibrated(self)


class _Calibrated(nn.Module):
    heads: Tensor
    use: Tensor

    def __init__(self, build: Calibrated) -> None:
        super().__init__()
        self.net, self.window, dims = build.network(), build.window, len(build.inputs) - 1
        self.place = head_name(build.network, self.net)
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.calibrate = conv(2 * build.outputs * build.features, build.outputs, 3, padding=1)
        self.leaves = {name: leaf.shape for name, leaf in params_of(self.net).items() if build.in_head(name)}
        size = sum(shape.numel() for shape in self.leaves.values())
        self.register_buffer("heads", torch.zeros(build.sites, size))
        self.register_buffer("use", torch.ones(()))

    def train(self, mode: bool = True) -> "_Calibrated":
        """Set the mode; the network itself stays in evaluation mode."""
        super().train(mode)
        self.net.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [b, C, *spatial]."""
        head, given = self.net.get_submodule(self.place), []
        hook = head.register_forward_pre_hook(lambda _, entering: given.append(entering[0]))
        with torch.no_grad():
            first = prediction(self.net(x))
            hook.remove()
            if not bool(self.use):
                return first
            predictions = torch.stack([self._head(head, flat, given[-1]).softmax(1) for flat in self.heads])
            own, others = first.softmax(1), 1 - self.net.get_buffer("site")
            maps = torch.cat([peaks(disagreement(own, predictions, others), self.window), own], 1)
            weighed = torch.cat([given[-1] * blurred(m, self.window) + given[-1] for m in maps.split(1, 1)], 1)
        found: Tensor = self.calibrate(weighed)
        return found

    def _head(self, head: nn.Module, flat: Tensor, features: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in self.leaves.values()])
        leaves = {name: part.view(shape) for (name, shape), part in zip(self.leaves.items(), parts, strict=True)}
        inside = f"{self.place}."
        shaped = {name.removeprefix(inside): leaf for name, leaf in leaves.items() if name.startswith(inside)}
        found: Tensor = functional_call(head, shaped, (features,))
        return found


def disagreement(own: Tensor, predictions: Tensor, others: Tensor) -> Tensor:
    """Return ``√(Σ_k o_k (p_k − p)² / Σ_k o_k)`` [b, C, *spatial], divided by its largest value by image and class.

    Args:
        own: p, the site's own probabilities [b, C, *spatial].
        predictions: p_k, those by the head of each site [sites, b, C, *spatial].
        others: o [sites], 1 for the other sites.
    """
    weight = others.view(-1, *[1] * own.ndim) / others.sum().clamp_min(1)
    apart = (weight * (predictions - own).square()).sum(0).sqrt()
    largest = apart.flatten(2).amax(2).view(*apart.shape[:2], *[1] * (apart.ndim - 2))
    return apart / largest.clamp_min(1e-12)


def peaks(maps: Tensor, window: int = 31, least: float = 0.2) -> Tensor:
    """Return 1 where [b, C, *spatial] is the largest value of a window around it and above ``least``, and else 0."""
    pool = F.max_pool2d if maps.ndim == 4 else F.max_pool3d
    return ((maps == pool(maps, window, 1, window // 2)) & (maps > least)).to(maps)


def blurred(attention: Tensor, window: int = 31, sigma: float = 6.0) -> Tensor:
    """Return [b, 1, *spatial] filtered by a Gaussian of height 1 and standard deviation ``sigma``, in pixels."""
    offset = torch.arange(window, device=attention.device) - window // 2
    kernel, conv = (-0.5 * (offset / sigma).square()).exp(), F.conv2d if attention.ndim == 4 else F.conv3d
    for axis in range(attention.ndim - 2):
        shape = [1] * (attention.ndim - 2)
        shape[axis] = window
        attention = conv(attention, kernel.view(1, 1, *shape), padding=[n // 2 for n in shape])
    return attention
