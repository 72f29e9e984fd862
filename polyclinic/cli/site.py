"""``polyclinic site``: what a hospital does."""

import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from polyclinic.cli.review import before, look, methods_of, show
from polyclinic.core import atomic
from polyclinic.engines.flare.client import diagnosis, site_setup
from polyclinic.engines.flare.client.decisions import this_person
from polyclinic.engines.flare.client.reviews import APPROVED, REFUSED, WAITING, Reviews
from polyclinic.engines.flare.client.run_memory import RunMemory
from polyclinic.engines.flare.protocol import data_restrictions
from polyclinic.engines.flare.protocol.paths import SetupError, SiteFolder
from polyclinic.engines.flare.protocol.shared_journals import SharedJournal

app = App(name="site", help="Take part with your own data, which stay: join, see, decide, leave.")
Home = Annotated[Path, Parameter(help="The site's folder. $POLYCLINIC_HOME, or the current folder, by default.")]
HERE = Path(os.environ.get("POLYCLINIC_HOME", "."))


@app.command
def init(*, name: str, organization: str, renew: bool = False, new_keys: bool = False, home: Home = HERE) -> None:
    """Make this site's keys, here, and the request to send to the coordinator.

    Args:
        name: What the site is called in every study: small letters, digits, hyphens.
        organization: Whose site it is: letters, digits, underscores.
        renew: Whether to ask for a new certificate for a site that has joined.
        new_keys: With renew, whether to make new keys too.
    """
    request = site_setup.init(SiteFolder(home.resolve()), name, organization, renew, new_keys)
    print(f"made     keys and policy in {home.resolve()}; the private keys never leave it")
    print(f"send     {request} to the coordinator. It holds no secret.")
    print("next     polyclinic site join FILE --data DIR, with the file that comes back")


@app.command
def join(
    file: Path,
    *,
    data: Path,
    data_name: str = "",
    fingerprint: str = "",
    device: str = "cpu",
    proxy: str = "",
    yes: bool = False,
    home: Home = HERE,
) -> None:
    """Join with the FILE that the coordinator gave back.

    Args:
        file: The join file.
        data: The folder with this site's examples; see docs/how-to/deployment.md for what it holds.
        data_name: What the data set is called, wherever it lies: its privacy budget goes by it. The folder's by
            default.
        fingerprint: The authority's, as the coordinator read it to you; else you are asked.
        device: Where to compute, cpu or cuda.
        proxy: The HTTP proxy by which this machine reaches the outside, as in http://proxy.hospital.org:3128.
        yes: Whether to join without having compared fingerprints.
    """
    site = SiteFolder(home.resolve())
    table, found = site_setup.read_join(site, file)
    print(
        f"project  {table['project']} at {table['host']}:{table['port']}; outbound connections only, no port opens here"
    )
    print(f"ca       {found}")
    said = fingerprint.replace(":", "").strip().lower()
    if said and said != found.replace(":", ""):
        raise SetupError("this is not the fingerprint that you were told: do not join, and ask the coordinator")
    if not said and not yes:
        if not sys.stdin.isatty():
            raise SetupError(
                "compare the fingerprint with the coordinator's on the telephone, and give it: --fingerprint ..."
            )
        if input("         Is this what the coordinator reads to you? [y/N] ").strip().lower() != "y":
            raise SetupError("not joined")
    called = site_setup.join(site, table, data, device, proxy, data_name)
    print(f"joined   as {table['site']}, until {table['expires'][:10]}")
    print(f"data     {called!r}; `data_name` in site.toml keeps the name, and the privacy budget, if the folder moves")
    print("next     polyclinic site policy (read it), polyclinic site diagnose, polyclinic site start")


@app.command
def start(*, background: bool = False, home: Home = HERE) -> None:
    """Take part until stopped.

    Args:
        background: Whether to return at once. A service manager should not: see `polyclinic site unit`.
    """
    site = SiteFolder(home.resolve())
    if background:
        print(f"started  process {site_setup.start(site)}")
        return
    print(f"running  {site_setup.settings(site, joined=True)['site']}; Ctrl-C stops it")
    site_setup.run(site)


@app.command
def stop(*, home: Home = HERE) -> None:
    """Stop taking part, for now."""
    print("stopped" if site_setup.stop(SiteFolder(home.resolve())) else "it was not running")


@app.command(name="diagnose")
def examine(*, home: Home = HERE) -> None:
    """What is wrong, in one line each: clock, certificate, name, port, server, version, data, policy."""
    found = diagnosis.examine(SiteFolder(home.resolve()))
    for what, good, words in found:
        print(f"{'ok ' if good else 'BAD'}  {what:12} {words}")
    if not all(good for _, good, _ in found):
        raise SystemExit(1)


@app.command
def status(*, json_: bool = False, home: Home = HERE) -> None:
    """How this site is: connected or not, what runs, what went wrong, what waits for a person.

    Args:
        json_: Print JSON, for monitoring. The exit code is then 1 unless the site runs, is connected and has no
            problem.
    """
    from polyclinic.cli.site_status import show

    show(SiteFolder(home.resolve()), json_)


@app.command
def policy(*, default: bool = False, reset: bool = False, home: Home = HERE) -> None:
    """Check and show what this hospital allows.

    Args:
        default: Whether to show the policy that a new site begins with.
        reset: Whether to put it in place of the one here, which is kept as policy.toml.before.
    """
    from polyclinic.engines.policy import site_policy as policies

    site = SiteFolder(home.resolve())
    if default:
        print(policies.DEFAULT, end="")
        return
    if reset:
        if site.policy.exists():
            atomic.write_private(site.policy.with_name("policy.toml.before"), site.policy.read_bytes())
        atomic.write_private(site.policy, policies.DEFAULT)
        SharedJournal(site.journal).write("policy reset", {"by": _person()})
    policies.read(site.policy)
    print(site.policy.read_text(encoding="utf-8"), end="")
    print(f"# {site.policy} is in order")


@app.command
def review(run: str = "", *, wait: bool = False, home: Home = HERE) -> None:
    """What waits for a person; of RUN, all that would run here and leave, and the difference to the last approved.

    What is shown is remembered: `approve` allows exactly that.

    Args:
        run: A run, a study, or the first characters of an order's hash.
        wait: Whether to stay until it comes, or until anything waits.
    """
    site = SiteFolder(home.resolve())
    reviews = Reviews(site.reviews)
    if wait:
        from polyclinic.cli.site_status import wait_for

        wait_for(site, run, lambda: reviews.named(run) if run else [r for r in reviews.all() if r.state == WAITING])
    if not run:
        waiting = [r for r in reviews.all() if r.state == WAITING]
        for item in waiting:
            title, what = item.what.study.get("name") or item.what.run, ", ".join(methods_of(item.what))
            print(f"{title:24} {what:16} since {item.seen[:16]}  {'; '.join(item.problems)}".rstrip())
        print(f"{len(waiting)} wait. `polyclinic site review RUN` shows one." if waiting else "Nothing waits.")
        return
    first, *others = reviews.subject(run)
    show(first, before(reviews, first), others, look(site, first.what, Path(site_setup.settings(site)["data"])))
    print(f"\nshown    {reviews.remember([first, *others])[:16]}")


@app.command
def approve(run: str, *, reason: str, by: str = "", hash: str = "", home: Home = HERE) -> None:
    """Allow RUN, exactly as `review` last showed it here.

    Args:
        run: The name of the run, as `polyclinic site pending` shows it.
        reason: Why, as in "IRB 26-114". It goes into the journal.
        by: Your name; that of your account on this machine by default. Both are signed and go into the journal.
        hash: For scripts: what `review` printed behind "shown", or its beginning. Anything else is refused.
    """
    site = SiteFolder(home.resolve())
    _check_tables(site, run)
    _decide(site, run, APPROVED, reason, by, hash)


@app.command
def refuse(run: str, *, reason: str, by: str = "", home: Home = HERE) -> None:
    """Refuse RUN, or take an approval back; it counts from the next message on.

    Args:
        run: The name of the run.
        reason: Why. The server reads it.
        by: Your name; that of your account on this machine by default.
    """
    _decide(SiteFolder(home.resolve()), run, REFUSED, reason, by)


@app.command
def log(*, last: int = 20, home: Home = HERE) -> None:
    """What was asked, done, refused and sent, after checking that nobody changed the journal.

    Args:
        last: How many entries.
    """
    from polyclinic.cli.journal import show

    show(SiteFolder(home.resolve()).journal, last)


@app.command
def forget(run: str, *, yes: bool = False, home: Home = HERE) -> None:
    """Delete what methods keep here for RUN. If it goes on, this site begins anew.

    Args:
        run: The name of the run.
        yes: Do not ask for confirmation.
    """
    site = SiteFolder(home.resolve())
    if not yes and input(f"Delete this site's memory of {run}? [y/N] ").strip().lower() != "y":
        return
    RunMemory(site.memory(run)).forget()
    SharedJournal(site.journal).write("memory deleted", {"run": run, "by": _person()})
    print(f"deleted  the memory of {run}")


@app.command
def unit(*, user: str = "polyclinic", home: Home = HERE) -> None:
    """Print a systemd unit that keeps this site running.

    Args:
        user: The system user that the service runs as.
    """
    print(site_setup.unit("site", home.resolve(), user), end="")


@app.command
def leave(*, yes: bool = False, home: Home = HERE) -> None:
    """End the membership: delete certificate, keys and memories. Journal, policy and data stay.

    Args:
        yes: Do not ask for confirmation.
    """
    if not yes and input("Leave, and delete certificate, keys and memories? [y/N] ").strip().lower() != "y":
        return
    site_setup.leave(SiteFolder(home.resolve()))
    print("left")


def _check_tables(site: SiteFolder, name: str) -> None:
    """Raises if the study and this hospital's data.toml say different things: such a study could not run."""
    order = Reviews(site.reviews).subject(name)[0].what
    own = None if order.rehearsal else data_restrictions.of_hospital(Path(site_setup.settings(site)["data"]))
    if own and (differ := data_restrictions.conflicts(own, order.data)):
        raise SetupError("\n".join(differ.values()))


def _decide(site: SiteFolder, name: str, state: str, reason: str, by: str, shown: str = "") -> None:
    journal = SharedJournal(site.journal)
    for decided in Reviews(site.reviews).decide(name, state, by, reason, shown):
        about = {"run": decided.what.run, "rehearsal": decided.what.rehearsal}
        journal.write(f"{state} by a person", {**about, **decided.statement, "signature": decided.signature})
        print(f"{state:8} {decided.what.run}{'  (imaginary data)' if decided.what.rehearsal else ''}")


def _person() -> str:
    return this_person().account
