"""``polyclinic server``: the commands of a coordinator."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from polyclinic.cli.queue import REHEARSED, export_study, queue_order, queue_study, table_of, wait_for
from polyclinic.cli.rendering import Json, document, hint, line
from polyclinic.core import atomic
from polyclinic.engines.flare.pki import certificate_authority
from polyclinic.engines.flare.protocol.paths import ServerFolder, SetupError, read_small
from polyclinic.engines.flare.protocol.run_request import RunRequest
from polyclinic.engines.flare.server import server_setup, study_runs
from polyclinic.engines.flare.server.job_queue import Queue

app = App(name="server", help="Coordinate studies between hospitals, over NVIDIA FLARE.")
Home = Annotated[Path, Parameter(help="The server's folder; $POLYCLINIC_HOME or the current folder by default.")]
HERE = Path(os.environ.get("POLYCLINIC_HOME", "."))


@app.command
def init(
    *,
    project: str,
    host: str,
    organization: str,
    port: int = 8002,
    scheme: Literal["grpc", "tcp", "http"] = "grpc",
    home: Home = HERE,
    json_: Json = False,
) -> None:
    """Create a server's folder with its own certificate authority.

    Args:
        project: Name of the federation, such as nodules-2026.
        host: Host name by which sites reach this machine.
        organization: The coordinating organization: letters, digits, underscores.
        port: The one port that sites connect to.
        scheme: grpc passes HTTP proxies; tcp is fastest; http uses web sockets.
    """
    with document(json_) as emit:
        fingerprint = server_setup.init(ServerFolder(home.resolve()), project, host, port, organization, scheme)
        line(f"created  the server of {project} in {home.resolve()}")
        line(f"ca       {fingerprint}")
        emit({"project": project, "folder": home.resolve(), "fingerprint": fingerprint})
        hint("         Read this fingerprint to every site on the telephone, so that it can verify its join file.")
        hint("next     polyclinic server start; then, for each site's request: polyclinic server admit FILE")


@app.command
def fingerprint(*, home: Home = HERE, json_: Json = False) -> None:
    """Print the fingerprint of this project's certificate authority, which sites compare on the telephone."""
    server = ServerFolder(home.resolve())
    server_setup.settings(server)
    with document(json_) as emit:
        certificate = certificate_authority.load_certificate(read_small(server.authority / "ca.crt"))
        text = certificate_authority.fingerprint(certificate)
        line(text)
        emit({"fingerprint": text})


@app.command
def admit(request: Path, *, out: Path | None = None, days: float = 730, home: Home = HERE, json_: Json = False) -> None:
    """Admit the site that sent REQUEST, and write its join file.

    Args:
        request: The site's request, which `polyclinic site init` wrote.
        out: The join file to write; next to the request by default.
        days: Validity of the site's certificate.
    """
    with document(json_) as emit:
        site, join = server_setup.admit(ServerFolder(home.resolve()), request, _positive(days))
        path = out or request.with_suffix(".join")
        atomic.write_json(path, join)
        line(f"admitted {site} of {join['organization']}, until {join['expires'][:10]}")
        emit({"site": site, "organization": join["organization"], "expires": join["expires"], "join_file": path})
        hint(
            f"give     {path} to the site. It contains no secret; the site verifies it by the authority's fingerprint."
        )


@app.command
def sites(*, home: Home = HERE, json_: Json = False) -> None:
    """List the admitted sites, and which of them are connected."""
    server = _server(home)
    with document(json_) as emit:
        connected = server_setup.status(server)["sites"] if server_setup.is_up(server) else {}
        rows = []
        for site, entry in server_setup.sites(server).items():
            state = "revoked" if entry["revoked"] else "connected" if site in connected else "not connected"
            since = f" {entry['revoked'][:10]}" if entry["revoked"] else ""
            line(f"{site:24} {state + since:24} {entry['organization']:20} certificate until {entry['expires'][:10]}")
            rows.append({"site": site, "state": state} | {k: entry[k] for k in ("organization", "revoked", "expires")})
        emit(rows)
        if not rows:
            hint("no site is admitted yet: polyclinic server admit FILE, with the request of a site")


@app.command(name="revoke")
def revoke(site: str, *, home: Home = HERE, json_: Json = False) -> None:
    """Revoke SITE's certificate: this server refuses its messages from now on.

    Args:
        site: The name of the site.
    """
    with document(json_) as emit:
        server_setup.revoke(ServerFolder(home.resolve()), site)
        line(f"revoked {site}")
        emit({"site": site, "state": "revoked"})


@app.command
def reinstate(site: str, *, home: Home = HERE, json_: Json = False) -> None:
    """Undo the revocation of SITE's certificate.

    Args:
        site: The name of the site.
    """
    with document(json_) as emit:
        server_setup.reinstate(ServerFolder(home.resolve()), site)
        line(f"reinstated {site}")
        emit({"site": site, "state": "admitted"})


@app.command
def renew(*, days: float = 730, home: Home = HERE, json_: Json = False) -> None:
    """Create new certificates for the server and the coordinator. The authority stays, so sites need not act.

    Args:
        days: Validity of the new certificates.
    """
    server = ServerFolder(home.resolve())
    if server_setup.is_up(server):
        raise SetupError("stop the server first: polyclinic server stop")
    with document(json_) as emit:
        server_setup.renew(server, _positive(days))
        line("renewed  the certificates of the server and the coordinator")
        emit({"folder": server.path, "days": days})


@app.command
def start(*, background: bool = False, home: Home = HERE) -> None:
    """Run the server until it is stopped; runs continue from their checkpoints.

    Args:
        background: Start it in the background and return. A service manager should not do so: see `polyclinic server
            unit`.
    """
    server = ServerFolder(home.resolve())
    if background:
        line(f"started  process {server_setup.start(server)}")
        return
    from polyclinic.engines.flare.server import supervisor

    server_setup.check(server)
    line(f"running  the server in {server.path}; Ctrl-C stops it")
    supervisor.main(str(server.path))


@app.command
def stop(*, home: Home = HERE, json_: Json = False) -> None:
    """Stop the server. Runs continue when it starts again."""
    with document(json_) as emit:
        stopped = server_setup.stop(_server(home))
        line("stopped" if stopped else "the server was not running")
        emit({"stopped": stopped})


@app.command
def notify(*, home: Home = HERE, json_: Json = False) -> None:
    """Send a test message as notify.toml in this folder says. Exit code 1 if a way fails.

    A running server notifies people of runs that failed and of studies that stopped.
    """
    from polyclinic.cli.site import send_test

    server = _server(home)
    with document(json_) as emit:
        failures = send_test(
            server.path, f"This is a test from the server of {server_setup.settings(server)['project']}."
        )
        emit({"failures": failures})
    if failures:
        raise SystemExit(1)


@app.command
def unit(*, user: str = "polyclinic", home: Home = HERE) -> None:
    """Print a systemd unit that keeps this server running.

    Args:
        user: The system user that the service runs as.
    """
    from polyclinic.engines.flare.client import site_setup

    print(site_setup.unit("server", home.resolve(), user), end="")


@app.command
def status(*, home: Home = HERE, json_: Json = False) -> None:
    """Show the state of the server, its sites and its runs, and the participation in each run's last round.

    With --json, for monitoring, the exit code is 1 unless the server runs and responds.
    """
    from polyclinic.cli.server_status import show

    show(ServerFolder(home.resolve()), json_)


@app.command
def console(
    *,
    studies: Path | None = None,
    port: int = 8767,
    open_: Annotated[bool, Parameter(name="--open")] = False,
    viewer: bool = False,
    link: bool = False,
    metrics_key: Path | None = None,
    home: Home = HERE,
) -> None:
    """Show this server in the browser of this machine: sites, queue, progress, faults, and what a run waits for.

    Sites can be admitted and revoked there, and studies queued, canceled and exported. The console is reached by this
    machine only; see docs/how-to/console.md for another machine's browser.

    Args:
        studies: The folder with the study files that can be queued; the server's folder by default.
        port: The port on the loopback interface; 0 for any free one.
        open_: Open the page in this machine's browser.
        viewer: Print a link that may look and change nothing.
        link: Print another link of the console that runs.
        metrics_key: A file with the key for /metrics; it is created if it does not exist.
    """
    from polyclinic.console import serve

    server = _server(home)
    if link:
        line(f"open     {serve.new_link('server', server.path, viewer)}")
        return
    serve.require()
    from polyclinic.console.server import ServerPage

    page = ServerPage(server.path, studies)
    serve.serve(page, server.path, port, line, open_browser=open_, viewer=viewer, metrics_key=metrics_key)


@app.command
def run(
    file: Path,
    *,
    name: str = "",
    sites: tuple[str, ...] = (),
    inputs: tuple[int, ...] = (),
    outputs: int = 0,
    send_weights: bool = False,
    wait: bool = False,
    home: Home = HERE,
    json_: Json = False,
) -> None:
    """Add a study to the queue, from the same file that `polyclinic run` takes.

    The sites are first surveyed for the shape and number of their examples; then every method runs with every seed. A
    person at each site approves the study once. `polyclinic server export` writes its run folder.

    Args:
        file: A study file; or the request for a single run, as JSON.
        name: The name of the study or run here; by default that in the file.
        sites: The participating sites; all admitted sites by default.
        inputs: Channels and size of an example, such as 1 32 32, instead of a survey.
        outputs: With inputs: the number of classes, labels or values.
        send_weights: Send the study's start weights, once, to sites without them whose policies allow it
            (limits.weights_megabytes).
        wait: Wait until all of it has ended.
    """
    server = _server(home)
    admitted = [site for site, entry in server_setup.sites(server).items() if not entry["revoked"]]
    if unknown := [site for site in sites if site not in admitted]:
        raise SetupError(f"{unknown[0]} is not admitted; admitted sites: {', '.join(admitted) or 'none yet'}")
    with document(json_) as emit:
        table = table_of(file)
        if "plan" in table:
            queued = [queue_order(server, file, table, name, sites or tuple(admitted), send_weights)]
        else:
            queued = queue_study(server, file, name, sites or tuple(admitted), inputs, outputs, send_weights)
        states = {}
        if not server_setup.is_up(server):
            hint("next     polyclinic server start")
        elif wait:
            states = wait_for(server, queued, "" if "plan" in table else name or table["name"])
            line(f"finished {len(states)} run{'s' if len(states) > 1 else ''}")
        emit({"queued": queued, "states": states})


@app.command
def wait(name: str, *, home: Home = HERE, json_: Json = False) -> None:
    """Wait until NAME, a study or a run, has ended, and print its progress.

    Args:
        name: The name of a study or a run.
    """
    server = _server(home)
    study = study_runs.all_of(server).get(name)
    if study is None and Queue(server).get(name) is None:
        raise SetupError(f"there is no study and no run called {name!r}: `polyclinic server status` lists them")
    with document(json_) as emit:
        states = wait_for(server, [] if study else [name], name if study else "")
        line(f"finished {len(states)} run{'s' if len(states) > 1 else ''}")
        emit({"states": states})


@app.command
def rehearse(
    *,
    name: str = "",
    wait: Annotated[bool, Parameter(negative="--no-wait")] = True,
    home: Home = HERE,
    json_: Json = False,
) -> None:
    """Run a small study on synthetic data at every site, before the first real one. No patient's data are read.

    Args:
        name: The name of the rehearsal; a new one by default.
        wait: Wait until the rehearsal has ended.
    """
    server = _server(home)
    names = tuple(site for site, entry in server_setup.sites(server).items() if not entry["revoked"])
    if not names:
        raise SetupError("no site is admitted yet: polyclinic server admit FILE, with the request of a site")
    an = RunRequest(
        name or time.strftime("rehearsal-%Y%m%d-%H%M%S"),
        {
            "kind": "classification",
            "network": "mlp",
            "inputs": [4],
            "outputs": 2,
            "method": "fedavg",
            "sites": list(names),
            "rounds": 2,
        },
        data={"rehearsal": True},
        score_every=1,
        min_replies=len(names),
    )
    with document(json_) as emit:
        server_setup.order(server, an)
        line(f"queued   {an.run} over {', '.join(names)}{REHEARSED}")
        states = {}
        if wait and server_setup.is_up(server):
            states = wait_for(server, [an.run])
            line(f"finished {an.run}")
        emit({"queued": [an.run], "states": states})


@app.command
def cancel(run: str, *, home: Home = HERE, json_: Json = False) -> None:
    """End a run permanently. Its last checkpoint is kept.

    Args:
        run: The name of the run.
    """
    with document(json_) as emit:
        Queue(ServerFolder(home.resolve())).cancel(run)
        line(f"canceled {run}")
        emit({"run": run, "state": "canceled"})


@app.command
def export(name: str, out: Path, *, home: Home = HERE, json_: Json = False) -> None:
    """Write the run folder of a study into OUT, for `polyclinic report`; or copy the files of a single run.

    Args:
        name: A study, or a run.
        out: A new folder.
    """
    server = ServerFolder(home.resolve())
    study = study_runs.all_of(server).get(name)
    with document(json_) as emit:
        if study is not None:
            emit({"name": name, "folder": out, "missing": export_study(server, name, study, out)})
            return
        folder = server.run(name)
        if not (folder / "model.safetensors").exists():
            raise SetupError(f"{name} has no model yet: `polyclinic server status` shows the progress")
        out.mkdir(parents=True, exist_ok=True)
        for path in ("model.safetensors", "predictions.safetensors", "records.jsonl", "journal.jsonl"):
            if (folder / path).exists():
                shutil.copy(folder / path, out / path)
        entry = Queue(server).get(name)
        if entry:
            atomic.write_json(out / "order.json", json.loads(entry.order))
        line(f"exported {name} to {out}{REHEARSED if entry and entry.what.rehearsal else ''}")
        emit({"name": name, "folder": out, "missing": []})


def _server(home: Path) -> ServerFolder:
    """Return the server's folder.

    Raises:
        SetupError: If the folder has no server.
    """
    server = ServerFolder(home.resolve())
    server_setup.settings(server)
    return server


def _positive(days: float) -> float:
    """Return ``days``.

    Raises:
        SetupError: If it is not positive.
    """
    if not days > 0:
        raise SetupError(f"--days {days:g}: give a positive number of days")
    return days
