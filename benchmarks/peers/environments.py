"""Creates one virtual environment for each peer: ``python benchmarks/peers/environments.py FOLDER [PEER...]``.

A peer is installed from its package. An environment has its own packages first and then those of the environment that
runs this script, so that all peers compute with the same build of PyTorch, and nothing downloads another one. The
constraint on torch fails the installation of a peer that does not accept that build.
"""

import subprocess
import sys
import sysconfig
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path

PEERS = {
    "pfl": ["pfl==0.6.0"],
    "fluke": ["diskcache", "pandas", "scikit-learn", "rich", "omegaconf", "seaborn", "cerberus", "torchmetrics"],
    "flower": ["flwr[simulation]==1.42.0"],
    "flare": ["nvflare==2.9.0"],
}
"""Packages of each peer."""
ALONE = {"fluke": ["fluke-fl==0.8.1"]}
"""Packages that are installed without those that they require: fluke requires torchvision, which the constraints
exclude. For ``fluke.algorithms.fedavg``, those in ``PEERS`` suffice."""


def create(folder: Path, peer: str) -> Path:
    """Create the environment of ``peer`` in ``folder``, and return its Python."""
    place = folder / peer
    venv.create(place, with_pip=True, clear=True)
    python = place / "bin" / "python"
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (Path(own) / "polyclinic-base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write(f"torch=={version('torch')}\ntorchvision==0\n")
        constraints.flush()
        install = [python, "-m", "pip", "install", "-q", "-c", constraints.name]
        if alone := ALONE.get(peer):
            subprocess.run([*install, "--no-deps", *alone], check=True)
        subprocess.run([*install, *PEERS[peer]], check=True)
    return python


if __name__ == "__main__":
    root = Path(sys.argv[1])
    root.mkdir(parents=True, exist_ok=True)
    if unknown := set(sys.argv[2:]) - set(PEERS):
        sys.exit(f"no peer {', '.join(sorted(unknown))}: known are {', '.join(PEERS)}")
    for name in sys.argv[2:] or PEERS:
        try:
            print(f"{name}: {create(root, name)}")
        except subprocess.CalledProcessError as error:
            print(f"{name}: not installed ({error})")
