"""``polyclinic journal``: whether a journal is whole, and whether two of them agree."""

import json
from pathlib import Path
from typing import Any

from cyclopts import App

from polyclinic.core.audit_log import FIRST, Broken, verify
from polyclinic.engines.flare.protocol.paths import read_toml

app = App(name="journal", help="Check the journals of sites, servers and runs.")


@app.command(name="verify")
def check(journal: Path, *, against: Path | None = None, certificate: Path | None = None) -> None:
    """Check that no line of JOURNAL was changed, removed or reordered; the first bad line is named.

    Args:
        journal: A journal.jsonl.
        against: The other end's journal of the same runs: every head that it noted must be in this one.
        certificate: Of a server's run: a site's client.crt, to check its signatures; or its folder certificates/,
            where it was renewed.
    """
    count, head = 0, ""
    for entry in _entries(journal):
        count, head = count + 1, entry["hash"]
    print(f"whole    {count} entries, head {head[:16]}")
    if against is not None:
        noted = check_heads(journal, against)
        print(f"agrees   with {noted} heads that {against} noted")
    if certificate is not None:
        print(f"signed   {check_signatures(journal, certificate)} entries by the owner of {certificate}")


def show(journal: Path, last: int) -> None:
    """Prints the last entries of a journal, after checking all of it."""
    entries = list(_entries(journal))
    for entry in entries[-last:] if last > 0 else []:
        details = {k: v for k, v in entry.items() if k not in ("seq", "event", "time", "previous", "hash", "signature")}
        short = " ".join(f"{k}={_short(v)}" for k, v in details.items())
        print(f"{entry['seq']:6} {entry.get('time', '')[:19]} {entry['event']:24} {short}")
    print(f"whole    {len(entries)} entries")


def check_heads(journal: Path, against: Path) -> int:
    """How many heads of ``journal`` the other end noted in the journal ``against``.

    Raises:
        Broken: If it noted one that is not there: one of the two was rewritten. Or where it noted none.
    """
    own = {FIRST, *(entry["hash"] for entry in _entries(journal))}
    settings = journal.resolve().with_name("site.toml")
    site = read_toml(settings, "polyclinic site init")["site"] if settings.is_file() else ""
    run, noted = journal.resolve().parent.name, 0
    for number, entry in enumerate(_entries(against)):
        if site:
            head = entry.get("head") if entry.get("site") == site else None
        else:
            head = entry.get("server") if entry.get("run") == run else None
        if head and head not in own:
            raise Broken(
                f"{against}:{number + 1}: it noted the head {head[:16]}, which {journal} lacks: one was rewritten"
            )
        noted += bool(head)
    if not noted:
        raise Broken(f"{against} noted no head of {journal}: do they belong together?")
    return noted


def check_signatures(journal: Path, certificate: Path) -> int:
    """How many entries of a server's run carry a good signature by the owner of ``certificate``, or of those in it.

    Raises:
        Broken: At the first bad signature under that site's name.
    """
    from cryptography.x509.oid import NameOID

    from polyclinic.engines.flare.pki.certificate_authority import load_certificate
    from polyclinic.engines.flare.protocol.shared_journals import signed_by

    paths = sorted(certificate.glob("*.crt")) if certificate.is_dir() else [certificate]
    owned = [load_certificate(path.read_text()) for path in paths]
    names = {str(one.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value) for one in owned}
    if len(names) != 1:
        raise Broken(f"{certificate} holds the certificates of {len(names)} sites: one is needed")
    (name,) = names
    good, run = 0, journal.resolve().parent.name
    for number, entry in enumerate(_entries(journal)):
        if entry.get("site") != name or not entry.get("signature"):
            continue
        said = f"{run}\n{entry['number']}\n{name}\n{entry['head']}\n{entry.get('reply', '')}".encode()
        if not any(signed_by(one, entry["signature"], said) for one in owned):
            raise Broken(f"{journal}:{number + 1}: this is not the signature of {name}")
        good += 1
    return good


def _entries(path: Path) -> Any:
    if not path.is_file():
        raise Broken(f"{path} does not exist")
    return verify(path)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}…" if len(text) == 64 else text
