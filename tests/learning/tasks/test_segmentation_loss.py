"""The segmentation loss is MONAI's, and can be computed example by example, as DP-SGD needs."""

import pytest
import torch
from monai.losses import DiceCELoss

from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.segmentation import Segmentation
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
