"""What a coordinator does: make a server, admit sites, order runs, see how they go, take results out."""

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from polyclinic import __version__
from polyclinic.engines.flare import flare_processes, require
from polyclinic.engines.flare.pki import certificate_authority as authorities
from polyclinic.engines.flare.pki import provisioning, site_keys
from polyclinic.engines.flare.pki.certificate_authority import Authority, BadFile
from polyclinic.engines.flare.protocol import expected_signers
from polyclinic.engines.flare.protocol.paths import (
    ServerFolder,
    SetupError,
    private_folder,
    read_json,
    read_small,
    read_toml,
    toml,
    write_private,
)
from polyclinic.engines.flare.protocol.paths import (
    host as checked_host,
)
from polyclinic.engines.flare.protocol.paths import (
    name as checked_name,
)
from polyclinic.engines.flare.protocol.run_request import InvalidRunRequest, RunRequest
from polyclinic.engines.flare.protocol.shared_journals import SharedJournal
from polyclinic.engines.flare.server.job_queue import Queue

# How many runs go on at once; seconds to wait for every site before a run begins without some; seconds of silence after
# which a site is away; and seconds after which an answer is not waited for, where the study sets no deadline.
DEFAULTS = {"runs_at_once": 1, "wait_for_all": 60, "dead_after": 30, "answer_within": 86400}
# What is taken from sites: ``bounds.Limits`` says what each means. 0 turns a ratio off.
DEFAULTS |= {
    "reply_megabytes": 4096,
    "keep_free_megabytes": 500,
    "weight_ratio": 10,
    "norm_ratio": 100,
    "max_examples": 10_000_000,
}


def init(
    home: ServerFolder,
    project: str,
    host: str,
    port: int,
    organization: str,
    scheme: str = "grpc",
    days: float = authorities.DAYS,
) -> str:
    """Makes a server's folder, with an authority of its own, and returns the authority's fingerprint.

    Raises:
        SetupError: Where a name is not one, or the folder holds a server already.
    """
    require()
    problems = []
    for check, value in ((checked_name, project), (checked_host, host), (authorities.check_organization, organization)):
        try:
            check(value)  # type: ignore[operator]
        except SetupError as error:
            problems.append(str(error))
    if not 0 < port < 65536:
        problems.append(f"a port is a number from 1 to 65535, not {port}")
    if scheme not in ("grpc", "tcp", "http"):
        problems.append(f"a scheme is grpc, tcp or http, not {scheme!r}")
    if home.settings.exists():
        problems.append(f"{home.path} holds a server already")
    if problems:
        raise SetupError("\n".join(problems))
    private_folder(home.path)
    authority = Authority.make(home.authority, project)
    settings: dict[str, str | int] = {
        "project": project,
        "host": host,
        "port": port,
        "organization": organization,
        "scheme": scheme,
        **DEFAULTS,
    }
    _make_kit(home, authority, settings, days)
    write_private(home.admitted, "{}")
    write_private(home.settings, "# The server of a federation. See docs/how-to/deployment.md.\n" + toml(settings))
    SharedJournal(home.path / "journal.jsonl").write("server made", {"project": project, "polyclinic": __version__})
    return authorities.fingerprint(authority.certificate)


def renew(home: ServerFolder, days: float = authorities.DAYS) -> None:
    """Makes new certificates for the server and the coordinator; sites notice nothing."""
    require()
    _make_kit(home, Authority.load(home.authority), settings(home), days)
    SharedJournal(home.path / "journal.jsonl").write("server renewed", {})


def _make_kit(home: ServerFolder, authority: Authority, given: Mapping[str, Any], days: float) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    pem = serialization.Encoding.PEM
    made = {"root": authority.certificate.public_bytes(pem)}
    for which, who, role, hosts in (
        ("server", given["host"], "", tuple(dict.fromkeys((given["host"], "localhost")))),
        ("admin", provisioning.COORDINATOR, "lead", ()),
    ):
        key = rsa.generate_private_key(public_exponent=65537, key_size=site_keys.BITS)
        certificate = authority.issue(key.public_key(), who, given["organization"], role=role, hosts=hosts, days=days)
        made |= {f"{which}.crt": certificate.public_bytes(pem), f"{which}.key": site_keys.pem(key)}
    provisioning.make_server(home.kit, home.admin, home.store, {**given, "sites": 1000}, made)


def settings(home: ServerFolder) -> dict[str, Any]:
    """server.toml

    Raises:
        SetupError: Where it is not there or lacks something.
    """
    found = read_toml(home.settings, "polyclinic server init")
    if missing := [key for key in ("project", "host", "port", "organization", "scheme") if key not in found]:
        raise SetupError(f"{home.settings}: {missing[0]} is missing")
    return {**DEFAULTS, **found}


def admit(home: ServerFolder, request: Path, days: float = authorities.DAYS) -> tuple[str, dict[str, Any]]:
    """Admits the site that sent ``request``; its name, and the join file to give back.

    A site that is there already, under the same name, gets a new certificate: so certificates and keys are renewed.

    Raises:
        BadFile: Where the request is not right, or the name belongs to another organization.
    """
    table = _json_file(request, "a site's request")
    try:
        authorities.check_request(table)
    except SetupError as error:
        raise BadFile(f"{request}: {error}") from None
    admitted, site = sites(home), table["site"]
    before = admitted.get(site)
    if before and before["organization"] != table["organization"]:
        raise BadFile(
            f"{request}: {site} is a site of {before['organization']} already: another site needs another name"
        )
    if before and before["revoked"]:
        raise BadFile(
            f"{request}: {site} was revoked on {before['revoked'][:10]}: `polyclinic server reinstate {site}`"
        )
    join = authorities.join_file(Authority.load(home.authority), table, settings(home), days)
    certificate = authorities.load_certificate(join["certificate"])
    signer = expected_signers.signer(certificate.public_key(), certificate.not_valid_after_utc)
    admitted[site] = {
        "organization": table["organization"],
        "polyclinic": table["polyclinic"],
        "secure": table["secure"],
        "expires": join["expires"],
        "admitted": _today(),
        "revoked": "",
        "fingerprint": authorities.fingerprint(certificate),
    }
    SharedJournal(home.path / "journal.jsonl").write("site admitted", {"site": site, **admitted[site]})
    admitted[site]["signers"] = expected_signers.added(before["signers"] if before else [], signer)
    write_private(home.admitted, json.dumps(admitted, indent=1))
    return site, join


def shut_out(home: ServerFolder, site: str, readmit: bool = False) -> None:
    """Takes a site's right to join, or gives it back. Its certificate is worth nothing to this server in between.

    Raises:
        SetupError: Where no such site was admitted.
    """
    from polyclinic.engines.flare.server.admin_api import AdminConnection, NoAnswer

    admitted = sites(home)
    if site not in admitted:
        raise SetupError(f"no site called {site!r} was admitted; there are {', '.join(admitted) or 'none'}")
    admitted[site]["revoked"] = "" if readmit else _today()
    write_private(home.admitted, json.dumps(admitted, indent=1))
    out = [name for name, entry in admitted.items() if entry["revoked"]]
    write_private(home.kit / "disabled_clients.json", json.dumps({"disabled_clients": sorted(out)}))
    SharedJournal(home.path / "journal.jsonl").write("site readmitted" if readmit else "site shut out", {"site": site})
    if is_up(home):
        console = AdminConnection(home.admin, home.path / "console.log", patience=180.0)
        try:
            for left in reversed(range(4)):  # it may be starting
                try:
                    (console.enable if readmit else console.disable)(site)
                    break
                except NoAnswer:
                    if not left:
                        raise
                    time.sleep(2.0)
        except NoAnswer as error:
            raise SetupError(
                f"{site} is on the list, and FLARE learns of it when it starts again; now it said: {error}"
            ) from None
        finally:
            console.close()


def sites(home: ServerFolder) -> dict[str, dict[str, Any]]:
    """Every site that was admitted, by name."""
    found: dict[str, dict[str, Any]] = read_json(home.admitted, default={})
    return dict(sorted(found.items()))


def order(home: ServerFolder, an: RunRequest) -> RunRequest:
    """Puts an order into the queue, after checking that it can be built and that its sites may join; as it was queued.

    Raises:
        SetupError: Where a site is not admitted, or the run's name was used.
        InvalidRunRequest: Where it cannot be built.
    """
    plan = an.build_plan()
    try:
        plan.build_method()
    except (TypeError, ValueError) as error:
        raise InvalidRunRequest(f"the plan cannot be built: {error}") from None
    admitted = sites(home)
    wrong = [site for site in an.everyone if site not in admitted or admitted[site]["revoked"]]
    if wrong or not plan.sites:
        may = ", ".join(site for site in admitted if not admitted[site]["revoked"])
        raise SetupError(f"{', '.join(wrong) or 'nobody'}: not admitted. Sites that may join: {may or 'none yet'}")
    # Vouched for by the authority, and part of what a person approves at every site.
    identities = {site: admitted[site]["secure"] for site in plan.sites}
    deadline = an.deadline or float(
        settings(home)["answer_within"]
    )  # a site that never answers holds nobody up for ever
    made = replace(an, identities=identities, deadline=deadline)
    Queue(home).add(made)
    return made


def check(home: ServerFolder) -> None:
    """Raises unless the server could be started.

    Raises:
        SetupError: Where it runs already, or its settings are not right.
    """
    require()
    port = settings(home)["port"]
    if is_up(home):
        raise SetupError(f"the server in {home.path} runs already (process {status(home)['pid']})")
    if not flare_processes.working_in(home.kit) and flare_processes.taken(
        port
    ):  # what a crash left there is ended by the start
        raise SetupError(
            f"another program on this machine listens on port {port}: end it, or is it another copy of this server?"
        )


def start(home: ServerFolder) -> int:
    """Starts the server in the background, and returns its process number.

    Raises:
        SetupError: Where it runs already, or its settings are not right.
    """
    check(home)
    return flare_processes.keep("server", "polyclinic.engines.flare.server.supervisor", home.path, lambda: is_up(home))


def stop(home: ServerFolder, patience: float = 30.0) -> bool:
    """Stops the server; runs go on from their checkpoints when it starts again. Whether there was one."""
    said = status(home)
    if not is_up(home):
        flare_processes.end(home.kit)
        return False
    os.kill(said["pid"], signal.SIGTERM)
    until = time.monotonic() + patience
    while flare_processes.alive(said["pid"], said["birth"]) and time.monotonic() < until:
        time.sleep(0.1)
    if flare_processes.alive(said["pid"], said["birth"]):
        os.kill(said["pid"], signal.SIGKILL)
    flare_processes.end(home.kit)
    return True


def status(home: ServerFolder) -> dict[str, Any]:
    """What the supervisor last said of itself and of the sites it sees."""
    found: dict[str, Any] = read_json(
        home.path / "status.json", default={"state": "never started", "pid": 0, "birth": "", "sites": {}}
    )
    return found


def is_up(home: ServerFolder) -> bool:
    """Whether a supervisor lives."""
    said = status(home)
    return bool(said["pid"]) and said["state"] != "stopped" and flare_processes.alive(said["pid"], said["birth"])


def _json_file(path: Path, what: str) -> Any:
    try:
        return json.loads(read_small(path))
    except FileNotFoundError:
        raise BadFile(f"{path} does not exist") from None
    except (ValueError, RecursionError):
        raise BadFile(f"{path} is not {what}") from None


def _today() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
