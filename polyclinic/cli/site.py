"""``polyclinic site``: the commands of a hospital."""

import os
import sys
import tomllib
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from polyclinic.cli.rendering import Json, confirmed, document, hint, line
from polyclinic.cli.weights import site_app, use_site
from polyclinic.core import atomic
from polyclinic.engines import notifications
from polyclinic.engines.flare import site_keeper
from polyclinic.engines.flare.client import diagnosis, site_setup
from polyclinic.engines.flare.client.decisions import this_person
from polyclinic.engines.flare.client.reviews import APPROVED, REFUSED, WAITING, Reviews, record_decision
from polyclinic.engines.flare.client.run_memory import RunMemory
from polyclinic.engines.flare.client.study_description import before, describe, look, methods_of
from polyclinic.engines.flare.protocol.paths import SetupError, SiteFolder
from polyclinic.engines.flare.protocol.shared_journals import SharedJournal
from polyclinic.errors import ConfigError

app = App(name="site", help="Take part in studies with local data, which never leave.")
app.command(site_app)
Home = Annotated[Path, Parameter(help="The site's folder; $POLYCLINIC_HOME or the current folder by default.")]
HERE = Path(os.environ.get("POLYCLINIC_HOME", "."))


@app.command
def init(
    *,
    name: str,
    organization: str,
    renew: bool = False,
    new_keys: bool = False,
    home: Home = HERE,
    json_: Json = False,
) -> None:
    """Create this site's keys on this machine, and the request to send to the coordinator.

    Args:
        name: The site's name in every study: small letters, digits, hyphens.
        organization: The organization of the site: letters, digits, underscores.
        renew: Request a new certificate for a site that has joined.
        new_keys: With renew: create new keys too.
    """
    with document(json_) as emit:
        request = site_setup.init(SiteFolder(home.resolve()), name, organization, renew, new_keys)
        line(f"created  keys and policy in {home.resolve()}; the private keys never leave it")
        line(f"send     {request} to the coordinator. It contains no secret.")
        emit({"site": name, "folder": home.resolve(), "request": request})
        hint("next     polyclinic site join FILE --data DIR, with the file that the coordinator returns")


@app.command
def join(
    file: Path,
    *,
    data: Path,
    data_name: str = "",
    fingerprint: str = "",
    device: str = "cpu",
    threads: int = 0,
    proxy: str = "",
    yes: bool = False,
    home: Home = HERE,
    json_: Json = False,
) -> None:
    """Join with the FILE that the coordinator returned.

    Args:
        file: The join file.
        data: The folder with this site's examples; docs/how-to/deployment.md describes its contents.
        data_name: The name of the data set, wherever it is stored: its privacy budget is kept under this name. The name
            of the folder by default.
        fingerprint: The authority's fingerprint, as the coordinator read it to you; without it you are asked.
        device: Device for training: cpu, cuda, cuda:1, or auto for a GPU if there is one.
        threads: Threads that draw and augment samples ahead of training; they change no result.
        proxy: The HTTP proxy for outgoing connections, such as http://proxy.hospital.org:3128.
        yes: Join without comparing fingerprints.
    """
    site = SiteFolder(home.resolve())
    with document(json_) as emit:
        table, actual = site_setup.read_join(site, file)
        server = f"{table['project']} at {table['host']}:{table['port']}"
        line(f"project  {server}; outgoing connections only, no port is opened here")
        line(f"ca       {actual}")
        given = fingerprint.replace(":", "").strip().lower()
        if given and given != actual.replace(":", ""):
            raise SetupError(
                "the join file does not have the fingerprint that you gave: do not join, and ask the coordinator"
            )
        if not given and not yes:
            if not sys.stdin.isatty():
                raise SetupError(
                    "compare the fingerprint with the coordinator's on the telephone, and give it: --fingerprint ..."
                )
            if not confirmed(f"         Does the coordinator read the same fingerprint to you, {actual}?"):
                raise SetupError("not joined")
        stored = site_setup.join(site, table, data, device, threads, proxy, data_name)
        line(f"joined   as {table['site']}, until {table['expires'][:10]}")
        line(
            f"data     {stored!r}; `data_name` in site.toml keeps this name and its privacy budget if the folder moves"
        )
        emit({"site": table["site"], "project": table["project"], "expires": table["expires"], "data_name": stored})
        hint("next     polyclinic site policy (read it), polyclinic site diagnose, polyclinic site start")


@app.command
def start(*, background: bool = False, home: Home = HERE) -> None:
    """Take part until stopped.

    Args:
        background: Start in the background and return. A service manager should not do so: see `polyclinic site unit`.
    """
    site = SiteFolder(home.resolve())
    if background:
        line(f"started  process {site_setup.start(site)}")
        return
    line(f"running  {site_setup.settings(site, joined=True)['site']}; Ctrl-C stops it")
    site_keeper.run(site)


@app.command
def stop(*, home: Home = HERE, json_: Json = False) -> None:
    """Stop taking part. `polyclinic site start` continues."""
    with document(json_) as emit:
        site = SiteFolder(home.resolve())
        site_setup.settings(site)
        stopped = site_setup.stop(site)
        line("stopped" if stopped else "the site was not running")
        emit({"stopped": stopped})


@app.command(name="diagnose")
def examine(*, home: Home = HERE, json_: Json = False) -> None:
    """Check clock, certificate, name, port, server, version, data and policy. Exit code 1 if a check fails."""
    with document(json_) as emit:
        checks = diagnosis.examine(SiteFolder(home.resolve()))
        for check, good, result in checks:
            line(f"{'ok ' if good else 'BAD'}  {check:12} {result}")
        emit([{"check": check, "ok": good, "result": result} for check, good, result in checks])
    if not all(good for _, good, _ in checks):
        raise SystemExit(1)


@app.command
def status(*, home: Home = HERE, json_: Json = False) -> None:
    """Show the state of this site: connection, current work, problems, and studies that wait for a decision.

    With --json, for monitoring, the exit code is 1 unless the site runs, is connected and has no problem.
    """
    from polyclinic.cli.site_status import show

    show(SiteFolder(home.resolve()), json_)


@app.command
def policy(*, default: bool = False, reset: bool = False, home: Home = HERE, json_: Json = False) -> None:
    """Check and show what this hospital allows.

    Args:
        default: Show the policy of a new site.
        reset: Replace this site's policy by that of a new site, and keep the old one as policy.toml.before.
    """
    from polyclinic.engines.policy import site_policy as policies

    site = SiteFolder(home.resolve())
    with document(json_) as emit:
        if default:
            print(policies.DEFAULT, end="")
            emit({"file": None, "policy": tomllib.loads(policies.DEFAULT)})
            return
        if reset:
            if site.policy.exists():
                atomic.write_private(site.policy.with_name("policy.toml.before"), site.policy.read_bytes())
            atomic.write_private(site.policy, policies.DEFAULT)
            SharedJournal(site.journal).write("policy reset", {"by": _person()})
        policies.read(site.policy)
        text = site.policy.read_text(encoding="utf-8")
        print(text, end="")
        print(f"# {site.policy} is valid")
        emit({"file": site.policy, "policy": tomllib.loads(text)})


@app.command
def review(run: str = "", *, wait: bool = False, home: Home = HERE, json_: Json = False) -> None:
    """List the studies that wait for a decision; for RUN, show all that would run and leave this site.

    The difference to the last approved study is shown too. `approve` allows exactly what was shown.

    Args:
        run: A run, a study, or the first characters of a request's hash.
        wait: Wait until it arrives; without RUN, until anything waits.
    """
    site = SiteFolder(home.resolve())
    settings = site_setup.settings(site)
    reviews = Reviews(site.reviews)
    use_site(site.path)
    with document(json_) as emit:
        if wait:
            from polyclinic.cli.site_status import wait_for

            wait_for(site, run, lambda: reviews.named(run) if run else [r for r in reviews.all() if r.state == WAITING])
        if not run:
            emit(_list_waiting(reviews))
            return
        first, *others = reviews.subject(run)
        text = describe(first, before(reviews, first), others, look(site, first.what, Path(settings["data"]))).text
        print(text)
        shown = reviews.remember([first, *others])[:16]
        line(f"\nshown    {shown}")
        emit({"run": run, "state": first.state, "shown": shown, "text": f"{text}\n"})


def _list_waiting(reviews: Reviews) -> list[dict[str, object]]:
    """Print and return the studies that wait for a decision."""
    waiting = [r for r in reviews.all() if r.state == WAITING]
    rows: list[dict[str, object]] = []
    for item in waiting:
        title, methods = item.what.study.get("name") or item.what.run, methods_of(item.what)
        line(f"{title:24} {', '.join(methods):16} since {item.seen[:16]}  {'; '.join(item.problems)}".rstrip())
        rows.append({"name": title, "run": item.what.run, "methods": methods})
        rows[-1] |= {"since": item.seen, "problems": item.problems}
    line(f"{len(waiting)} waiting. `polyclinic site review RUN` shows one." if waiting else "Nothing is waiting.")
    return rows


@app.command
def approve(run: str, *, reason: str, by: str = "", hash: str = "", home: Home = HERE, json_: Json = False) -> None:
    """Allow RUN, exactly as `review` last showed it here.

    Args:
        run: The name of the run, as `polyclinic site review` lists it.
        reason: The reason, such as "IRB 26-114". It is recorded in the journal.
        by: Your name; that of your account on this machine by default. Both are signed and recorded in the journal.
        hash: For scripts: the hash that `review` printed after "shown", or its first characters. Any other content is
            refused.
    """
    with document(json_) as emit:
        emit(_decide(SiteFolder(home.resolve()), run, APPROVED, reason, by, hash))


@app.command
def refuse(run: str, *, reason: str, by: str = "", home: Home = HERE, json_: Json = False) -> None:
    """Refuse RUN, or withdraw an approval; this applies from the next message on.

    Args:
        run: The name of the run.
        reason: The reason, which the server receives.
        by: Your name; that of your account on this machine by default.
    """
    with document(json_) as emit:
        emit(_decide(SiteFolder(home.resolve()), run, REFUSED, reason, by))


@app.command
def console(
    *,
    port: int = 8766,
    open_: Annotated[bool, Parameter(name="--open")] = False,
    viewer: bool = False,
    link: bool = False,
    metrics_key: Path | None = None,
    home: Home = HERE,
) -> None:
    """Show this site in the browser of this machine: connection, what left, and what waits for a decision.

    Decisions there are the same signed acts as `approve` and `refuse`. The console is reached by this machine only; see
    docs/how-to/console.md for another machine's browser.

    Args:
        port: The port on the loopback interface; 0 for any free one.
        open_: Open the page in this machine's browser.
        viewer: Print a link that may look and not decide.
        link: Print another link of the console that runs.
        metrics_key: A file with the key for /metrics; it is created if it does not exist.
    """
    from polyclinic.console import serve

    site = SiteFolder(home.resolve())
    if link:
        line(f"open     {serve.new_link('site', site.path, viewer)}")
        return
    serve.require()
    from polyclinic.console.site import SitePage

    page = SitePage(site.path)
    serve.serve(page, site.path, port, line, open_browser=open_, viewer=viewer, metrics_key=metrics_key)


@app.command
def notify(*, home: Home = HERE, json_: Json = False) -> None:
    """Send a test message as notify.toml in this folder says. Exit code 1 if a way fails.

    A running site notifies people of studies that wait for a decision and of problems that last.
    """
    site = SiteFolder(home.resolve())
    name = site_setup.settings(site)["site"]
    with document(json_) as emit:
        failures = send_test(site.path, f"This is a test from the site {name}.")
        emit({"failures": failures})
    if failures:
        raise SystemExit(1)


def send_test(folder: Path, text: str) -> list[str]:
    """Send ``text`` as notify.toml in ``folder`` says, print the result, and return what failed.

    Raises:
        ConfigError: If the file is missing or invalid.
    """
    ways = notifications.read(folder).ways
    if not ways:
        raise ConfigError(
            f"{folder / notifications.FILE}: there is no way of notification; see docs/how-to/operations.md"
        )
    failures = notifications.send_now(folder, text)
    for failure in failures:
        line(f"failed   {failure}")
    line(f"sent     by {len(ways) - len(failures)} of {len(ways)} ways")
    return failures


@app.command
def log(*, last: int = 20, home: Home = HERE, json_: Json = False) -> None:
    """Show what was requested, done, refused and sent, after verifying the journal.

    Args:
        last: The number of entries.
    """
    from polyclinic.cli.journal import show

    show(SiteFolder(home.resolve()).journal, last, json_)


@app.command
def forget(run: str, *, yes: bool = False, home: Home = HERE, json_: Json = False) -> None:
    """Delete what methods store at this site for RUN. If the run continues, this site starts again.

    Args:
        run: The name of the run.
        yes: Do not ask for confirmation.
    """
    site = SiteFolder(home.resolve())
    if not site.memory(run).exists():
        raise SetupError(f"{site.path}: nothing is stored for a run called {run!r}")
    with document(json_) as emit:
        if not yes and not confirmed(f"Delete this site's state of {run}?"):
            line("nothing was deleted; without a terminal give --yes")
            emit({"run": run, "deleted": False})
            return
        RunMemory(site.memory(run)).forget()
        SharedJournal(site.journal).write("memory deleted", {"run": run, "by": _person()})
        line(f"deleted  this site's state of {run}")
        emit({"run": run, "deleted": True})


@app.command
def unit(*, user: str = "polyclinic", home: Home = HERE) -> None:
    """Print a systemd unit that keeps this site running.

    Args:
        user: The system user that the service runs as.
    """
    print(site_setup.unit("site", home.resolve(), user), end="")


@app.command
def leave(*, yes: bool = False, home: Home = HERE, json_: Json = False) -> None:
    """End the membership: delete certificate, keys and stored states. Journal, policy and data stay.

    Args:
        yes: Do not ask for confirmation.
    """
    with document(json_) as emit:
        if not yes and not confirmed("Leave, and delete certificate, keys and stored states?"):
            line("nothing was deleted; without a terminal give --yes")
            emit({"left": False})
            return
        site_setup.leave(SiteFolder(home.resolve()))
        line("left     certificate, keys and stored states are deleted")
        emit({"left": True})


def _decide(site: SiteFolder, name: str, state: str, reason: str, by: str, shown: str = "") -> list[dict[str, str]]:
    """Record a decision, and print and return the runs that it covers."""
    rows = []
    for decided in record_decision(site, name, state, reason, by, shown):
        line(f"{state:8} {decided.what.run}{'  (synthetic data)' if decided.what.rehearsal else ''}")
        rows.append({"run": decided.what.run, "state": state})
    return rows


def _person() -> str:
    return this_person().account
