"""Operations of a hospital: create keys, join a project, run, stop and query the site, leave."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polyclinic import __version__
from polyclinic.core.atomic import write_private
from polyclinic.engines.flare import flare_processes, require, service_manager
from polyclinic.engines.flare.client import proxies, run_archive
from polyclinic.engines.flare.pki import certificate_authority as authorities
from polyclinic.engines.flare.pki import provisioning, site_keys
from polyclinic.engines.flare.pki.certificate_authority import BadFile
from polyclinic.engines.flare.protocol.paths import (
    SetupError,
    SiteFolder,
    private_folder,
    read_json,
    read_small,
    read_toml,
    toml,
)
from polyclinic.engines.flare.protocol.paths import (
    name as checked_name,
)
from polyclinic.engines.flare.protocol.shared_journals import SharedJournal

TIDY_EVERY, NOTIFY_EVERY = 60.0, 10.0


def init(home: SiteFolder, site: str, organization: str, renew: bool = False, new_keys: bool = False) -> Path:
    """Create a site's home folder and keys, and the request to send to the coordinator; return the path of the request.

    Args:
        renew: Whether the folder is already a site, and the request is for a new certificate.
        new_keys: Whether to create new keys when renewing.

    Raises:
        SetupError: If a name is invalid, or the folder is already a site.
    """
    require()
    checked_name(site)
    authorities.check_organization(organization)
    if home.settings.exists() and not renew:
        raise SetupError(f"{home.path} is already a site: `--renew` requests a new certificate")
    private_folder(home.path)
    own = home.keys
    if renew and new_keys:  # the old ones stay in use until the new certificate arrives
        own = site_keys.upcoming(home.keys)
        shutil.rmtree(own, ignore_errors=True)
    request = home.path / f"{site}.request"
    write_private(request, json.dumps(authorities.request(own, site, organization, __version__), indent=1))
    if not home.settings.exists():
        write_private(home.settings, toml({"site": site, "organization": organization}))
    if not home.policy.exists():
        write_private(home.policy, default_policy())
    SharedJournal(home.journal).write("request made", {"site": site, "polyclinic": __version__})
    return request


def read_join(home: SiteFolder, path: Path) -> tuple[dict[str, Any], str]:
    """Return the checked join file at ``path`` and the fingerprint of its authority.

    Raises:
        BadFile: If it is invalid.
    """
    site = settings(home)["site"]
    try:
        table = json.loads(read_small(path))
        _, root = authorities.check_join(table, site_keys.of_site(home.keys), site)
    except FileNotFoundError:
        raise BadFile(f"{path} does not exist") from None
    except SetupError as error:
        raise BadFile(f"{path}: {error}") from None
    except (ValueError, RecursionError):
        raise BadFile(f"{path} is not a join file") from None
    before = home.kit / "startup" / "rootCA.pem"
    if before.exists() and authorities.load_certificate(read_small(before)) != root:
        raise BadFile(
            f"{path}: it is signed by another authority than the one this site joined. If this is intended: "
            "`polyclinic site leave` first"
        )
    return table, authorities.fingerprint(root)


def join(
    home: SiteFolder,
    table: Mapping[str, Any],
    data: Path,
    device: str = "cpu",
    threads: int = 0,
    proxy: str = "",
    data_name: str = "",
) -> str:
    """Install a checked join file for the data in the folder ``data``; return the data set's name.

    Args:
        device: Device for training.
        threads: Number of threads that prepare training samples.
        data_name: Name of the data set in the site's privacy ledgers, independent of its location. By default as
            before, or that of the folder.

    Raises:
        ConfigError: If the device does not exist here.
        SetupError: If the folder does not exist, the proxy or a name is invalid, or the site is running.
    """
    require()
    data_name = data_name or str(settings(home).get("data_name") or data.resolve().name)
    if not (0 < len(data_name) <= 100 and data_name.isprintable()):
        raise SetupError(
            f"the data set's name has 1 to 100 printable characters, not {data_name[:120]!r}: give --data-name"
        )
    if is_up(home):
        raise SetupError(
            f"the site in {home.path} is running: `polyclinic site stop` first; runs wait for it or continue without it"
        )
    if device != "cpu":
        from polyclinic.engines.devices import chosen_device  # imports PyTorch, which joining does not need otherwise

        chosen_device(device)
    if not 0 <= threads <= 64:
        raise SetupError(f"--threads {threads}: give a number from 0 to 64")
    if proxy:
        proxies.check(proxy, table["scheme"])
    if not data.is_dir():
        raise SetupError(f"{data} is not a folder: `--data` names the folder with this site's examples")
    certificate = authorities.load_certificate(table["certificate"])
    key = next(key for key in site_keys.of_site(home.keys) if key.public_key() == certificate.public_key())
    provisioning.make_site(
        home.kit, table, table["certificate"].encode(), site_keys.pem(key), table["authority"].encode()
    )
    if key.public_key() != site_keys.load(home.keys / "site.key").public_key():
        site_keys.take_up(home.keys)
    # Earlier certificates are kept so that journal signatures can still be verified.
    private_folder(home.certificates)
    write_private(home.certificates / f"{certificate.serial_number:x}.crt", table["certificate"])
    given = {key: table[key] for key in ("site", "organization", "project", "host", "port", "scheme", "expires")}
    own = {
        "data": str(data.resolve()),
        "data_name": data_name,
        "device": device,
        "threads": str(threads),
        "proxy": proxy,
    }
    write_private(home.settings, toml({**given, **own}))
    SharedJournal(home.journal).write(
        "joined",
        {
            "project": table["project"],
            "host": table["host"],
            "expires": table["expires"],
            "certificate": authorities.fingerprint(certificate),
        },
    )
    return data_name


def settings(home: SiteFolder, joined: bool = False) -> dict[str, Any]:
    """Return the settings in site.toml.

    Raises:
        SetupError: If the file does not exist or, with ``joined``, if the site has not joined yet.
    """
    given = read_toml(home.settings, "polyclinic site init")
    if "site" not in given:
        raise SetupError(f"{home.settings}: `site` is missing")
    if joined and not (home.kit.exists() and "project" in given):
        raise SetupError(
            f"{home.path} has not joined yet: send {given['site']}.request to the coordinator, then "
            "`polyclinic site join FILE --data DIR`"
        )
    return given


def run(home: SiteFolder, stopped: Any = None, pause: float = 1.0, notify: Callable[[], None] = lambda: None) -> None:
    """Keep FLARE's client running until SIGTERM or Ctrl-C, and then end everything that was started.

    Args:
        home: The site.
        stopped: Returns whether to end; by default a signal ends it.
        pause: Seconds between two checks.
        notify: Called every ``NOTIFY_EVERY`` seconds to send the notifications that are due.

    Raises:
        SetupError: If the site has not joined, or is running already.
    """
    require()
    given = settings(home, joined=True)
    days = memory_days(given)
    if is_up(home):
        raise SetupError(f"the site in {home.path} is already running (process {status(home)['pid']})")
    proxies.use(given.get("proxy", ""))
    ending = {"now": False}
    if stopped is None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ending.update(now=True))
    started, tidied, notified = time.time(), 0.0, 0.0
    journal = SharedJournal(home.journal)

    def begin() -> subprocess.Popen[bytes]:
        flare_processes.end(home.kit)
        who = {"uid": given["site"], "org": given["organization"]}
        return flare_processes.start("site", home.kit, home.path / "site.log", **who)

    def ended(code: int, crashes: int) -> None:
        journal.write("FLARE's process ended", {"code": code, "crashes": crashes})

    client = flare_processes.KeptProcess(begin, ended)
    journal.write("site started", {"pid": os.getpid(), "polyclinic": __version__})
    try:
        while not (stopped() if stopped else ending["now"]):
            client.look()
            _write_status(home, "up", started=started, crashes=client.crashes)
            service_manager.tell(service_manager.READY, service_manager.ALIVE)
            if time.time() - tidied > TIDY_EVERY:
                tidied = time.time()
                for run_ in run_archive.retire(home):
                    journal.write("memory of an ended run removed", {"run": run_})
                for run_ in run_archive.retire_silent(home, days):
                    journal.write("memory of a silent run removed", {"run": run_})
            if time.time() - notified > NOTIFY_EVERY:
                notified = time.time()
                notify()
            time.sleep(pause)
    finally:
        service_manager.tell(service_manager.STOPPING)
        flare_processes.end(home.kit)
        flare_processes.end(home.path)
        _write_status(home, "stopped")
        journal.write("site stopped", {})
        journal.close()


def memory_days(given: Mapping[str, Any]) -> float:
    """Return ``memory_days`` of site.toml: the days for which the state of a run without any message is kept.

    Raises:
        SetupError: If it is not a number of days.
    """
    days = given.get("memory_days", run_archive.SILENT_DAYS)
    if isinstance(days, bool) or not isinstance(days, int | float) or not 1 <= days <= 36500:
        raise SetupError(f"site.toml: memory_days is a number of days from 1 to 36500, not {days!r}")
    return float(days)


def stop(home: SiteFolder, patience: float = 30.0) -> bool:
    """Stop the site's processes, and return whether there were any."""
    last, was = status(home), is_up(home)
    if was:
        flare_processes.terminate(last["pid"], last["birth"], patience)
    return flare_processes.end(home.kit) > 0 or was


def leave(home: SiteFolder) -> None:
    """End the membership: delete certificate, keys and site state. Journal and policy are kept."""
    stop(home)
    given = settings(home)
    for folder in (home.kit, home.path / "memory", home.keys):
        shutil.rmtree(folder, ignore_errors=True)
    write_private(
        home.settings, toml({key: given[key] for key in ("site", "organization", "data_name") if key in given})
    )
    SharedJournal(home.journal).write("left", {"project": given.get("project", "")})


def unit(role: str, home: Path, user: str, program: str = "") -> str:
    """Return a systemd unit that keeps the ``role``, site or server, in the folder ``home`` running."""
    text = (Path(__file__).parents[1] / "unit.service").read_text(encoding="utf-8")
    program = program or str(Path(sys.argv[0]).resolve())
    for key, value in {"HOME": str(home), "USER": user, "POLYCLINIC": program, "ROLE": role}.items():
        text = text.replace(f"@{key}@", value)
    return text


def default_policy() -> str:
    """Return the initial policy of a site."""
    return (Path(__file__).parents[2] / "policy" / "policy.toml").read_text(encoding="utf-8")


def status(home: SiteFolder) -> dict[str, Any]:
    """Return the last status of the site's supervisor."""
    last: dict[str, Any] = read_json(
        home.path / "status.json", default={"state": "never started", "pid": 0, "birth": ""}
    )
    return last


def is_up(home: SiteFolder) -> bool:
    """Return whether the site's supervisor is alive."""
    last = status(home)
    return bool(last["pid"]) and last["state"] != "stopped" and flare_processes.alive(last["pid"], last["birth"])


def start(home: SiteFolder) -> int:
    """Start the site in the background and return its process number.

    Raises:
        SetupError: If it has not joined, is running already, or does not start.
    """
    require()
    settings(home, joined=True)
    if is_up(home):
        raise SetupError(f"the site in {home.path} is already running (process {status(home)['pid']})")
    return flare_processes.keep("site", "polyclinic.engines.flare.site_keeper", home.path, lambda: is_up(home))


def _write_status(home: SiteFolder, state: str, **more: float) -> None:
    me = os.getpid()
    content = {"state": state, "pid": me, "birth": flare_processes.birth(me), "beat": time.time(), **more}
    write_private(home.path / "status.json", json.dumps(content), durable=False)
