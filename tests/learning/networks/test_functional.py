"""A model evaluated with other parameters is left as it was, also if modules share tensors or have two names."""

import copy

import pytest
import torch
from torch import Tensor, nn

from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.functional import at
from polyclinic.learning.networks.model_tree import load, params_of
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.segmentation import Segmentation


class TwoNames(nn.Module):
    """The second name of a layer is listed before another layer, as in MONAI's DynUNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.again(self.first(x)))
        return found


class SharedWeight(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x))
        return found


def dynunet() -> nn.Module:
    options = (("levels", 3), ("filters", (4, 8, 8)))
    return Segmentation(Network("dynunet", (1, 16, 16), 2, options)).model()


MODELS = {"two names": TwoNames, "shared weight": SharedWeight, "dynunet": dynunet}


def total(model: nn.Module, batch: Batch) -> Tensor:
    return torch.as_tensor(model(batch[0])).square().sum()


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_with_the_other_parameters_and_leaves_the_model_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    x = torch.randn(2, 1, 16, 16) if name == "dynunet" else torch.randn(4, 3)
    before = dict(model.named_parameters(remove_duplicate=False))
    other = {place: 2 * leaf.detach() + 0.1 for place, leaf in model.named_parameters()}
    expected = total(load(copy.deepcopy(model), {**params_of(model), **other}), (x, x))

    for leaf in other.values():
        leaf.requires_grad_()
    value = at(model, other, total, (x, x))
    assert torch.equal(value, expected)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[place] is leaf for place, leaf in before.items())
    assert before.keys() == after.keys()
    gradients = torch.autograd.grad(value, list(other.values()), allow_unused=True)
    assert any(g is not None and g.abs().sum() > 0 for g in gradients)


def test_any_name_of_a_shared_tensor_replaces_it() -> None:
    torch.manual_seed(0)
    model, x = SharedWeight(), torch.randn(4, 3)
    zero = torch.zeros(3, 3)
    found = at(model, {"second.weight": zero}, total, (x, x))
    assert found.item() == pytest.approx(4 * model.second.bias.square().sum().item())


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(KeyError, match="third"):
        at(SharedWeight(), {"third.weight": torch.zeros(3, 3)}, total, (torch.zeros(1, 3), torch.zeros(1)))
