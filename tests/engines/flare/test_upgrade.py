"""Backup and restore of a server and its sites, and an upgrade, rehearsed with real processes as the guide says."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nvflare", reason="the extra [flare] is not installed")

import polyclinic
from polyclinic.core.audit_log import verify
from polyclinic.engines.flare.client.reviews import APPROVED, WAITING, Review, Reviews
from polyclinic.engines.flare.protocol.run_request import code_hash
from polyclinic.engines.flare.server.job_queue import FINISHED
from tests.support.flare_deployment import Hospitals, study, until

pytestmark = [pytest.mark.slow, pytest.mark.deploy]
SITES = ("site-0", "site-1")
PACKAGE = Path(polyclinic.__file__).parent


def later_version(folder: Path) -> Path:
    """A copy of Polyclinic with another version number and another function in the code that computes."""
    shutil.copytree(PACKAGE, folder / "polyclinic", ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "polyclinic" / "__init__.py"
    text, changed = re.subn(r'^__version__ = ".*"$', '__version__ = "9.9.9"', file.read_text(), flags=re.MULTILINE)
    assert changed == 1
    file.write_text(text)
    with (folder / "polyclinic" / "core" / "tree.py").open("a") as code:
        code.write('\n\ndef of_a_later_version() -> int:\n    """Return one."""\n    return 1\n')
    return folder


def restored_elsewhere(folder: Path) -> None:
    """Copies a folder into an archive, loses it, and takes it out of the archive again."""
    archive = folder.with_suffix(".tar.gz")
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, folder.name)
    shutil.rmtree(folder)
    with tarfile.open(archive) as file:
        file.extractall(folder.parent, filter="data")


def by_person(hospitals: Hospitals, *words: str) -> str:
    """What a command of the installed version prints, in a process of its own."""
    env = {**os.environ, **hospitals.env}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "polyclinic.cli.app", *words], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_backup_is_restored_and_everything_is_upgraded(tmp_path: Path) -> None:
    hospitals = Hospitals(tmp_path / "all", count=2)

    def review(site: str, run: str) -> Review | None:
        return Reviews(hospitals.homes[site].reviews).get(run)

    def offered_anew(site: str) -> bool:
        return (one := review(site, "after")) is not None and one.code != code_hash()

    with hospitals:
        hospitals.order(study("before", "fedavg", sites=SITES, rounds=2))
        hospitals.finished("before")
    journals = {home.path: list(verify(home.journal)) for home in hospitals.homes.values()}
    result = (hospitals.server.run("before") / "checkpoint.safetensors").read_bytes()
    for folder in (hospitals.server.path, *(home.path for home in hospitals.homes.values())):
        restored_elsewhere(folder)
    new = later_version(tmp_path / "new")
    hospitals.env["PYTHONPATH"] = hospitals.env["PYTHONPATH"].replace(str(PACKAGE.parent), str(new))
    assert by_person(hospitals, "--version").strip() == "9.9.9"
    with hospitals:
        # What was there before is there again, and the new version reads it.
        for home in hospitals.homes.values():
            assert list(verify(home.journal))[: len(journals[home.path])] == journals[home.path]
        assert (hospitals.server.run("before") / "checkpoint.safetensors").read_bytes() == result
        found: dict[str, Any] = json.loads(
            by_person(hospitals, "server", "status", "--json", "--home", str(hospitals.server.path))
        )
        assert found["runs"]["before"]["state"] == FINISHED
        # Approvals of the earlier code do not hold for the new one: people at the sites approve again.
        hospitals.order(study("after", "fedavg", sites=SITES, rounds=2))
        for site, home in hospitals.homes.items():
            until(partial(offered_anew, site), f"the offer of the new code at {site}")
            assert (offer := review(site, "after")) is not None
            assert offer.state == WAITING
            assert "rounds" in by_person(hospitals, "site", "review", "after", "--home", str(home.path))
            by_person(hospitals, "site", "approve", "after", "--reason", "upgraded", "--home", str(home.path))
        hospitals.finished("after")
        for site in SITES:
            assert (known := review(site, "before")) is not None
            assert known.state == APPROVED  # of the earlier code, by the signature of the restored key
        hospitals.journals_hold()
