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
    "flower": ["flwr[simulation]==1.42.0"],
}
"""Packages of each peer that is not in the environment of Polyclinic itself."""


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
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints.name, *PEERS[peer]], check=True)
    return python


if __name__ == "__main__":
    root = Path(sys.argv[1])
    root.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or PEERS:
        try:
            print(f"{name}: {create(root, name)}")
        except subprocess.CalledProcessError as error:
            print(f"{name}: not installed ({error})")
