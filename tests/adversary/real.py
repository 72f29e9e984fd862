"""Hostile servers, sites and local accounts among real processes: what ``server`` and ``site`` do without FLARE.

Wishes are files in the folder of faults, which ``tests/support/inside/sitecustomize.py`` obeys in the processes.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.flare_deployment import Hospitals

LOOPBACK = "0100007F"
# From loopback, without any certificate: becomes a cell below a site's process and sends requests to its sibling processes.
STRANGER = r"""
import json, os, sys, time
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.message import Message
port, me, targets = sys.argv[1], sys.argv[2], sys.argv[3:]
cell = CoreCell(fqcn=me, root_url="grpc://localhost:1", secure=False, credentials={}, create_internal_listener=False,
                parent_url=f"tcp://localhost:{port}")
cell.start()
time.sleep(3)
for target in targets:
    for topic in ("peers", "process_info", "config_vars"):
        try:
            answer = cell.send_request("_net_manager", topic, target, Message(payload=None), timeout=8.0)
            code = answer.headers.get("return_code") or answer.headers.get("_return_code")
            payload = answer.payload
        except Exception as error:
            code, payload = type(error).__name__, None
        print("HEARD " + json.dumps([target, topic, str(code), str(payload)[:300]]), flush=True)
os._exit(0)
"""


class Heard(NamedTuple):
    """What a hostile server job heard to one request at one site."""

    job: str
    round: int
    site: str
    answered: bool
    reason: str


def wish(hospitals: Hospitals, run: str, requests: Sequence[tuple[str, int, float]]) -> None:
    """Lets the server's job of ``run`` ask all sites, after training, for each job and round, with a model
    moved by so much.
    """
    (hospitals.faults / f"hostile-{run}").write_text(json.dumps(requests))


def heard(hospitals: Hospitals, run: str) -> list[Heard]:
    """What came of the wishes."""
    path = hospitals.faults / f"hostile-{run}.done"
    assert path.exists(), "the hostile server never asked"
    return [Heard(*entry) for entry in json.loads(path.read_text())]


def listening(pids: Sequence[int]) -> list[int]:
    """The loopback TCP ports on which any of the processes listens."""
    sockets = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                sockets.add(target[8:-1])
    ports = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                ports.append(int(fields[1].rpartition(":")[2], 16))
    return sorted(set(ports))


def stranger(port: int, name: str, targets: Sequence[str], folder: Path) -> list[list[Any]]:
    """Return what a process without any file of the site receives through a loopback port: target, topic, code, answer."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("POLYCLINIC")}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(port), name, *targets],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("HEARD ")]


def size_of(folder: Path) -> int:
    """The bytes of all files below ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
