"""The segmentation loss is MONAI's, and can be computed example by example, as DP-SGD needs."""

import pytest
import torch
from monai.losses import DiceCELoss
from torch import nn
from torch.nn import functional as F

from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.tasks.segmentation_loss import dice_and_cross_entropy, supervision_weights
from polyclinic.learning.training.dp_sgd import per_example_gradients


@pytest.mark.parametrize(("inputs", "classes"), [((1, 16, 16), 2), ((1, 16, 16), 4), ((1, 16, 16, 16), 3)])
def test_the_loss_is_monais_to_the_bit_and_by_example(inputs: tuple[int, ...], classes: int) -> None:
    task = Segmentation(Network("unet", inputs, classes, (("width", 8), ("norm", "group"))))
    torch.manual_seed(0)
    model, x, y = task.model(), torch.randn(3, *inputs), torch.randint(0, classes, (3, *inputs[1:]))
    monai = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    assert torch.equal(task.loss(model, (x, y)), monai(model(x), y.unsqueeze(1)))
    params = {name: p.detach() for name, p in model.named_parameters()}
    found = per_example_gradients(model, params, task.loss, (x, y))
    alone = torch.autograd.grad(task.loss(model, (x[1:2], y[1:2])), list(model.parameters()))
    for name, gradient in zip(params, alone, strict=True):
        assert torch.allclose(found[name][1], gradient, atol=1e-5), name


class Heads(nn.Module):
    """Three outputs, the finest first, as networks with deep supervision return them in training."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(1, 3, 3, padding=1) for _ in range(count))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor] | torch.Tensor:
        outputs = [conv(x[:, :, :: 2**i, :: 2**i]) for i, conv in enumerate(self.convolutions)]
        return outputs if self.training else outputs[0]


def test_the_losses_of_all_resolutions_are_weighted() -> None:
    """Weights 2/3 and 1/3, and the coarsest of three 0; masks reduced by nearest neighbor, as batchgeneratorsv2 does."""
    assert supervision_weights(1) == [1.0]
    assert supervision_weights(2) == pytest.approx([2 / 3, 1 / 3])
    assert supervision_weights(4) == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0])
    task = Segmentation(Network("unet", (1, 16, 16), 3))
    model, x = Heads(), torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    y = torch.randint(-1, 3, (2, 16, 16), generator=torch.Generator().manual_seed(1))
    outputs = model(x)
    half = y[:, 1::2, 1::2]  # what "nearest-exact" takes of each pair
    fine, coarse = dice_and_cross_entropy(outputs[0], y, -1), dice_and_cross_entropy(outputs[1], half, -1)
    assert torch.allclose(task.loss(model, (x, y)), 2 / 3 * fine + 1 / 3 * coarse, atol=1e-6)
    task.loss(model, (x, y)).backward()
    assert [conv.weight.grad is not None for conv in model.convolutions] == [True, True, False]
    assert task.predict(model.eval(), x).shape == (2, 3, 16, 16)


def test_batch_dice_takes_all_images_together() -> None:
    g = torch.Generator().manual_seed(0)
    scores, y = torch.randn(3, 2, 8, 8, generator=g), torch.randint(0, 2, (3, 8, 8), generator=g)
    y[0] = 0  # no foreground: alone, its Dice is 0
    p, t = scores.softmax(1)[:, 1], (y == 1).float()
    together = 1 - (2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5)
    alone = 1 - ((2 * (p * t).sum((1, 2)) + 1e-5) / (p.sum((1, 2)) + t.sum((1, 2)) + 1e-5)).mean()
    entropy = F.cross_entropy(scores, y)
    assert torch.allclose(dice_and_cross_entropy(scores, y, -1, True), together + entropy, atol=1e-6)
    assert torch.allclose(dice_and_cross_entropy(scores, y, -1), alone + entropy, atol=1e-6)
