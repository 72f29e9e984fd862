"""The deployment guide, followed literally, in an empty folder: its files saved, its commands typed, one by one."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import polyclinic
from polyclinic.engines.flare import flare_processes
from polyclinic.evaluation.records.run_reader import read_run
from tests.support.flare_deployment import free_port

GUIDE = Path(__file__).parents[3] / "docs" / "how-to" / "deployment.md"
PATIENCE = 600


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and content of each fenced block."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[str]:
    for language, content in blocks(text):
        if language == "console":
            yield from (line[2:] for line in content.splitlines() if line.startswith("$ "))


def test_every_command_of_the_guide_is_one() -> None:
    """Names of commands and options, without running anything."""
    from cyclopts import App

    from polyclinic.cli import journal, server, site

    for text in [*commands(GUIDE.read_text()), *re.findall(r"^polyclinic .*$", GUIDE.read_text(), re.MULTILINE)]:
        words = re.sub(r"\"\$\(.*?\)\"", "x", text).split()
        if words[0] != "polyclinic" or words[1] not in ("server", "site", "journal"):
            continue
        app: App = {"server": server.app, "site": site.app, "journal": journal.app}[words[1]]
        assert words[2] in list(app), text
        known = {name for argument in app[words[2]].assemble_argument_collection() for name in argument.names}
        options = {word for word in words if word.startswith("--")}
        assert options <= known, text


@pytest.mark.deploy
@pytest.mark.slow
def test_the_guide_works_as_it_stands(tmp_path: Path) -> None:
    pytest.importorskip("nvflare", reason="the extra [flare] is not installed")
    text = GUIDE.read_text()
    port = re.search(r"--port (\d+)", text)
    assert port
    text = text.replace(port[1], str(free_port()))
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "polyclinic").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m polyclinic.cli.app "$@"\n')
    (bin / "polyclinic").chmod(0o755)
    (bin / "python").symlink_to(sys.executable)
    root = Path(polyclinic.__file__).parents[1]
    env = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    env.pop("POLYCLINIC_HOME", None)
    place = tmp_path / "empty"
    place.mkdir()
    for _, content in blocks(text):
        if name := re.match(r"# ([\w.]+)\n", content):
            (place / name[1]).write_text(content)
    try:
        for command in commands(text):
            done = subprocess.run(
                [
                    "bash",
                    "-c",
                    command.replace("python ", f"{sys.executable} ", 1) if command.startswith("python ") else command,
                ],
                cwd=place,
                env=env,
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=PATIENCE,
            )
            print(f"$ {command}\n{done.stdout}{done.stderr}")
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        left = flare_processes.working_in(place)
    finally:
        flare_processes.end(place)
    assert not left, "everything that was started was stopped"
    run = read_run(place / "results")
    assert {label for label, _ in run.arms} == {"local", "fedavg"}
    assert all(set(sites) == {"lyon"} for sites in run.arms.values()), "Oslo keeps its predictions"
    scored = {(line.method, line.site) for line in run.lines if line.kind == "test"}
    assert scored == {(m, s) for m in ("local", "fedavg") for s in ("lyon", "oslo")}
    page = (place / "results" / "report" / "report.html").read_text()
    assert "Sites without predictions for single patients" in page
    assert not (place / "oslo" / "keys").exists()
    assert (place / "oslo" / "journal.jsonl").exists()
    assert json.loads((place / "coordinator" / "admitted.json").read_text())["oslo"]["revoked"] == ""
