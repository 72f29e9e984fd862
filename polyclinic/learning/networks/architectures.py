"""The table of networks that a study may name. Plain data, so that listing it imports no numerical library.

A new network is one function, ``make``, that builds a module from (inputs, outputs, **options), and one entry here.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module, resources
from typing import Any, Literal

from polyclinic.core import extensions
from polyclinic.core.config_problems import nearest
from polyclinic.errors import ConfigError

Purpose = Literal["tables", "classification", "segmentation"]


@dataclass(frozen=True)
class Architecture:
    """How to build a network, and what is known of it.

    Attributes:
        make: A function that builds a module from (inputs, outputs, **options), or ``module:function`` under
            ``polyclinic.learning.networks``.
        purpose: What it is for. Networks for classification also do regression, those for segmentation reconstruction.
        summary: A one-line description.
        paper: The publication to cite.
        dims: The numbers of spatial axes that it supports.
        options: Further options of ``make``, with their defaults.
        fixed: Arguments that distinguish this name from others with the same function. They are not options.
        head: Name prefixes of the tensors from the representation to the prediction; found by rule if empty.
        encoder: Name prefixes of the tensors before the representation; found by rule if empty, which for networks
            without spatial outputs gives all but the head.
    """

    make: str | Callable[..., Any]
    purpose: Purpose = "classification"
    summary: str = ""
    paper: str = ""
    dims: tuple[int, ...] = (2, 3)
    options: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    head: tuple[str, ...] = ()
    encoder: tuple[str, ...] = ()

    def build(self, inputs: tuple[int, ...], outputs: int, **options: Any) -> Any:
        """Build the module, with random parameters."""
        make = self.make
        if isinstance(make, str):
            module, _, name = make.partition(":")
            make = getattr(import_module(f"polyclinic.learning.networks.{module}"), name)
        return make(inputs, outputs, **self.fixed, **options)


@dataclass(frozen=True)
class Size:
    """Size of a network with its default options and two outputs, as ``tools/networks.py`` measures it.

    Attributes:
        input: Shape of the example.
        parameters: Number of parameters.
        kept_bytes: Bytes that PyTorch keeps of one example in float32 for the backward pass.
        training_bytes: Estimate of the memory of training with one example: these, and for each parameter its value,
            its gradient and the two moments of Adam.
    """

    input: tuple[int, ...]
    parameters: int
    kept_bytes: int
    training_bytes: int


def sizes() -> Mapping[str, Mapping[str, Size]]:
    """Return the size of every network, by the number of spatial axes."""
    text = resources.files(__package__).joinpath("network_sizes.json").read_text()
    return {
        name: {
            dims: Size(tuple(one["input"]), one["parameters"], one["kept_bytes"], _training(one))
            for dims, one in found.items()
        }
        for name, found in json.loads(text).items()
    }


def _training(measured: Mapping[str, Any]) -> int:
    return 16 * int(measured["parameters"]) + int(measured["kept_bytes"])


def _monai(
    summary: str,
    paper: str,
    make: str,
    purpose: Purpose = "classification",
    dims: tuple[int, ...] = (2, 3),
    options: Mapping[str, Any] | None = None,
    head: tuple[str, ...] = (),
    encoder: tuple[str, ...] = (),
    **fixed: Any,
) -> Architecture:
    return Architecture(
        f"monai_networks:{make}", purpose, summary, paper, dims, dict(options or {}), fixed, head, encoder
    )


def _densenet(layers: int) -> Architecture:
    return _monai(
        f"DenseNet-{layers}",
        "Huang et al. 2017",
        "classifier",
        options={"norm": "batch"},
        head=("class_layers.",),
        monai=f"DenseNet{layers}",
    )


def _resnet(layers: int) -> Architecture:
    return _monai(
        f"ResNet-{layers}",
        "He et al. 2016",
        "classifier",
        options={"norm": "batch"},
        head=("fc.",),
        monai=f"resnet{layers}",
    )


def _senet(summary: str, monai: str) -> Architecture:
    return _monai(summary, "Hu et al. 2018", "classifier", options={"norm": "batch"}, monai=monai)


def _efficientnet(size: int) -> Architecture:
    return _monai(
        f"EfficientNet-B{size}",
        "Tan and Le 2019",
        "classifier",
        options={"norm": "batch"},
        head=("_fc.",),
        monai="EfficientNetBN",
        model_name=f"efficientnet-b{size}",
        pretrained=False,
    )


_NNUNET: Mapping[str, Any] = {
    "width": 32,
    "widest": None,
    "kernels": None,
    "strides": None,
    "norm": "instance",
    "deep_supervision": False,
}

ARCHITECTURES: Mapping[str, Architecture] = {
    "mlp": Architecture(
        "small_networks:mlp",
        "tables",
        "fully connected, for tables",
        dims=(0,),
        head=("head.",),
        options={"width": 32, "depth": 1, "dropout": 0.0, "norm": "none"},
    ),
    "cnn": Architecture(
        "small_networks:cnn",
        "classification",
        "small convolutional classifier",
        head=("head.",),
        options={"width": 16, "depth": 3, "norm": "batch", "dropout": 0.0},
    ),
    **{f"densenet{layers}": _densenet(layers) for layers in (121, 169, 201, 264)},
    **{f"resnet{layers}": _resnet(layers) for layers in (10, 18, 34, 50, 101, 152, 200)},
    "seresnet50": _senet("ResNet-50 with squeeze and excitation", "SEResNet50"),
    "seresnext50": _senet("ResNeXt-50 with squeeze and excitation", "SEResNext50"),
    "senet154": _senet("SENet-154", "SENet154"),
    **{f"efficientnet-b{size}": _efficientnet(size) for size in range(5)},
    "vit": _monai(
        "vision transformer",
        "Dosovitskiy et al. 2021",
        "vit",
        head=("classification_head.",),
        options={"patch_size": 16, "hidden_size": 768, "mlp_dim": 3072, "num_layers": 12, "num_heads": 12},
    ),
    "timm-vit": Architecture(
        "timm_vit:TimmViT",
        "classification",
        "vision transformer with the tensor names of timm, for its checkpoints",
        "Dosovitskiy et al. 2021",
        dims=(2,),
        head=("head.",),
        options={
            "patch_size": 16,
            "width": 768,
            "depth": 12,
            "heads": 12,
            "mlp_ratio": 4.0,
            "registers": 0,
            "layer_scale": 0.0,
            "positions": "all",
            "pool": "token",
        },
    ),
    "attention-mil": Architecture(
        "attention_mil:attention_mil",
        "classification",
        "attention over bags of features, for slides",
        "Ilse et al. 2018",
        dims=(1,),
        head=("head.",),
        options={"width": 64, "attention": 32, "dropout": 0.0},
    ),
    "nnunet": Architecture(
        "nnunet:nnunet",
        "segmentation",
        "nnU-Net's plain U-Net; its stages follow from the patch, or from a plan",
        "Isensee et al. 2021",
        options=_NNUNET,
    ),
    "resenc": Architecture(
        "nnunet:resenc",
        "segmentation",
        "nnU-Net's U-Net with a residual encoder",
        "Isensee et al. 2024",
        options=_NNUNET,
    ),
    "unet": _monai(
        "U-Net with instance normalization (MONAI BasicUNet)",
        "Ronneberger et al. 2015",
        "unet",
        "segmentation",
        options={"width": 16, "norm": "instance", "dropout": 0.0},
        head=("final_conv.",),
        encoder=("conv_0.", "down_"),
    ),
    "unet++": _monai(
        "nested U-Net; predicts at the last node",
        "Zhou et al. 2018",
        "unet_plus_plus",
        "segmentation",
        encoder=("net.conv_",),
        options={"width": 32, "norm": "instance", "dropout": 0.0},
    ),
    "residual-unet": _monai(
        "U-Net of residual units (MONAI UNet)",
        "Kerfoot et al. 2019",
        "residual_unet",
        "segmentation",
        options={"width": 16, "levels": 5, "num_res_units": 2, "norm": "instance", "dropout": 0.0},
    ),
    "dynunet": _monai(
        "MONAI's version of nnU-Net's network",
        "Isensee et al. 2021",
        "dynunet",
        "segmentation",
        options={"levels": 4, "deep_supervision": False},
        head=("output_block.", "deep_supervision_heads."),
        encoder=("input_block.", "downsamples.", "bottleneck."),
    ),
    "attention-unet": _monai(
        "U-Net with attention gates",
        "Oktay et al. 2018",
        "attention_unet",
        "segmentation",
        options={"width": 16, "levels": 5, "dropout": 0.0},
    ),
    "vnet": _monai("V-Net", "Milletari et al. 2016", "vnet", "segmentation", options={"norm": "batch"}),
    "segresnet": _monai(
        "SegResNet, group normalization",
        "Myronenko 2018",
        "segmenter",
        "segmentation",
        options={"init_filters": 8},
        head=("conv_final.",),
        encoder=("convInit.", "down_layers."),
        monai="SegResNet",
    ),
    "segresnet-ds": _monai(
        "SegResNet of Auto3DSeg, with deep supervision",
        "Myronenko 2018",
        "segresnet_ds",
        "segmentation",
        options={"init_filters": 32, "norm": "instance", "deep_supervision": False},
    ),
    "mednext": _monai(
        "MedNeXt: convolutions of large kernels, as in ConvNeXt",
        "Roy et al. 2023",
        "mednext",
        "segmentation",
        options={"size": "S", "kernel_size": 3, "deep_supervision": False},
    ),
    "highresnet": _monai(
        "HighRes3DNet: dilated convolutions at full resolution",
        "Li et al. 2017",
        "highresnet",
        "segmentation",
        options={"norm": "batch"},
    ),
    "flexible-unet": _monai(
        "U-Net with an EfficientNet or ResNet encoder",
        "Tan and Le 2019",
        "flexible_unet",
        "segmentation",
        dims=(2, 3),
        options={"backbone": "efficientnet-b0", "norm": "batch"},
        encoder=("encoder.",),
    ),
    "unetr": _monai(
        "transformer encoder and convolutional decoder",
        "Hatamizadeh et al. 2022",
        "unetr",
        "segmentation",
        options={"feature_size": 16, "hidden_size": 768, "mlp_dim": 3072, "num_heads": 12},
        head=("out.",),
        encoder=("vit.", "encoder"),
    ),
    "swin-unetr": _monai(
        "shifted-window transformer encoder and convolutional decoder",
        "Hatamizadeh et al. 2022",
        "swin_unetr",
        "segmentation",
        options={"feature_size": 24},
        head=("out.",),
        encoder=("swinViT.", "encoder"),
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


@lru_cache(maxsize=64)
def _foreign(name: str) -> Architecture:
    if name not in network_names():
        raise ConfigError(f'no network is called "{name}".{nearest(name, network_names())}')
    found = extensions.load("networks", name)
    if not isinstance(found, Architecture):
        raise ConfigError(f"the network {name!r} of a package is a {type(found).__name__}, not an Architecture")
    return found
