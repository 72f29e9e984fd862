"""Start, discovery and termination of FLARE processes, limited to those that work in one of Polyclinic's folders."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from polyclinic.engines.flare.pki import provisioning as kits
from polyclinic.engines.flare.protocol.paths import SetupError

MODULES = {
    "server": ("nvflare.private.fed.app.server.server_train", "fed_server.json"),
    "site": ("nvflare.private.fed.app.client.client_train", "fed_client.json"),
}
# Return the memory of large tensors to the system at once; glibc would otherwise raise its threshold and keep it.
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**23), "MALLOC_TRIM_THRESHOLD_": str(2**26), "MALLOC_ARENA_MAX": "2"}
MAX_LOG = 50 * 2**20
STEADY = 300.0
"""Seconds after which a process counts as running well."""
MAX_PAUSE = 60.0
"""Seconds before a process that keeps ending is started again, at most."""


def start(kind: str, kit: Path, log: Path, **settings: str) -> subprocess.Popen[bytes]:
    """Start FLARE's process of a ``server`` or a ``site`` in ``kit``, in its own session."""
    module, config = MODULES[kind]
    kits.write_settings(kit)
    given = [f"{key}={value}" for key, value in {"secure_train": "true", "config_folder": "config", **settings}.items()]
    command = [sys.executable, "-m", module, "-m", str(kit), "-s", config, "--set", *given]
    memory = MEMORY if kind == "server" else {}
    env = {**memory, **os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONUNBUFFERED": "1"}
    turn_over(log)
    with open(log, "ab") as out:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True, cwd=kit
        )


class KeptProcess:
    """A process that is started again when it has ended, after a pause that doubles with every crash.

    Attributes:
        crashes: How often it has ended since it last ran for ``STEADY`` seconds.
    """

    def __init__(self, begin: Callable[[], subprocess.Popen[bytes]], ended: Callable[[int, int], None]) -> None:
        """``begin`` starts the process; ``ended`` receives the exit code and the number of crashes."""
        self.crashes = 0
        self._begin, self._ended = begin, ended
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    def look(self) -> bool:
        """Start the process if it does not run and the pause is over; return whether it was started."""
        if self._process is not None:
            if (code := self._process.poll()) is None:
                if time.time() - self._started > STEADY:
                    self.crashes = 0
                return False
            self.crashes += 1
            self._process = None
            self._ended(code, self.crashes)
        if self.crashes and time.time() < self._started + min(MAX_PAUSE, 2.0**self.crashes):
            return False
        self._process, self._started = self._begin(), time.time()
        return True


def keep(what: str, module: str, home: Path, up: Callable[[], bool]) -> int:
    """Start the supervisor of a ``"server"`` or a ``"site"`` in its own session, and wait until it is ``up``.

    Returns:
        The process number.

    Raises:
        SetupError: If it does not start.
    """
    file = home / f"{what}.log"
    with open(file, "ab") as log:
        command = [sys.executable, "-m", module, str(home)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if process.poll() is not None:
            raise SetupError(f"the {what} did not start: see the end of {file}")
        if up():
            return process.pid
        time.sleep(0.2)
    raise SetupError(f"the {what} did not start within a minute: see {file}")


def turn_over(log: Path) -> None:
    """Rotate a log larger than ``MAX_LOG`` bytes to a file ending in ``.1``."""
    if log.exists() and log.stat().st_size > MAX_LOG:
        os.replace(log, log.with_name(f"{log.name}.1"))


def working_in(folder: Path) -> list[int]:
    """Return the processes of FLARE and Polyclinic whose command line names ``folder`` or a path in it."""
    pids = []
    mine, path = os.getpid(), str(folder)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == mine:
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        ours = any(word.startswith(("nvflare.", "polyclinic.engines.flare.")) for word in words)
        if ours and any(word == path or word.startswith(f"{path}/") for word in words):
            pids.append(int(entry.name))
    return sorted(pids)


def listening(folder: Path) -> dict[int, int]:
    """Return the TCP ports on which processes that work in ``folder`` listen, each with its process."""
    ports: dict[str, int] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for words in (line.split() for line in lines):
            if words[3] == "0A":  # LISTEN
                ports[words[9]] = int(words[1].rpartition(":")[2], 16)
    found = dict[int, int]()
    for pid in working_in(folder):
        try:
            links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        found |= {ports[inode]: pid for link in links if (inode := link[8:-1]) in ports and link.startswith("socket:[")}
    return found


def taken(port: int) -> bool:
    """Return whether a process on this machine listens on ``port``. FLARE would share the port with it, and its sites
    too.
    """
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def end(folder: Path, patience: float = 5.0) -> int:
    """Terminate every process that works in ``folder``, by force after ``patience`` seconds; return their number."""
    pids = working_in(folder)
    for pid in pids:
        _signal(pid, signal.SIGTERM)
    until = time.monotonic() + patience
    while working_in(folder) and time.monotonic() < until:
        time.sleep(0.1)
    for _ in range(50):
        left = working_in(folder)
        if not left:
            break
        for pid in left:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.1)
    return len(pids)


def terminate(pid: int, begun: str, patience: float) -> None:
    """Terminate the process ``pid`` that started at ``begun``, by force after ``patience`` seconds."""
    _signal(pid, signal.SIGTERM)
    until = time.monotonic() + patience
    while alive(pid, begun) and time.monotonic() < until:
        time.sleep(0.1)
    if alive(pid, begun):
        _signal(pid, signal.SIGKILL)


def alive(pid: int, begun: str = "") -> bool:
    """Return whether a process is alive and, if ``begun`` is given, has that start time."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return text[0] != "Z" and (not begun or text[19] == begun)


def birth(pid: int) -> str:
    """Return the start time of a process in kernel ticks, or an empty text if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _signal(pid: int, which: signal.Signals) -> None:
    try:
        os.kill(pid, which)
    except (ProcessLookupError, PermissionError):
        return
