"""``polyclinic journal``: whether a journal is complete, and whether two journals agree."""

import json
from pathlib import Path
from typing import Any

from cyclopts import App

from polyclinic.cli.rendering import Json, document, line
from polyclinic.core.audit_log import FIRST, Broken, verify
from polyclinic.engines.flare.protocol.paths import read_toml

app = App(name="journal", help="Verify the journals of sites, servers and runs.")


@app.command(name="verify")
def check(journal: Path, *, against: Path | None = None, certificate: Path | None = None, json_: Json = False) -> None:
    """Verify that no entry of JOURNAL was changed, removed or reordered; the first invalid line is named.

    Args:
        journal: A journal.jsonl.
        against: The other party's journal of the same runs: every hash that it recorded must be in this one.
        certificate: For the journal of a server's run: a site's client.crt, to check its signatures; or its folder
            certificates/, if it was renewed.
    """
    with document(json_) as emit:
        count, head = 0, ""
        for entry in _entries(journal):
            count, head = count + 1, entry["hash"]
        line(f"complete {_entry_count(count)}, latest hash {head[:16]}")
        recorded = signed = None
        if against is not None:
            recorded = check_heads(journal, against)
            line(f"agrees   with the {recorded} hashes that {against} recorded")
        if certificate is not None:
            signed = check_signatures(journal, certificate)
            line(f"signed   {signed} entries by the owner of {certificate}")
        emit({"journal": journal, "entries": count, "head": head, "recorded_hashes": recorded, "signatures": signed})


def show(journal: Path, last: int, as_json: bool = False) -> None:
    """Print the last entries of a journal, after verifying all of it."""
    with document(as_json) as emit:
        entries = list(_entries(journal))
        shown = entries[-last:] if last > 0 else []
        emit({"entries": len(entries), "last": shown})
        known = ("seq", "event", "time", "previous", "hash", "signature")
        for entry in shown:
            details = " ".join(f"{k}={_short(v)}" for k, v in entry.items() if k not in known)
            line(f"{entry['seq']:6} {entry.get('time', '')[:19]} {entry['event']:24} {details}")
        line(f"complete {_entry_count(len(entries))}")


def check_heads(journal: Path, against: Path) -> int:
    """Return the number of hashes of ``journal`` that the other party recorded in the journal ``against``.

    Raises:
        Broken: If it recorded one that ``journal`` lacks, so that one of the two was rewritten; or if it recorded none.
    """
    own = {FIRST, *(entry["hash"] for entry in _entries(journal))}
    settings = journal.resolve().with_name("site.toml")
    site = read_toml(settings, "polyclinic site init")["site"] if settings.is_file() else ""
    run, recorded = journal.resolve().parent.name, 0
    for number, entry in enumerate(_entries(against)):
        if site:
            head = entry.get("head") if entry.get("site") == site else None
        else:
            head = entry.get("server") if entry.get("run") == run else None
        if head and head not in own:
            raise Broken(
                f"{against}:{number + 1}: it recorded the hash {head[:16]}, which {journal} lacks: one was rewritten"
            )
        recorded += bool(head)
    if not recorded:
        raise Broken(f"{against} recorded no hash of {journal}: are they journals of the same run?")
    return recorded


def check_signatures(journal: Path, certificate: Path) -> int:
    """Return the number of entries of a server's run with a valid signature by the owner of ``certificate``.

    ``certificate`` is a file or a folder of certificates of one site.

    Raises:
        Broken: If a signature under that site's name is invalid.
    """
    from cryptography.x509.oid import NameOID

    from polyclinic.engines.flare.pki.certificate_authority import load_certificate
    from polyclinic.engines.flare.protocol.shared_journals import signed_by

    paths = sorted(certificate.glob("*.crt")) if certificate.is_dir() else [certificate]
    owned = [load_certificate(path.read_text()) for path in paths]
    names = {str(one.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value) for one in owned}
    if len(names) != 1:
        raise Broken(f"{certificate} contains certificates of {len(names)} sites: give those of one site")
    (name,) = names
    good, run = 0, journal.resolve().parent.name
    for number, entry in enumerate(_entries(journal)):
        if entry.get("site") != name or not entry.get("signature"):
            continue
        statement = f"{run}\n{entry['number']}\n{name}\n{entry['head']}\n{entry.get('reply', '')}".encode()
        if not any(signed_by(one, entry["signature"], statement) for one in owned):
            raise Broken(f"{journal}:{number + 1}: the signature is not that of {name}")
        good += 1
    return good


def _entries(path: Path) -> Any:
    if not path.is_file():
        problem = "is a folder: name its journal.jsonl" if path.is_dir() else "does not exist"
        raise Broken(f"{path} {problem}")
    return verify(path)


def _entry_count(count: int) -> str:
    return f"{count} entr{'y' if count == 1 else 'ies'}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}…" if len(text) == 64 else text
