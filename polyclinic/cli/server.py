"""``polyclinic server``: what a coordinator does."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from polyclinic.cli.queue import REHEARSED, export_study, queue_order, queue_study, table_of, wait_for
from polyclinic.core import atomic
from polyclinic.engines.flare.pki import certificate_authority
from polyclinic.engines.flare.protocol.paths import ServerFolder, SetupError, read_small
from polyclinic.engines.flare.protocol.run_request import RunRequest
from polyclinic.engines.flare.server import server_setup, study_runs
from polyclinic.engines.flare.server.job_queue import Queue

app = App(name="server", help="Coordinate studies between hospitals, over NVIDIA FLARE.")
Home = Annotated[Path, Parameter(help="The server's folder. $POLYCLINIC_HOME, or the current folder, by default.")]
HERE = Path(os.environ.get("POLYCLINIC_HOME", "."))


@app.command
def init(
    *, project: str, host: str, organization: str, port: int = 8002, scheme: str = "grpc", home: Home = HERE
) -> None:
    """Make a server's folder, with a certificate authority of its own.

    Args:
        project: Names the federation, as in nodules-2026.
        host: Under which name sites reach this machine.
        organization: Who coordinates: letters, digits, underscores.
        port: The one port that sites connect to.
        scheme: grpc passes HTTP proxies; tcp is fastest; http uses web sockets.
    """
    fingerprint = server_setup.init(ServerFolder(home.resolve()), project, host, port, organization, scheme)
    print(f"made     the server of {project} in {home.resolve()}")
    print(f"ca       {fingerprint}")
    print("         Read this to every site on the telephone: it is how they know that a join file is yours.")
    print("next     polyclinic server start; then, for each site's request: polyclinic server admit FILE")


@app.command
def fingerprint(*, home: Home = HERE) -> None:
    """Print the fingerprint of this project's authority, which sites compare on the telephone."""
    server = ServerFolder(home.resolve())
    server_setup.settings(server)
    print(
        certificate_authority.fingerprint(
            certificate_authority.load_certificate(read_small(server.authority / "ca.crt"))
        )
    )


@app.command
def admit(request: Path, *, out: Path | None = None, days: float = 730, home: Home = HERE) -> None:
    """Admit the site that sent REQUEST, and write the join file to give back to it.

    Args:
        request: The site's request, as `polyclinic site init` wrote it.
        out: Where to write it; beside the request by default.
        days: How long the site's certificate is good for.
    """
    site, join = server_setup.admit(ServerFolder(home.resolve()), request, days)
    path = out or request.with_suffix(".join")
    atomic.write_json(path, join)
    print(f"admitted {site} of {join['organization']}, until {join['expires'][:10]}")
    print(
        f"give     {path} to the site. It holds no secret; the site checks it against the fingerprint of the authority."
    )


@app.command
def sites(*, home: Home = HERE) -> None:
    """The sites that were admitted, and which are connected."""
    server = ServerFolder(home.resolve())
    seen = server_setup.status(server)["sites"] if server_setup.is_up(server) else {}
    for site, entry in server_setup.sites(server).items():
        state = (
            f"revoked since {entry['revoked'][:10]}" if entry["revoked"] else "connected" if site in seen else "away"
        )
        print(f"{site:24} {state:24} {entry['organization']:20} certificate until {entry['expires'][:10]}")


@app.command(name="revoke")
def revoke(site: str, *, home: Home = HERE) -> None:
    """Take SITE's right to join: its certificate is worth nothing to this server any more.

    Args:
        site: The name of the site.
    """
    server_setup.revoke(ServerFolder(home.resolve()), site)
    print(f"revoked {site}")


@app.command
def reinstate(site: str, *, home: Home = HERE) -> None:
    """Give SITE its right to join back.

    Args:
        site: The name of the site.
    """
    server_setup.reinstate(ServerFolder(home.resolve()), site)
    print(f"reinstated {site}")


@app.command
def renew(*, days: float = 730, home: Home = HERE) -> None:
    """Make new certificates for the server and the coordinator. The authority stays, so sites notice nothing.

    Args:
        days: How many days the new certificates are valid.
    """
    server = ServerFolder(home.resolve())
    if server_setup.is_up(server):
        raise SetupError("stop the server first: polyclinic server stop")
    server_setup.renew(server, days)
    print("renewed  the certificates of the server and the coordinator")


@app.command
def start(*, background: bool = False, home: Home = HERE) -> None:
    """Run the server until it is stopped; runs go on from their checkpoints.

    Args:
        background: Whether to return at once. A service manager should not: see `polyclinic server unit`.
    """
    server = ServerFolder(home.resolve())
    if background:
        print(f"started  process {server_setup.start(server)}")
        return
    from polyclinic.engines.flare.server import supervisor

    server_setup.check(server)
    print(f"running  the server in {server.path}; Ctrl-C stops it")
    supervisor.main(str(server.path))


@app.command
def stop(*, home: Home = HERE) -> None:
    """Stop the server. Runs go on when it starts again."""
    print("stopped" if server_setup.stop(ServerFolder(home.resolve())) else "it was not running")


@app.command
def unit(*, user: str = "polyclinic", home: Home = HERE) -> None:
    """Print a systemd unit that keeps this server running.

    Args:
        user: The system user that the service runs as.
    """
    from polyclinic.engines.flare.client import site_setup

    print(site_setup.unit("server", home.resolve(), user), end="")


@app.command
def status(*, json_: bool = False, home: Home = HERE) -> None:
    """How the server, its sites and its runs are; of each run, who took part in its last round, who did not, and why.

    Args:
        json_: Print JSON, for monitoring. The exit code is then 1 unless the server runs and responds.
    """
    from polyclinic.cli.server_status import show

    show(ServerFolder(home.resolve()), json_)


@app.command
def run(
    file: Path,
    *,
    name: str = "",
    sites: tuple[str, ...] = (),
    inputs: tuple[int, ...] = (),
    outputs: int = 0,
    wait: bool = False,
    home: Home = HERE,
) -> None:
    """Put a study into the queue: the file that `polyclinic run` takes, unchanged.

    The sites first say what an example looks like and how many there are; then every method runs with every seed. The
    people at the sites approve the study once. `polyclinic server export` makes a run folder of it.

    Args:
        file: A study file; or an order for a single run, as JSON.
        name: What to call it here; the file's own name for it by default.
        sites: Who takes part; everybody who is admitted by default.
        inputs: Channels and size of an example, as in 1 32 32, where the sites should not be asked.
        outputs: With inputs: how many classes, labels or values.
        wait: Whether to stay until all of it is over.
    """
    server = ServerFolder(home.resolve())
    admitted = [site for site, entry in server_setup.sites(server).items() if not entry["revoked"]]
    if strange := [site for site in sites if site not in admitted]:
        raise SetupError(f"{strange[0]} is not admitted; there are {', '.join(admitted) or 'none yet'}")
    table = table_of(file)
    if "plan" in table:
        queued = [queue_order(server, file, table, name, sites or tuple(admitted))]
    else:
        queued = queue_study(server, file, name, sites or tuple(admitted), inputs, outputs)
    if not server_setup.is_up(server):
        print("next     polyclinic server start")
    elif wait:
        wait_for(server, queued, "" if "plan" in table else name or table["name"])


@app.command
def wait(name: str, *, home: Home = HERE) -> None:
    """Stay until NAME, a study or a run, is over, and tell how it goes.

    Args:
        name: The name of a study or a run.
    """
    server = ServerFolder(home.resolve())
    study = study_runs.all_of(server).get(name)
    if study is None and Queue(server).get(name) is None:
        raise SetupError(f"there is no study and no run called {name!r}: `polyclinic server status` lists them")
    wait_for(server, [] if study else [name], name if study else "")


@app.command
def rehearse(*, name: str = "", wait: bool = True, home: Home = HERE) -> None:
    """Run a tiny study with every site's imaginary data: no example of a patient is read. Before the first real one.

    Args:
        name: The name of the rehearsal; one is made by default.
        wait: Whether to wait until the rehearsal is over.
    """
    server = ServerFolder(home.resolve())
    who = tuple(site for site, entry in server_setup.sites(server).items() if not entry["revoked"])
    an = RunRequest(
        name or time.strftime("rehearsal-%Y%m%d-%H%M%S"),
        {
            "kind": "classification",
            "network": "mlp",
            "inputs": [4],
            "outputs": 2,
            "method": "fedavg",
            "sites": list(who),
            "rounds": 2,
        },
        data={"rehearsal": True},
        score_every=1,
        min_replies=max(len(who), 1),
    )
    server_setup.order(server, an)
    print(f"queued   {an.run} over {', '.join(who)}{REHEARSED}")
    if wait and server_setup.is_up(server):
        wait_for(server, [an.run])


@app.command
def cancel(run: str, *, home: Home = HERE) -> None:
    """End a run for good; its last checkpoint stays.

    Args:
        run: The name of the run.
    """
    Queue(ServerFolder(home.resolve())).cancel(run)
    print(f"cancelled {run}")


@app.command
def export(name: str, out: Path, *, home: Home = HERE) -> None:
    """Make the folder OUT of a study, for `polyclinic report`; or copy what a single run left.

    Args:
        name: A study, or a run.
        out: A new folder.
    """
    server = ServerFolder(home.resolve())
    study = study_runs.all_of(server).get(name)
    if study is not None:
        export_study(server, name, study, out)
        return
    folder = server.run(name)
    if not (folder / "model.safetensors").exists():
        raise SetupError(f"{name} has no model yet: `polyclinic server status` says how far it is")
    out.mkdir(parents=True, exist_ok=True)
    for path in ("model.safetensors", "predictions.safetensors", "records.jsonl", "journal.jsonl"):
        if (folder / path).exists():
            shutil.copy(folder / path, out / path)
    entry = Queue(server).get(name)
    if entry:
        atomic.write_json(out / "order.json", json.loads(entry.order))
    print(f"exported {name} to {out}{REHEARSED if entry and entry.what.rehearsal else ''}")
