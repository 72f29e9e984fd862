"""Startup kits for FLARE's processes, created by FLARE's provisioning and then restricted.

Changes to FLARE's defaults, and their reasons:
- Jobs and snapshots are stored in the server's folder, not in a temporary one that a reboot empties.
- A site may instantiate two classes of this package only, and no job may contain code: no role has the right ``byoc``.
- No role may run shell commands, read files or stream logs at a site; jobs must be signed.
- A dead site is detected after half a minute instead of ten.
- The processes of one organization communicate over a Unix domain socket in a private folder, not over loopback TCP.
- Local settings take precedence: FLARE uses the first settings file that it finds in its folder, a job's files
included, so the local ones are at the top of the folder, where FLARE looks first.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyclinic.core.atomic import write_private
from polyclinic.engines.flare.protocol.flare_job import CONTROLLER, EXECUTOR
from polyclinic.engines.flare.protocol.paths import private_folder

CONNECTION = "polyclinic.engines.flare.client.connection_log.Connection"
COORDINATOR = "coordinator@polyclinic.local"
DEAD_AFTER = 30
DRIVERS = Path(__file__).parents[1] / "drivers"
# All rights of a coordinator; the same file is installed at the server and at every site.
RIGHTS = {
    "format_version": "1.0",
    "permissions": {
        "lead": {
            "submit_job": "any",
            "manage_job": "any",
            "view": "any",
            "operate": "any",
            "download_job": "n:submitter",
            "clone_job": "none",
            "shell_commands": "none",
            "byoc": "none",
            "server-predeployed-flwr": "none",
        },
        "project_admin": "none",
        "org_admin": "none",
        "member": "none",
    },
}


def make_server(
    home_kit: Path, home_admin: Path, store: Path, server: Mapping[str, Any], certificates: Mapping[str, bytes]
) -> None:
    """Create the startup kits of a server and of its coordinator.

    Args:
        server: ``project``, ``host``, ``port``, ``scheme``, ``organization``, ``sites`` (largest number admitted).
        certificates: PEM by name: ``root``, ``server.crt``, ``server.key``, ``admin.crt``, ``admin.key``.
    """
    from nvflare.lighter.constants import ParticipantType
    from nvflare.lighter.entity import Participant

    admin = Participant(ParticipantType.ADMIN, COORDINATOR, server["organization"], {"role": "lead"})
    with tempfile.TemporaryDirectory() as work:
        made = _provision(Path(work), server, [admin])
        _install(
            made / server["host"],
            home_kit,
            {"server": (certificates["server.crt"], certificates["server.key"])},
            certificates["root"],
        )
        _install(
            made / COORDINATOR,
            home_admin,
            {"client": (certificates["admin.crt"], certificates["admin.key"])},
            certificates["root"],
        )
    resources = json.loads((home_kit / "local" / "resources.json.default").read_text())
    resources["class_allow_list"] = [CONTROLLER]
    resources["servers"][0] |= {"heart_beat_timeout": DEAD_AFTER, "max_num_clients": server["sites"]}
    resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(private_folder(store / "snapshots"))
    parts = {part["id"]: part for part in resources["components"]}
    parts["job_manager"]["args"]["uri_root"] = str(private_folder(store / "jobs"))
    resources["components"] = [part for key, part in parts.items() if key != "log_receiver"]
    _close(home_kit, resources)


def make_site(kit: Path, site: Mapping[str, Any], certificate: bytes, key: bytes, root: bytes) -> None:
    """Create the startup kit of a site. ``site``: ``site``, ``organization``, ``project``, ``host``, ``port``,
    ``scheme``.
    """
    from nvflare.lighter.constants import ParticipantType
    from nvflare.lighter.entity import Participant

    client = Participant(ParticipantType.CLIENT, site["site"], site["organization"])
    with tempfile.TemporaryDirectory() as work:
        made = _provision(Path(work), site, [client])
        _install(made / site["site"], kit, {"client": (certificate, key)}, root)
    resources = json.loads((kit / "local" / "resources.json.default").read_text())
    resources |= {"class_allow_list": [EXECUTOR], "allow_log_streaming": False}
    parts = [part for part in resources["components"] if part["id"] != "site_log_streamer"]
    resources["components"] = [*parts, {"id": "connection", "path": CONNECTION, "args": {}}]
    _close(kit, resources)


def write_settings(kit: Path) -> None:
    """Write the settings that FLARE's processes in ``kit`` read first; called before each start.

    They contain the current paths of the folder and of the installation, both of which may have moved.
    """
    sockets = private_folder(kit / "sockets")
    for old in sockets.iterdir():
        old.unlink()
    internal = {"scheme": "unix", "resources": {"folder": str(sockets)}}
    comm = {"allow_adhoc_conns": False, "comm_driver_path": str(DRIVERS), "internal": internal}
    write_private(kit / "comm_config.json", json.dumps(comm, indent=1))
    for path in (kit / "local" / "resources.json", *sorted((kit / "startup").glob("fed_*.json"))):
        if path.exists():
            write_private(kit / path.name, path.read_bytes())


def _provision(work: Path, server: Mapping[str, Any], others: list[Any]) -> Path:
    """Return the folder that FLARE creates for a server and ``others``, without certificates."""
    from nvflare.lighter.constants import ParticipantType
    from nvflare.lighter.entity import Participant, Project
    from nvflare.lighter.impl.static_file import StaticFileBuilder
    from nvflare.lighter.impl.workspace import WorkspaceBuilder
    from nvflare.lighter.provisioner import Provisioner

    ports = {"fed_learn_port": server["port"], "admin_port": server["port"]}
    host = Participant(ParticipantType.SERVER, server["host"], server["organization"], ports)
    project = Project(server["project"], "created by polyclinic", [host, *others])
    builders = [
        WorkspaceBuilder(),
        StaticFileBuilder(config_folder="config", scheme=server["scheme"], require_signed_jobs=True),
    ]
    made = Provisioner(str(work), builders).provision(project, logger=_Quiet())
    if errors := made.get_errors():
        raise RuntimeError(f"FLARE could not create its folders: {errors[0]}")
    return Path(made.get_result_location())


def _install(made: Path, kit: Path, certificates: Mapping[str, tuple[bytes, bytes]], root: bytes) -> None:
    private_folder(kit.parent)
    if kit.exists():
        shutil.rmtree(kit)
    shutil.copytree(made, kit)
    private_folder(kit)
    for kind, (certificate, key) in certificates.items():
        write_private(kit / "startup" / f"{kind}.crt", certificate)
        write_private(kit / "startup" / f"{kind}.key", key)
    write_private(kit / "startup" / "rootCA.pem", root)


def _close(kit: Path, resources: Mapping[str, Any]) -> None:
    write_private(kit / "local" / "resources.json", json.dumps(resources, indent=1))
    write_private(kit / "local" / "authorization.json", json.dumps(RIGHTS, indent=1))


class _Quiet:
    """Logger for FLARE that discards all messages."""

    def info(self, *_: object) -> None: ...
    def debug(self, *_: object) -> None: ...
    def warning(self, *_: object) -> None: ...
    def error(self, *_: object) -> None: ...
