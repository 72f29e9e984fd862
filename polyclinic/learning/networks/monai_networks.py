"""Builders of networks of MONAI (``monai.networks.nets``), without pretrained weights.

MONAI: Cardoso et al., 2022, https://arxiv.org/abs/2211.02701. Networks with deep supervision return, in training, a
list of predictions at their own sizes, the finest first; in evaluation, one.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from polyclinic.errors import ConfigError
from polyclinic.learning.networks.small_networks import group_count, normalize


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}


def _norm(kind: str, channels: int) -> Any:
    """Return MONAI's specification of a normalization, whose layers all have a multiple of ``channels``."""
    if kind not in ("batch", "group", "instance"):
        raise ConfigError(f"unknown normalization {kind!r}; use batch, group or instance")
    return ("group", {"num_groups": group_count(channels)}) if kind == "group" else (kind, {"affine": True})


def classifier(inputs: tuple[int, ...], outputs: int, monai: str, norm: Any = "batch", **options: Any) -> nn.Module:
    """Build a classifier of MONAI, called ``monai``.

    Args:
        inputs: (C, *spatial).
        outputs: Number of outputs.
        monai: Name of the class or function in ``monai.networks.nets``.
        norm: ``batch``, ``group`` or ``instance``; with group normalization, differentially private training is
            possible. MONAI's own specifications, such as ``["group", {"num_groups": 8}]``, are passed on.
        options: Further options of MONAI's network.
    """
    from monai.networks import nets

    _refuse_weights(monai, options)
    channels, count = "in_channels", "num_classes"
    if monai.startswith("resnet"):
        channels = "n_input_channels"
    elif monai.startswith("DenseNet"):
        count = "out_channels"
    places = {"spatial_dims": len(inputs) - 1, channels: inputs[0], count: outputs}
    own = norm == "batch" or (monai.startswith("DenseNet") and norm == "instance")  # DenseNet's is not affine
    if not isinstance(norm, str) or (own and monai.startswith(("DenseNet", "resnet"))):
        options["norm"] = tuple(norm) if isinstance(norm, list) else norm
    module: nn.Module = getattr(nets, monai)(**places, **_tuples(options))
    return module if own or not isinstance(norm, str) else renormalized(module, norm, len(inputs) - 1)


def renormalized(model: nn.Module, norm: str, dims: int) -> nn.Module:
    """Replace every batch normalization of ``model`` by ``norm``: ``group``, ``instance`` or ``none``."""
    batch = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for name in batch:
        place, _, last = name.rpartition(".")
        width = model.get_submodule(name).num_features
        setattr(model.get_submodule(place), last, normalize(norm, cast(int, width), dims))
    return model


def segmenter(inputs: tuple[int, ...], outputs: int, monai: str, **options: Any) -> nn.Module:
    """Build a segmentation network of MONAI, called ``monai``."""
    from monai.networks import nets

    _refuse_weights(monai, options)
    module: nn.Module = getattr(nets, monai)(**_places(inputs, outputs), **_tuples(options))
    return module


def _places(inputs: tuple[int, ...], outputs: int) -> dict[str, Any]:
    return {"spatial_dims": len(inputs) - 1, "in_channels": inputs[0], "out_channels": outputs}


def _refuse_weights(name: str, options: dict[str, Any]) -> None:
    if options.get("pretrained"):
        raise ConfigError(f"{name}: pretrained weights would be downloaded; load them from a file instead")


def vit(inputs: tuple[int, ...], outputs: int, patch_size: Any = 16, **options: Any) -> nn.Module:
    """Build MONAI's ViT so that it returns its prediction alone, without the tokens of every layer."""
    from monai.networks import nets

    class Predicting(nets.ViT):  # type: ignore[misc]  # MONAI has no types
        def forward(self, x: Tensor) -> Tensor:
            prediction: Tensor = super().forward(x)[0]
            return prediction

    places = {"in_channels": inputs[0], "img_size": inputs[1:], "num_classes": outputs, "patch_size": patch_size}
    places = _tuples(places)
    return Predicting(
        spatial_dims=len(inputs) - 1, **places, classification=True, post_activation="", **_tuples(options)
    )


def unet(
    inputs: tuple[int, ...], outputs: int, width: int = 16, norm: str = "instance", dropout: float = 0.0
) -> nn.Module:
    """Build MONAI's BasicUNet, whose encoder and decoder have distinct names."""
    features = (width, width, 2 * width, 4 * width, 8 * width, width)
    return segmenter(inputs, outputs, "BasicUNet", features=features, norm=_norm(norm, width), dropout=dropout)


def unet_plus_plus(
    inputs: tuple[int, ...], outputs: int, width: int = 32, norm: str = "instance", dropout: float = 0.0
) -> nn.Module:
    """Build UNet++ without the outputs of its inner nodes, which have the same size as the last one's."""
    features = (width, width, 2 * width, 4 * width, 8 * width, width)
    model = segmenter(inputs, outputs, "BasicUNetPlusPlus", features=features, norm=_norm(norm, width), dropout=dropout)
    for inner in ("final_conv_0_1", "final_conv_0_2", "final_conv_0_3"):
        setattr(model, inner, nn.Identity())
    return _First(model)


class _First(nn.Module):
    """A network that returns the first of its model's outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.net(x)[0]
        return first


def residual_unet(
    inputs: tuple[int, ...],
    outputs: int,
    width: int = 16,
    levels: int = 5,
    num_res_units: int = 2,
    norm: str = "instance",
    dropout: float = 0.0,
) -> nn.Module:
    """Build MONAI's UNet of ``levels`` with ``num_res_units`` convolutions in each residual unit."""
    channels = tuple(width * 2**level for level in range(levels))
    return segmenter(
        inputs,
        outputs,
        "UNet",
        channels=channels,
        strides=(2,) * (levels - 1),
        num_res_units=num_res_units,
        norm="instance" if norm == "instance" else _norm(norm, 1),
        dropout=dropout,
    )


def dynunet(
    inputs: tuple[int, ...], outputs: int, levels: int = 4, deep_supervision: bool = False, **options: Any
) -> nn.Module:
    """Build DynUNet of ``levels``. With deep supervision, all levels but the two lowest predict."""
    from monai.networks import nets

    kernels, strides = [3] * levels, [1] + [2] * (levels - 1)
    given = {"kernel_size": kernels, "strides": strides, "upsample_kernel_size": strides[1:], **_tuples(options)}
    if not deep_supervision:
        return segmenter(inputs, outputs, "DynUNet", **given)
    if (heads := len(given["strides"]) - 2) < 1:
        raise ConfigError("dynunet: deep supervision needs at least 3 levels")

    class Deep(nets.DynUNet):  # type: ignore[misc]  # MONAI has no types
        """Returns the predictions of the lower levels at their own sizes; MONAI's enlarges and stacks them."""

        def forward(self, x: Tensor) -> Tensor | list[Tensor]:
            finest: Tensor = self.output_block(self.skip_layers(x))
            if not self.training:
                return finest
            lower = list(self.heads)
            self.heads[:] = [torch.zeros(())] * len(self.heads)  # the activations of one step are not kept
            return [finest, *lower]

    given |= {"deep_supervision": True, "deep_supr_num": heads}
    return Deep(**_places(inputs, outputs), **given)


def attention_unet(
    inputs: tuple[int, ...], outputs: int, width: int = 16, levels: int = 5, dropout: float = 0.0
) -> nn.Module:
    """Build the attention U-Net of ``levels``."""
    channels = tuple(width * 2**level for level in range(levels))
    return segmenter(inputs, outputs, "AttentionUnet", channels=channels, strides=(2,) * (levels - 1), dropout=dropout)


def vnet(inputs: tuple[int, ...], outputs: int, norm: str = "batch", **options: Any) -> nn.Module:
    """Build V-Net with ``norm``: ``batch``, ``group`` or ``instance``."""
    dims = len(inputs) - 1
    model = segmenter(inputs, outputs, "VNet", dropout_dim=dims, **options)
    return model if norm == "batch" else renormalized(model, norm, dims)


def highresnet(inputs: tuple[int, ...], outputs: int, norm: str = "batch", **options: Any) -> nn.Module:
    """Build HighRes3DNet with ``norm``: ``batch``, ``group`` or ``instance``."""
    model = segmenter(inputs, outputs, "HighResNet", **options)
    return model if norm == "batch" else renormalized(model, norm, len(inputs) - 1)


def segresnet_ds(
    inputs: tuple[int, ...],
    outputs: int,
    init_filters: int = 32,
    norm: str = "instance",
    deep_supervision: bool = False,
    **options: Any,
) -> nn.Module:
    """Build SegResNetDS. With deep supervision, the three finest levels predict."""
    depth = 3 if deep_supervision else 1
    return _Listing(
        segmenter(
            inputs,
            outputs,
            "SegResNetDS",
            init_filters=init_filters,
            norm=_norm(norm, init_filters),
            dsdepth=depth,
            **options,
        )
    )


def mednext(
    inputs: tuple[int, ...],
    outputs: int,
    size: str = "S",
    kernel_size: int = 3,
    deep_supervision: bool = False,
    **options: Any,
) -> nn.Module:
    """Build MedNeXt of ``size`` S, B, M or L, or with other options of MONAI's network."""
    from monai.networks.nets.mednext import create_mednext

    if not options:
        if size not in ("S", "B", "M", "L"):
            raise ConfigError(f"mednext: size = {size!r} is none of S, B, M and L")
        return _Listing(
            create_mednext(size, **_places(inputs, outputs), kernel_size=kernel_size, deep_supervision=deep_supervision)
        )
    return _Listing(
        segmenter(inputs, outputs, "MedNeXt", kernel_size=kernel_size, deep_supervision=deep_supervision, **options)
    )


class _Listing(nn.Module):
    """A network whose several predictions in training are a list, and one prediction a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        found = self.net(x)
        if isinstance(found, Tensor):
            return found
        return list(found) if self.training and len(found) > 1 else found[0]


def flexible_unet(
    inputs: tuple[int, ...], outputs: int, backbone: str = "efficientnet-b0", norm: str = "batch", **options: Any
) -> nn.Module:
    """Build a U-Net whose encoder is ``backbone``: ``efficientnet-b0`` to ``-b8`` or ``resnet10`` to ``resnet200``."""
    model = segmenter(inputs, outputs, "FlexibleUNet", backbone=backbone, **options)
    return model if norm == "batch" else renormalized(model, norm, len(inputs) - 1)


def unetr(inputs: tuple[int, ...], outputs: int, **options: Any) -> nn.Module:
    """Build UNETR, whose patches have 16 pixels along each axis."""
    if any(n % 16 for n in inputs[1:]):
        raise ConfigError(f"unetr needs inputs in multiples of 16, not {' x '.join(map(str, inputs[1:]))}")
    return segmenter(inputs, outputs, "UNETR", img_size=inputs[1:], **options)


def swin_unetr(inputs: tuple[int, ...], outputs: int, **options: Any) -> nn.Module:
    """Build SwinUNETR, which halves its inputs five times and normalizes at the last level."""
    size = inputs[1:]
    if any(n % 32 for n in size) or max(size, default=0) < 64:
        raise ConfigError(
            f"swin-unetr needs inputs in multiples of 32, and at least 64 along one axis, not "
            f"{' x '.join(map(str, size))}"
        )
    return segmenter(inputs, outputs, "SwinUNETR", **options)
