"""Operations of a coordinator: create a server, admit and revoke sites, queue runs, start, stop and query the
server.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyclinic import __version__
from polyclinic.core.atomic import write_private
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

if TYPE_CHECKING:
    from polyclinic.engines.plan import Plan

# Number of simultaneous runs; seconds to wait for all sites before a run begins without some; seconds without a sign of
# life after which a site is away; and deadline of an answer in seconds, if the study sets none.
DEFAULTS = {"runs_at_once": 1, "wait_for_all": 60, "dead_after": 30, "answer_within": 86400}
# Limits on what is accepted from sites: see ``message_limits.Limits``. 0 turns a ratio off.
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
    """Create a server's home folder with its certificate authority, and return the authority's fingerprint.

    Raises:
        SetupError: If a name is invalid, or the folder already contains a server.
    """
    require()
    problems = []
    for check, value in ((checked_name, project), (checked_host, host), (authorities.check_organization, organization)):
        try:
            check(value)  # type: ignore[operator]
        except SetupError as error:
            problems.append(str(error))
    if not 0 < port < 65536:
        problems.append(f"a port must be a number from 1 to 65535, not {port}")
    if scheme not in ("grpc", "tcp", "http"):
        problems.append(f"a scheme must be grpc, tcp or http, not {scheme!r}")
    if home.settings.exists():
        problems.append(f"{home.path} already contains a server")
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
    """Issue new certificates for the server and the coordinator. Sites are not affected."""
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
    """Return the settings in server.toml.

    Raises:
        SetupError: If the file does not exist or lacks a setting.
    """
    given = read_toml(home.settings, "polyclinic server init")
    if missing := [key for key in ("project", "host", "port", "organization", "scheme") if key not in given]:
        raise SetupError(f"{home.settings}: {missing[0]} is missing")
    return {**DEFAULTS, **given}


def admit(home: ServerFolder, request: Path, days: float = authorities.DAYS) -> tuple[str, dict[str, Any]]:
    """Admit the site that sent ``request``; return its name and the join file to send back.

    An admitted site of the same name gets a new certificate; this is how certificates and keys are renewed.

    Raises:
        BadFile: If the request is invalid, or the name belongs to another organization.
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


def revoke(home: ServerFolder, site: str) -> None:
    """Revoke a site's right to join. The server rejects its certificate until the site is reinstated.

    Raises:
        SetupError: If no such site was admitted.
    """
    _change(home, site, revoked=True)


def reinstate(home: ServerFolder, site: str) -> None:
    """Restore the right to join of a revoked site.

    Raises:
        SetupError: If no such site was admitted.
    """
    _change(home, site, revoked=False)


def _change(home: ServerFolder, site: str, revoked: bool) -> None:
    from polyclinic.engines.flare.server.admin_api import AdminConnection, NoAnswer

    admitted = sites(home)
    if site not in admitted:
        raise SetupError(f"no site called {site!r} was admitted; there are {', '.join(admitted) or 'none'}")
    admitted[site]["revoked"] = _today() if revoked else ""
    write_private(home.admitted, json.dumps(admitted, indent=1))
    out = [name for name, entry in admitted.items() if entry["revoked"]]
    write_private(home.kit / "disabled_clients.json", json.dumps({"disabled_clients": sorted(out)}))
    SharedJournal(home.path / "journal.jsonl").write("site revoked" if revoked else "site reinstated", {"site": site})
    if is_up(home):
        connection = AdminConnection(home.admin, home.path / "console.log", patience=180.0)
        try:
            for left in reversed(range(4)):  # the server may be starting
                try:
                    (connection.disable if revoked else connection.enable)(site)
                    break
                except NoAnswer:
                    if not left:
                        raise
                    time.sleep(2.0)
        except NoAnswer as error:
            raise SetupError(
                f"the change for {site} is saved and takes effect when FLARE restarts; FLARE now answered: {error}"
            ) from None
        finally:
            connection.close()


def sites(home: ServerFolder) -> dict[str, dict[str, Any]]:
    """Return every admitted site, by name."""
    admitted: dict[str, dict[str, Any]] = read_json(home.admitted, default={})
    return dict(sorted(admitted.items()))


def order(home: ServerFolder, an: RunRequest) -> RunRequest:
    """Queue a run request after checking that it can be built and that its sites may join; return it as queued.

    Raises:
        SetupError: If a site is not admitted, or the run's name was used.
        InvalidRunRequest: If it cannot be built.
    """
    plan = an.build_plan()
    try:
        check_buildable(plan)
    except (TypeError, ValueError) as error:
        raise InvalidRunRequest(f"the plan cannot be built: {error}") from None
    admitted = sites(home)
    wrong = [site for site in an.everyone if site not in admitted or admitted[site]["revoked"]]
    if wrong or not plan.sites:
        may = ", ".join(site for site in admitted if not admitted[site]["revoked"])
        raise SetupError(f"{', '.join(wrong) or 'no sites'}: not admitted. Sites that may join: {may or 'none yet'}")
    # Certified by the authority, and part of what a person approves at every site.
    identities = {site: admitted[site]["secure"] for site in plan.sites}
    deadline = an.deadline or float(settings(home)["answer_within"])  # bounds the wait for a site that never answers
    queued = replace(an, identities=identities, deadline=deadline)
    Queue(home).add(queued)
    return queued


def check_buildable(plan: "Plan") -> None:
    """Build the method of ``plan``, and find its start weights, which the server needs as every site does.

    Raises:
        TypeError, ValueError: If the method cannot be built, or the weights are not in the server's store.
    """
    plan.build_method()
    if wanted := plan.tuning.get("weights", {}).get("sha256"):
        from polyclinic.learning.weights import store

        store.find(wanted)


def check(home: ServerFolder) -> None:
    """Check that the server can be started.

    Raises:
        SetupError: If it is running already, or its settings are invalid.
    """
    require()
    port = settings(home)["port"]
    if is_up(home):
        raise SetupError(f"the server in {home.path} is already running (process {status(home)['pid']})")
    if not flare_processes.working_in(home.kit) and flare_processes.taken(
        port
    ):  # the start ends processes that a crash left
        raise SetupError(
            f"another program on this machine listens on port {port}: end it, or is it another copy of this server?"
        )


def start(home: ServerFolder) -> int:
    """Start the server in the background and return its process number.

    Raises:
        SetupError: If it is running already, or its settings are invalid.
    """
    check(home)
    return flare_processes.keep("server", "polyclinic.engines.flare.server.supervisor", home.path, lambda: is_up(home))


def stop(home: ServerFolder, patience: float = 30.0) -> bool:
    """Stop the server; runs resume from their checkpoints at the next start. Return whether it was running."""
    last = status(home)
    if not is_up(home):
        flare_processes.end(home.kit)
        return False
    flare_processes.terminate(last["pid"], last["birth"], patience)
    flare_processes.end(home.kit)
    return True


def status(home: ServerFolder) -> dict[str, Any]:
    """Return the last status of the supervisor, with the sites connected then."""
    last: dict[str, Any] = read_json(
        home.path / "status.json", default={"state": "never started", "pid": 0, "birth": "", "sites": {}}
    )
    return last


def is_up(home: ServerFolder) -> bool:
    """Return whether a supervisor is alive."""
    last = status(home)
    return bool(last["pid"]) and last["state"] != "stopped" and flare_processes.alive(last["pid"], last["birth"])


def _json_file(path: Path, what: str) -> Any:
    try:
        return json.loads(read_small(path))
    except FileNotFoundError:
        raise BadFile(f"{path} does not exist") from None
    except (ValueError, RecursionError):
        raise BadFile(f"{path} is not {what}") from None


def _today() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
