"""Catalog of networks that a study may name: MONAI's, and two small ones defined in this package."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from polyclinic.core import extensions
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.attention_mil import attention_mil


@dataclass(frozen=True)
class Network:
    """Specification of a network: its name and the options that determine its shape. Calling it builds the module.

    Attributes:
        name: One of ``ARCHITECTURES``, or of an installed package.
        inputs: Shape of one input: (C, *spatial), or (F,) for tables.
        outputs: Number of predicted classes, labels or values.
        options: Further options of the architecture, as pairs such as ``(("width", 32),)``.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: int
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self) -> nn.Module:
        """Build a module with random parameters."""
        return self.architecture.build(self.inputs, self.outputs, **dict(self.options))

    @property
    def architecture(self) -> "Architecture":
        """The entry in ``ARCHITECTURES``, or of an installed package."""
        return architecture(self.name)

    def in_head(self, name: str) -> bool:
        """Return whether a tensor belongs to the head: the last layers, from representation to prediction."""
        return name.startswith(self.architecture.head)

    def in_encoder(self, name: str) -> bool:
        """Return whether a tensor belongs to the encoder: the layers before the representation or bottleneck."""
        return name.startswith(self.architecture.encoder) if self.architecture.encoder else not self.in_head(name)


@dataclass(frozen=True)
class Architecture:
    """How to build a network, and the names of its parts.

    Attributes:
        build: Builds a module from (inputs, outputs, **options).
        head: Name prefixes of the tensors after the representation.
        encoder: Name prefixes of the tensors before it; all but the head if empty.
        summary: A one-line description.
        options: Further options of ``build``, with their defaults.
    """

    build: Callable[..., nn.Module]
    head: tuple[str, ...]
    summary: str
    encoder: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


class Classifier(nn.Module):
    """An encoder that computes a representation, and a linear head."""

    def __init__(self, encoder: nn.Module, features: int, outputs: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, *inputs] to [b, outputs]."""
        prediction: Tensor = self.head(self.encoder(x))
        return prediction


def normalize(kind: str, channels: int, dims: int) -> nn.Module:
    """Build a normalization layer over ``channels``: ``batch``, ``group``, ``instance`` or ``none``."""
    match kind:
        case "batch":
            return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims](channels)
        case "group":
            return nn.GroupNorm(min(8, channels), channels)
        case "instance" if dims:
            return (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1](channels, affine=True)
        case "none":
            return nn.Identity()
    raise ConfigError(f"unknown normalization {kind!r}; use batch, group, instance (images only) or none")


def mlp(
    inputs: tuple[int, ...], outputs: int, width: int = 32, depth: int = 1, dropout: float = 0.0, norm: str = "none"
) -> nn.Module:
    """Build fully connected layers, for tables."""
    layers: list[nn.Module] = [nn.Flatten()]
    size = 1
    for side in inputs:
        size *= side
    for _ in range(depth):
        layers += [nn.Linear(size, width), normalize(norm, width, 0), nn.ReLU(), nn.Dropout(dropout)]
        size = width
    return Classifier(nn.Sequential(*layers), size, outputs)


def cnn(
    inputs: tuple[int, ...], outputs: int, width: int = 16, depth: int = 3, norm: str = "batch", dropout: float = 0.0
) -> nn.Module:
    """Build ``depth`` blocks of convolution, normalization, ReLU and pooling with doubling width, and a global mean."""
    channels, dims = inputs[0], len(inputs) - 1
    if dims not in (2, 3):
        raise ConfigError(f"a cnn needs images or volumes, not inputs of shape {inputs}")
    conv, pool, mean = (
        (nn.Conv2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
        if dims == 2
        else (nn.Conv3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d)
    )
    layers: list[nn.Module] = []
    for level in range(depth):
        wide = width * 2**level
        layers += [conv(channels, wide, 3, padding=1, bias=norm == "none"), normalize(norm, wide, dims), nn.ReLU()]
        layers += [pool(2)] if level < depth - 1 else [mean(1)]
        channels = wide
    return Classifier(nn.Sequential(*layers, nn.Flatten(), nn.Dropout(dropout)), channels, outputs)


def _monai(name: str, **fixed: Any) -> Callable[..., nn.Module]:
    """Return a builder for a network of ``monai.networks.nets`` without pretrained weights."""

    def build(inputs: tuple[int, ...], outputs: int, **options: Any) -> nn.Module:
        from monai.networks import nets

        if options.get("pretrained"):
            raise ConfigError(f"{name}: pretrained weights would be downloaded; load them from a file instead")
        given = {**fixed, **{key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}}
        module: nn.Module = getattr(nets, name)(**_places(name, inputs, outputs), **given)
        return module

    return build


def _places(name: str, inputs: tuple[int, ...], outputs: int) -> dict[str, Any]:
    """Return the dimension, channel and output arguments of MONAI's constructors."""
    dims = len(inputs) - 1
    if name.startswith(("ResNet", "resnet")):
        return {"spatial_dims": dims, "n_input_channels": inputs[0], "num_classes": outputs}
    if name == "EfficientNetBN":
        return {"spatial_dims": dims, "in_channels": inputs[0], "num_classes": outputs}
    if name == "ViT":
        return {"spatial_dims": dims, "in_channels": inputs[0], "img_size": inputs[1:], "num_classes": outputs}
    return {"spatial_dims": dims, "in_channels": inputs[0], "out_channels": outputs}


def _unet(
    inputs: tuple[int, ...], outputs: int, width: int = 16, norm: str = "instance", dropout: float = 0.0
) -> nn.Module:
    """Build MONAI's BasicUNet, whose encoder and decoder have distinct names."""
    features = (width, width, 2 * width, 4 * width, 8 * width, width)
    kind = ("group", {"num_groups": 8}) if norm == "group" else (norm, {"affine": True})
    return _monai("BasicUNet", features=features, norm=kind, dropout=dropout)(inputs, outputs)


def _dynunet(inputs: tuple[int, ...], outputs: int, levels: int = 4, **options: Any) -> nn.Module:
    kernels, strides = [3] * levels, [1] + [2] * (levels - 1)
    return _monai("DynUNet", kernel_size=kernels, strides=strides, upsample_kernel_size=strides[1:])(
        inputs, outputs, **options
    )


def _vit(inputs: tuple[int, ...], outputs: int, **options: Any) -> nn.Module:
    """Build MONAI's ViT so that it returns its prediction alone, without the tokens of every layer."""
    from monai.networks import nets

    class Predicting(nets.ViT):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            prediction: Tensor = super().forward(x)[0]
            return prediction

    given = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    return Predicting(**_places("ViT", inputs, outputs), classification=True, post_activation="", **given)


ARCHITECTURES: Mapping[str, Architecture] = {
    "mlp": Architecture(
        mlp,
        ("head.",),
        "fully connected, for tables",
        options={"width": 32, "depth": 1, "dropout": 0.0, "norm": "none"},
    ),
    "cnn": Architecture(
        cnn,
        ("head.",),
        "small convolutional classifier, 2-D or 3-D",
        options={"width": 16, "depth": 3, "norm": "batch", "dropout": 0.0},
    ),
    "densenet121": Architecture(
        _monai("DenseNet121"), ("class_layers.",), "DenseNet-121 (Huang 2017)", options={"norm": "batch"}
    ),
    "resnet10": Architecture(_monai("resnet10"), ("fc.",), "ResNet-10 (He 2016)", options={"norm": "batch"}),
    "resnet18": Architecture(_monai("resnet18"), ("fc.",), "ResNet-18 (He 2016)", options={"norm": "batch"}),
    "efficientnet-b0": Architecture(
        _monai("EfficientNetBN", model_name="efficientnet-b0", pretrained=False),
        ("_fc.",),
        "EfficientNet-B0 (Tan 2019)",
    ),
    "vit": Architecture(
        _vit,
        ("classification_head.",),
        "vision transformer (Dosovitskiy 2021)",
        options={"patch_size": 16, "hidden_size": 768, "mlp_dim": 3072, "num_layers": 12, "num_heads": 12},
    ),
    "attention-mil": Architecture(
        attention_mil,
        ("head.",),
        "attention over bags of features, for slides (Ilse 2018)",
        options={"width": 64, "attention": 32, "dropout": 0.0},
    ),
    "unet": Architecture(
        _unet,
        ("final_conv.",),
        "U-Net with instance normalization (MONAI BasicUNet)",
        encoder=("conv_0.", "down_"),
        options={"width": 16, "norm": "instance", "dropout": 0.0},
    ),
    "segresnet": Architecture(
        _monai("SegResNet"),
        ("conv_final.",),
        "SegResNet (Myronenko 2018), group normalization",
        encoder=("convInit.", "down_layers."),
        options={"init_filters": 8},
    ),
    "dynunet": Architecture(
        _dynunet,
        ("output_block.",),
        "nnU-Net's network (Isensee 2021)",
        encoder=("input_block.", "downsamples.", "bottleneck."),
        options={"levels": 4},
    ),
}


def network_names() -> tuple[str, ...]:
    """Return the names of all networks: those of ``ARCHITECTURES``, of installed packages and of this program."""
    return (*ARCHITECTURES, *(name for name in extensions.names("networks") if name not in ARCHITECTURES))


def architecture(name: str) -> Architecture:
    """Return how the network called ``name`` is built.

    Raises:
        ConfigError: If there is none, or a package provides something else under this name.
    """
    return ARCHITECTURES[name] if name in ARCHITECTURES else _foreign(name)


@lru_cache(maxsize=64)  # the names of tensors are compared with the architecture's, and a package is loaded once anyway
def _foreign(name: str) -> Architecture:
    if name not in network_names():
        raise ConfigError(f"unknown network {name!r}; the networks are {', '.join(network_names())}")
    found = extensions.load("networks", name)
    if not isinstance(found, Architecture):
        raise ConfigError(f"the network {name!r} of a package is a {type(found).__name__}, not an Architecture")
    return found
