"""``polyclinic server``: what a coordinator does."""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from polyclinic.engines.flare import coordinator, study_runs
from polyclinic.engines.flare.homes import BadHome, ServerHome, read_json, read_small
from polyclinic.engines.flare.order import BadOrder, Order
from polyclinic.engines.flare.runs import FINISHED, OVER, Queue

app = App(name="server", help="Coordinate studies between hospitals, over NVIDIA FLARE.")
Home = Annotated[Path, Parameter(help="The server's folder. $POLYCLINIC_HOME, or the current folder, by default.")]
HERE = Path(os.environ.get("POLYCLINIC_HOME", "."))


@app.command
def init(
    *, project: str, host: str, organisation: str, port: int = 8002, scheme: str = "grpc", home: Home = HERE
) -> None:
    """Make a server's folder, with a certificate authority of its own.

    Parameters
    ----------
    project: Names the federation, as in nodules-2026.
    host: Under which name sites reach this machine.
    organisation: Who coordinates: letters, digits, underscores.
    port: The one port that sites connect to.
    scheme: grpc passes HTTP proxies; tcp is fastest; http uses web sockets.
    """
    fingerprint = coordinator.init(ServerHome(home.resolve()), project, host, port, organisation, scheme)
    print(f"made     the server of {project} in {home.resolve()}")
    print(f"ca       {fingerprint}")
    print("         Read this to every site on the telephone: it is how they know that a join file is yours.")
    print("next     polyclinic server start; then, for each site's request: polyclinic server admit FILE")


@app.command
def admit(request: Path, *, out: Path | None = None, days: float = 730, home: Home = HERE) -> None:
    """Admit the site that sent REQUEST, and write the join file to give back to it.

    Parameters
    ----------
    out: Where to write it; beside the request by default.
    days: How long the site's certificate is good for.
    """
    site, join = coordinator.admit(ServerHome(home.resolve()), request, days)
    path = out or request.with_suffix(".join")
    path.write_text(json.dumps(join, indent=1), encoding="utf-8")
    print(f"admitted {site} of {join['organisation']}, until {join['expires'][:10]}")
    print(
        f"give     {path} to the site. It holds no secret; the site checks it against the fingerprint of the authority."
    )


@app.command
def sites(*, home: Home = HERE) -> None:
    """The sites that were admitted, and which are connected."""
    server = ServerHome(home.resolve())
    seen = coordinator.status(server)["sites"] if coordinator.is_up(server) else {}
    for site, entry in coordinator.sites(server).items():
        state = (
            f"shut out since {entry['revoked'][:10]}" if entry["revoked"] else "connected" if site in seen else "away"
        )
        print(f"{site:24} {state:24} {entry['organisation']:20} certificate until {entry['expires'][:10]}")


@app.command(name="shut-out")
def shut_out(site: str, *, home: Home = HERE) -> None:
    """Take SITE's right to join: its certificate is worth nothing to this server any more."""
    coordinator.shut_out(ServerHome(home.resolve()), site)
    print(f"shut out {site}")


@app.command
def readmit(site: str, *, home: Home = HERE) -> None:
    """Give SITE its right to join back."""
    coordinator.shut_out(ServerHome(home.resolve()), site, readmit=True)
    print(f"readmitted {site}")


@app.command
def renew(*, days: float = 730, home: Home = HERE) -> None:
    """Make new certificates for the server and the coordinator. The authority stays, so sites notice nothing."""
    server = ServerHome(home.resolve())
    if coordinator.is_up(server):
        raise BadHome("stop the server first: polyclinic server stop")
    coordinator.renew(server, days)
    print("renewed  the certificates of the server and the coordinator")


@app.command
def start(*, background: bool = False, home: Home = HERE) -> None:
    """Run the server until it is stopped; runs go on from their checkpoints.

    Parameters
    ----------
    background: Whether to return at once. A service manager should not: see `polyclinic server unit`.
    """
    server = ServerHome(home.resolve())
    if background:
        print(f"started  process {coordinator.start(server)}")
        return
    from polyclinic.engines.flare import supervisor

    coordinator.check(server)
    print(f"running  the server in {server.path}; Ctrl-C stops it")
    supervisor.main(str(server.path))


@app.command
def stop(*, home: Home = HERE) -> None:
    """Stop the server. Runs go on when it starts again."""
    print("stopped" if coordinator.stop(ServerHome(home.resolve())) else "it was not running")


@app.command
def unit(*, user: str = "polyclinic", home: Home = HERE) -> None:
    """Print a systemd unit that keeps this server running."""
    from polyclinic.engines.flare import member

    print(member.unit("server", home.resolve(), user), end="")


@app.command
def status(*, home: Home = HERE) -> None:
    """How the server, its sites and its runs are."""
    server = ServerHome(home.resolve())
    given, up = coordinator.settings(server), coordinator.is_up(server)
    said, queue = coordinator.status(server), Queue(server)
    print(f"server   {given['project']} at {given['host']}:{given['port']} is {said['state'] if up else 'not running'}")
    seen = ", ".join(said["sites"]) if up and said["sites"] else "none"
    print(f"sites    {seen} connected, of {len(coordinator.sites(server))} admitted")
    for title, study in study_runs.all_of(server).items():
        why = f" because {study['why']}" if study["why"] else ""
        told = {study_runs.SURVEY: "asks the sites what their data are", study_runs.QUEUED: "runs"}
        print(f"study    {title:24} {told.get(study['state'], 'stopped')}{why}, {len(study['runs'])} runs")
    for run, entry in queue.all().items():
        print(_line(queue, run, entry))


@app.command
def run(file: Path, *, name: str = "", sites: tuple[str, ...] = (), inputs: tuple[int, ...] = (), outputs: int = 0,
        wait: bool = False, home: Home = HERE) -> None:  # fmt: skip
    """Put a study into the queue: the file that `polyclinic run` takes, unchanged.

    The sites first say what an example looks like and how many there are; then every method runs with every seed. The
    people at the sites approve the study once. `polyclinic server export` makes a run folder of it.

    Parameters
    ----------
    file: A study file; or an order for a single run, as JSON.
    name: What to call it here; the file's own name for it by default.
    sites: Who takes part; everybody who is admitted by default.
    inputs: Channels and size of an example, as in 1 32 32, where the sites should not be asked.
    outputs: With inputs: how many classes, labels or values.
    wait: Whether to stay until all of it is over.
    """
    server = ServerHome(home.resolve())
    admitted = [site for site, entry in coordinator.sites(server).items() if not entry["revoked"]]
    if strange := [site for site in sites if site not in admitted]:
        raise BadHome(f"{strange[0]} is not admitted; there are {', '.join(admitted) or 'none yet'}")
    table = _table(file)
    if "plan" in table:
        queued = [_queue_order(server, file, table, name, sites or tuple(admitted))]
    else:
        queued = _queue_study(server, file, name, sites or tuple(admitted), inputs, outputs)
    if not coordinator.is_up(server):
        print("next     polyclinic server start")
    elif wait:
        _wait(server, queued, "" if "plan" in table else name or table["name"])


@app.command
def rehearse(*, name: str = "", wait: bool = True, home: Home = HERE) -> None:
    """Run a tiny study with every site's imaginary data: no example of a patient is read. Before the first real one."""
    server = ServerHome(home.resolve())
    who = tuple(site for site, entry in coordinator.sites(server).items() if not entry["revoked"])
    an = Order(name or time.strftime("rehearsal-%Y%m%d-%H%M%S"), {
        "kind": "classification", "network": "mlp", "inputs": [4], "outputs": 2, "method": "fedavg",
        "sites": list(who), "rounds": 2,
    }, data={"rehearsal": True}, score_every=1, min_replies=max(len(who), 1))  # fmt: skip
    coordinator.order(server, an)
    print(f"queued   {an.run} over {', '.join(who)}")
    if wait and coordinator.is_up(server):
        _wait(server, [an.run])


@app.command
def cancel(run: str, *, home: Home = HERE) -> None:
    """End a run for good; its last checkpoint stays."""
    Queue(ServerHome(home.resolve())).cancel(run)
    print(f"cancelled {run}")


@app.command
def export(name: str, out: Path, *, home: Home = HERE) -> None:
    """Make the folder OUT of a study, for `polyclinic report`; or copy what a single run left.

    Parameters
    ----------
    name: A study, or a run.
    out: A new folder.
    """
    server = ServerHome(home.resolve())
    study = study_runs.all_of(server).get(name)
    if study is not None:
        _export_study(server, name, study, out)
        return
    folder = server.run(name)
    if not (folder / "model.safetensors").exists():
        raise BadHome(f"{name} has no model yet: `polyclinic server status` says how far it is")
    out.mkdir(parents=True, exist_ok=True)
    for path in ("model.safetensors", "predictions.safetensors", "records.jsonl", "journal.jsonl"):
        if (folder / path).exists():
            shutil.copy(folder / path, out / path)
    entry = Queue(server).get(name)
    if entry:
        (out / "order.json").write_text(json.dumps(json.loads(entry.order), indent=1), encoding="utf-8")
    print(f"exported {name} to {out}")


def _table(path: Path) -> dict[str, Any]:
    """What stands in the file that is to be run."""
    import tomllib

    try:
        table: Any = read_json(path) if path.suffix == ".json" else tomllib.loads(read_small(path))
    except FileNotFoundError:
        raise BadOrder(f"{path} does not exist") from None
    except tomllib.TOMLDecodeError as error:
        raise BadOrder(f"{path}: {error}") from None
    if not isinstance(table, dict):
        raise BadOrder(f"{path} is neither a study nor an order")
    return table


def _queue_order(server: ServerHome, path: Path, table: dict[str, Any], name: str, sites: tuple[str, ...]) -> str:
    table["plan"] = {"sites": list(sites), **table["plan"]}
    table["run"] = name or table.get("run") or path.stem
    try:
        an = Order.from_json(json.dumps(table))
    except BadOrder as error:
        raise BadOrder(f"{path}: {error}") from None
    coordinator.order(server, an)
    print(f"queued   {an.run}: {an.plan['method']} over {', '.join(an.plan['sites'])}, {an.plan['rounds']} rounds")
    return an.run


def _queue_study(
    server: ServerHome, path: Path, name: str, sites: tuple[str, ...], inputs: tuple[int, ...], outputs: int
) -> list[str]:
    from polyclinic.studies import elsewhere, spec

    if bool(inputs) != (outputs > 0):
        raise BadOrder("give --inputs and --outputs together, or neither: then the sites are asked")
    study = spec.read(path)
    shape = {"inputs": list(inputs), "outputs": outputs} if inputs else None
    arms, notes = elsewhere.arms(study, sites, shape)
    title, text = name or study.name, path.read_text(encoding="utf-8")
    queued = study_runs.put(server, text, title, study.hash, arms, elsewhere.how(study), arms[0]["plan"]["sites"])
    for note in notes:
        print(f"note     {note}")
    labels = ", ".join(dict.fromkeys(arm["label"] for arm in arms))
    print(f"queued   {title}: {labels}; {len(arms)} runs of {study.rounds} rounds over {', '.join(sites)}")
    if not shape:
        print("first    the sites are asked what an example looks like; a person at each approves the study, once")
    return queued


def _export_study(server: ServerHome, title: str, study: Mapping[str, Any], out: Path) -> None:
    from polyclinic.studies import elsewhere, spec

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadHome(f"{out} is there already, and not empty: choose a new folder")
    path, queue = server.path / "studies" / title / "study.toml", Queue(server)
    entries = {run: queue.get(run) for run in study["runs"]}
    arms = {
        run: {**arm, "plan": e.what.plan if (e := entries[run]) else arm["plan"]} for run, arm in study["runs"].items()
    }
    done = {run: server.run(run) for run, e in entries.items() if e and e.state == FINISHED}
    if not done:
        raise BadHome(f"no run of {title} has finished yet: `polyclinic server status` says how far they are")
    said = study_runs.survey_of(server, title)
    missing = elsewhere.collect(spec.read(path), path.read_text(encoding="utf-8"), title, arms, said, done, out)
    if missing:
        print(f"missing  {', '.join(missing)}: not finished; export again into another folder when they are")
    print(f"exported {title} to {out}")
    print(f"next     polyclinic report {out}")


def _line(queue: Queue, run: str, entry: Any) -> str:
    said = queue.progress(run)
    how = f"round {said['round']} of {said['rounds']}" if said else "not begun"
    why = entry.why or "; ".join(f"{site}: {reason}" for site, reason in said.get("waiting", {}).items())
    return f"run      {run:24} {entry.state:10} {how:18} {why}".rstrip()


def _wait(server: ServerHome, queued: Sequence[str], title: str = "") -> None:
    """Tells how runs go until they are over; those of a study, until all of it is."""
    queue, before, runs = Queue(server), dict[str, str](), list(queued)
    while True:
        study = study_runs.all_of(server).get(title) if title else None
        if study:
            runs = [*([study["survey"]] if study["survey"] else []), *study["runs"]]
            if study["state"] == study_runs.STOPPED:
                raise BadHome(f"{title} stopped: {study['why']}")
        entries = {run: entry for run in runs if (entry := queue.get(run))}
        for run, entry in entries.items():
            if (line := _line(queue, run, entry)) != before.get(run):
                print(line, flush=True)
                before[run] = line
        if len(entries) == len(runs) and all(entry.state in OVER for entry in entries.values()):
            if bad := [f"{run} {e.state}: {e.why}" for run, e in entries.items() if e.state != FINISHED]:
                raise BadHome("\n".join(bad))
            return
        time.sleep(0.5)
