"""Journals of both ends: whole, signed, in agreement; and what is noticed when either end rewrites its own."""

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from polyclinic.cli.journal import check, check_heads, check_signatures
from polyclinic.core.audit_log import Broken, Journal, verify
from polyclinic.engines.flare.pki import site_keys
from polyclinic.engines.flare.pki.certificate_authority import Authority
from tests.support.local_deployment import LocalCarrier, approve, coordinator, hospital, order


@pytest.fixture(scope="module")
def houses(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """After a run in which a reply was refused: a site's journal, the server's of the run, the site's certificate."""
    root = tmp_path_factory.mktemp("journals")
    homes, an = hospital(root), order(rounds=2, score_every=1)
    for home in homes.values():
        approve(home, an)
    carrier = LocalCarrier(homes, an)
    assert coordinator(root, an, carrier).run() == "finished"
    carrier.close()
    home = homes["site-0"]
    authority = Authority.make(root / "ca", "tests")
    certificate = authority.issue(site_keys.load(home.keys / "site.key").public_key(), "site-0", "hospital")
    (root / "site-0.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return home.journal, root / "server" / an.run / "journal.jsonl", root / "site-0.crt"


def rewritten(journal: Path, to: Path, change: Any) -> Path:
    """The journal as its owner could write it anew: whole in itself, with other content from some line on."""
    to.mkdir(parents=True)
    for beside in ("site.toml",):
        if (journal.parent / beside).exists():
            (to / beside).write_text((journal.parent / beside).read_text())
    fresh = Journal(to / "journal.jsonl")
    for entry in verify(journal):
        details = {k: v for k, v in entry.items() if k not in ("seq", "event", "previous", "hash")}
        if (kept := change(entry["event"], details)) is not None:
            fresh.write(entry["event"], kept)
    fresh.close()
    assert list(verify(to / "journal.jsonl"))
    return to / "journal.jsonl"


def test_both_ends_agree_and_signatures_hold(houses: tuple[Path, Path, Path]) -> None:
    site, server, certificate = houses
    assert check_heads(site, server) > 0
    assert check_heads(server, site) > 0
    assert check_signatures(server, certificate) >= 2 * 2 + 1
    check(server, against=site, certificate=certificate)


def test_a_site_that_rewrites_its_journal_is_noticed(houses: tuple[Path, Path, Path], tmp_path: Path) -> None:
    site, server, _ = houses

    def forget(event: str, details: dict[str, Any]) -> dict[str, Any] | None:
        return None if event == "answered" and details["round"] == 0 and details["job"] == "train" else details

    with pytest.raises(Broken, match="one was rewritten"):
        check_heads(rewritten(site, tmp_path / "site-0", forget), server)


def test_a_server_that_rewrites_its_journal_is_noticed(houses: tuple[Path, Path, Path], tmp_path: Path) -> None:
    site, server, certificate = houses

    def less(event: str, details: dict[str, Any]) -> dict[str, Any]:
        return {**details, "bytes": 0} if event == "answered" else details

    changed = rewritten(server, tmp_path / server.parent.name, less)
    with pytest.raises(Broken, match="one was rewritten"):
        check_heads(changed, site)

    def other(event: str, details: dict[str, Any]) -> dict[str, Any]:
        return {**details, "reply": "0" * 64} if event == "answered" else details

    forged = rewritten(server, tmp_path / "x" / server.parent.name, other)
    with pytest.raises(Broken, match="the signature is not that of site-0"):
        check_signatures(forged, certificate)


@pytest.mark.parametrize("how", ["changed", "removed", "swapped", "cut in the middle", "not JSON"])
def test_the_first_bad_line_is_named(
    how: str, houses: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = houses[0].read_text().splitlines()
    if how == "changed":
        lines[3] = lines[3].replace('"event":"', '"event":"x')
    elif how == "removed":
        del lines[3]
    elif how == "swapped":
        lines[3], lines[4] = lines[4], lines[3]
    elif how == "cut in the middle":
        lines[3] = lines[3][:20]
    else:
        lines[3] = "{"
    path = tmp_path / "journal.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(Broken, match=r"journal\.jsonl:4"):
        check(path)


def test_journals_hold_no_data_and_two_that_are_strangers_do_not_agree(
    houses: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    site, server, _ = houses
    other = Journal(tmp_path / "journal.jsonl")
    other.write("begun", {})
    other.close()
    with pytest.raises(Broken, match="are they journals of the same run"):
        check_heads(site, tmp_path / "journal.jsonl")
    with pytest.raises(Broken, match="does not exist"):
        check(tmp_path / "nothing.jsonl")
    known = {
        "event",
        "seq",
        "time",
        "previous",
        "hash",
        "run",
        "number",
        "round",
        "job",
        "ask",
        "bytes",
        "server",
        "reply",
        "order",
        "reason",
        "messages",
        "problems",
        "parts",
        "masked",
    }
    for entry in verify(site):
        assert set(entry) <= known, entry
        assert all(not isinstance(value, float) for value in entry.values())
    assert json.dumps(list(verify(server)))
