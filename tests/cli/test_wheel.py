"""The bare wheel runs: core dependencies only, in an empty environment. Slow, and needs a package index."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
STUDY = """
name = "folder"
rounds = 1

[data]
kind = "folders"
levels = ["class"]
path = "images"
sites = { partition = "iid", count = 2 }
split = [0.6, 0.2, 0.2]

[task]
network = "cnn"

[[methods]]
name = "fedavg"
"""


def checked(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "POLYCLINIC_DATA")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=clean, timeout=1800)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done


def pictures(folder: Path) -> None:
    """Twenty pictures of each of two classes."""
    rng = np.random.default_rng(0)
    for label, level in (("dark", 60), ("light", 180)):
        (folder / label).mkdir(parents=True)
        for i in range(20):
            gray = np.clip(rng.normal(level, 20, (16, 16)), 0, 255).astype(np.uint8)
            Image.fromarray(gray).save(folder / label / f"p{label}{i:02}.png")


@pytest.mark.slow
def test_the_wheel_alone_runs_the_demo_a_study_and_its_report(tmp_path: Path) -> None:
    checked(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT), cwd=tmp_path)
    (wheel,) = tmp_path.glob("polyclinic-*.whl")
    checked(sys.executable, "-m", "venv", str(tmp_path / "venv"), cwd=tmp_path)
    python, command = (str(tmp_path / "venv" / "bin" / name) for name in ("python", "polyclinic"))
    checked(
        python, "-m", "pip", "install", "-q", "--constraint", str(ROOT / "constraints.txt"), str(wheel), cwd=tmp_path
    )
    absent = "import importlib.util as u; print([n for n in ('dp_accounting', 'nvflare') if u.find_spec(n)])"
    assert checked(python, "-c", absent, cwd=tmp_path).stdout.strip() == "[]"
    pictures(tmp_path / "images")
    (tmp_path / "s.toml").write_text(STUDY)
    told = json.loads(checked(command, "run", "s.toml", "--json", cwd=tmp_path).stdout)
    assert Path(tmp_path, told[0]["report"]).is_file()
    checked(command, "report", told[0]["run"], cwd=tmp_path)
    cut = "from polyclinic.cli.run import template; print(template('demo'))"
    (tmp_path / "demo.toml").write_text(checked(python, "-c", cut, cwd=tmp_path).stdout)
    checked(command, "run", "demo.toml", "--set", "rounds=1", "--set", "seeds=[0]", cwd=tmp_path)
    refused = subprocess.run(
        [command, "server", "init", "--project", "p", "--host", "localhost", "--organization", "o"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert refused.returncode == 2
    assert refused.stderr.strip().endswith('pip install "polyclinic[flare]"')
