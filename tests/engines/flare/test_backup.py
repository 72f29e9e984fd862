"""A site's folder, copied and restored in another place, is the same site: decisions, journal, policy and keys hold."""

import tarfile
from pathlib import Path

from polyclinic.core.audit_log import verify
from polyclinic.engines.flare.client.reviews import APPROVED, Reviews, record_decision
from polyclinic.engines.flare.protocol.paths import SiteFolder
from polyclinic.engines.flare.protocol.shared_journals import SharedJournal
from tests.engines.flare.test_approval import survey
from tests.support.local_deployment import hospital


def test_a_restored_site_keeps_its_decisions_and_its_journal(tmp_path: Path) -> None:
    home = hospital(tmp_path / "old", count=1)["site-0"]
    reviews = Reviews(home.reviews)
    reviews.offer(survey(), ())
    reviews.remember(reviews.subject("spots"))
    record_decision(home, "spots", APPROVED, "IRB 26-114", "Anna Martin")
    with tarfile.open(tmp_path / "backup.tar.gz", "w:gz") as file:
        file.add(home.path, "site-0")
    with tarfile.open(tmp_path / "backup.tar.gz") as file:
        file.extractall(tmp_path / "new", filter="data")
    restored = SiteFolder(tmp_path / "new" / "site-0")
    review = Reviews(restored.reviews).get("spots-survey")
    assert review is not None
    assert (review.state, review.by, review.reason) == (APPROVED, "Anna Martin", "IRB 26-114")
    before = list(verify(home.journal))
    assert list(verify(restored.journal)) == before
    SharedJournal(restored.journal).write("asked", {"run": "next"})
    assert len(list(verify(restored.journal))) == len(before) + 1
    assert restored.policy.read_bytes() == home.policy.read_bytes()
    assert (restored.keys / "site.key").stat().st_mode & 0o077 == 0
    (restored.keys / "site.key").unlink()  # without its keys, its decisions are not valid
    assert Reviews(restored.reviews).get("spots-survey").state != APPROVED  # type: ignore[union-attr]
