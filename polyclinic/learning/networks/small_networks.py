"""Two small networks for tables and for small images, and the parts that they share with others."""

from torch import Tensor, nn

from polyclinic.errors import ConfigError


class Classifier(nn.Module):
    """An encoder that computes a representation, and a linear head."""

    def __init__(self, encoder: nn.Module, features: int, outputs: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, *inputs] to [b, outputs]."""
        prediction: Tensor = self.head(self.encoder(x))
        return prediction


def group_count(channels: int) -> int:
    """Return the largest number of groups, up to 8, into which channels divide evenly."""
    return max(n for n in range(1, 9) if channels % n == 0)


def normalize(kind: str, channels: int, dims: int) -> nn.Module:
    """Build a normalization layer over ``channels``: ``batch``, ``group``, ``instance`` or ``none``."""
    match kind:
        case "batch":
            return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims](channels)
        case "group":
            return nn.GroupNorm(group_count(channels), channels)
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
