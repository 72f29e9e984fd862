"""``polyclinic server``: what a coordinator does."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from polyclinic.engines.flare import coordinator
from polyclinic.engines.flare.homes import BadHome, ServerHome, read_json, read_small
from polyclinic.engines.flare.order import BadOrder, Order
from polyclinic.engines.flare.runs import OVER, Queue

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
    background: Whether to return at once. A service manager should not: see deploy/polyclinic-server.service.
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
def status(*, home: Home = HERE) -> None:
    """How the server, its sites and its runs are."""
    server = ServerHome(home.resolve())
    given, up = coordinator.settings(server), coordinator.is_up(server)
    said, queue = coordinator.status(server), Queue(server)
    print(f"server   {given['project']} at {given['host']}:{given['port']} is {said['state'] if up else 'not running'}")
    seen = ", ".join(said["sites"]) if up and said["sites"] else "none"
    print(f"sites    {seen} connected, of {len(coordinator.sites(server))} admitted")
    for run, entry in queue.all().items():
        print(_line(queue, run, entry))


@app.command
def run(order: Path, *, name: str = "", inputs: tuple[int, ...] = (), outputs: int = 0, method: str = "",
        wait: bool = False, home: Home = HERE) -> None:  # fmt: skip
    """Put a study into the queue.

    ORDER is an order (a plan with how to run it, see docs/deployment.md), or a study file, whose task then needs
    ``--inputs`` and ``--outputs``, because the data are elsewhere.

    Parameters
    ----------
    order: The file.
    name: What to call the run; the file's own name for it by default.
    inputs: Of a study file: channels and size of an example, as in 1 32 32.
    outputs: Of a study file: how many classes, labels or values.
    method: Of a study file with several methods: which.
    wait: Whether to stay until the run is over.
    """
    server = ServerHome(home.resolve())
    an = _order(order, name, inputs, outputs, method, tuple(coordinator.sites(server)))
    coordinator.order(server, an)
    print(f"queued   {an.run}: {an.plan['method']} over {', '.join(an.plan['sites'])}, {an.plan['rounds']} rounds")
    if not coordinator.is_up(server):
        print("next     polyclinic server start")
    elif wait:
        _wait(server, an.run)


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
        _wait(server, an.run)


@app.command
def cancel(run: str, *, home: Home = HERE) -> None:
    """End a run for good; its last checkpoint stays."""
    Queue(ServerHome(home.resolve())).cancel(run)
    print(f"cancelled {run}")


@app.command
def export(run: str, out: Path, *, home: Home = HERE) -> None:
    """Copy what RUN left to the folder OUT: model, scores, order and journal; nothing of messages under way."""
    folder = ServerHome(home.resolve()).run(run)
    if not (folder / "model.safetensors").exists():
        raise BadHome(f"{run} has no model yet: `polyclinic server status` says how far it is")
    out.mkdir(parents=True, exist_ok=True)
    for path in ("model.safetensors", "predictions.safetensors", "records.jsonl", "journal.jsonl"):
        if (folder / path).exists():
            shutil.copy(folder / path, out / path)
    entry = Queue(ServerHome(home.resolve())).get(run)
    if entry:
        (out / "order.json").write_text(json.dumps(json.loads(entry.order), indent=1), encoding="utf-8")
    print(f"exported {run} to {out}")


def _order(
    path: Path, name: str, inputs: tuple[int, ...], outputs: int, method: str, admitted: tuple[str, ...]
) -> Order:
    import tomllib

    if path.suffix == ".json":
        table: dict[str, Any] = read_json(path)
    else:
        try:
            table = tomllib.loads(read_small(path))
        except FileNotFoundError:
            raise BadOrder(f"{path} does not exist") from None
        except tomllib.TOMLDecodeError as error:
            raise BadOrder(f"{path}: {error}") from None
    if not isinstance(table, dict):
        raise BadOrder(f"{path} is not an order")
    if "plan" not in table:
        table = _of_study(path, inputs, outputs, method)
    table["plan"] = {"sites": list(admitted), **table["plan"]}
    table["run"] = name or table.get("run") or path.stem
    try:
        return Order.from_json(json.dumps(table))
    except BadOrder as error:
        raise BadOrder(f"{path}: {error}") from None


def _of_study(path: Path, inputs: tuple[int, ...], outputs: int, label: str) -> dict[str, Any]:
    """The fields of an order, from a study file."""
    from polyclinic.studies import spec

    study = spec.read(path)
    methods = [m for m in study.methods if not label or m.called == label]
    if len(methods) != 1:
        raise BadOrder(f"{path} has the methods {', '.join(m.called for m in study.methods)}: choose one with --method")
    if not inputs or outputs < 1:
        raise BadOrder(
            f"{path} is a study, and its data are elsewhere: say what an example is, as in --inputs 1 32 32 --outputs 2"
        )
    plan = {
        "kind": study.task.kind, "network": study.task.network, "inputs": list(inputs), "outputs": outputs,
        "method": methods[0].name, "rounds": study.rounds, "seed": study.seeds[0], "task": study.task.settings,
        "network_options": study.task.options, "training": study.training_of(methods[0]), "options": methods[0].options,
        "send": [dict(item) for item in methods[0].send],
    }  # fmt: skip
    return {
        "run": study.name, "plan": json.loads(json.dumps(plan)), "cohort": study.cohort, "deadline": study.deadline,
        "min_replies": study.min_replies, "score_every": study.evaluation.every,
    }  # fmt: skip


def _line(queue: Queue, run: str, entry: Any) -> str:
    said = queue.progress(run)
    how = f"round {said['round']} of {said['rounds']}" if said else "not begun"
    why = entry.why or "; ".join(f"{site}: {reason}" for site, reason in said.get("waiting", {}).items())
    return f"run      {run:24} {entry.state:10} {how:18} {why}".rstrip()


def _wait(server: ServerHome, run: str) -> None:
    queue, before = Queue(server), ""
    while (entry := queue.get(run)) is not None:
        line = _line(queue, run, entry)
        if line != before:
            print(line, flush=True)
            before = line
        if entry.state in OVER:
            if entry.state != "finished":
                raise BadHome(f"{run} {entry.state}: {entry.why}")
            return
        time.sleep(0.5)
