"""Every answer carries its site's signature, or loses the site by name; a weight out of proportion does too."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from polyclinic.engines.flare.protocol import expected_signers, shared_journals, tensor_file
from polyclinic.engines.flare.protocol.expected_signers import Signers
from polyclinic.engines.flare.protocol.message_limits import Limits
from polyclinic.engines.flare.protocol.messages import Answer, BadMessage
from polyclinic.testing import equal
from tests.conftest import little_sites
from tests.engines.flare.test_exchange import reference, state_of
from tests.support.local_deployment import LocalCarrier, admitted, approve, coordinator, hospital, order, signed_again

POLICY = "[limits]\nmin_patients = 2\n"
_foreign = rsa.generate_private_key(public_exponent=65537, key_size=2048)


class Changed(LocalCarrier):
    """A carrier that changes the answers of some sites to one kind of call."""

    def __init__(
        self, homes: Any, an: Any, change: Callable[[Answer], Answer], sites: Any = ("site-1",), kinds: Any = ("do",)
    ) -> None:
        super().__init__(homes, an)
        self.change, self.sites, self.kinds = change, sites, kinds

    def arrived(self, seconds: float) -> Any:
        delivery = super().arrived(seconds)
        if delivery is None or delivery.site not in self.sites or self.calls[-1].kind not in self.kinds:
            return delivery
        return delivery._replace(text=self.change(Answer.from_json(delivery.text)).to_json())


def house(root: Path, count: int = 3, **how: Any) -> Any:
    homes, an = (
        hospital(root, count=count, policy=POLICY),
        order(rounds=1, sites=[f"site-{i}" for i in range(count)], **how),
    )
    for home in homes.values():
        approve(home, an)
    return homes, an


def lost(root: Path, an: Any) -> dict[str, str]:
    lines = [json.loads(line) for line in (root / "server" / an.run / "records.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["kind"] == "round")["lost"]


def foreign(answer: Answer) -> Answer:
    return replace(answer, signature=shared_journals.sign(_foreign, answer.signed))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda a: replace(a, signature=""), "not signed"),
        (lambda a: replace(a, signature="AAAA"), "not signed by a key of site-1"),
        (lambda a: replace(a, signature="not base 64"), "not signed by a key of site-1"),
        (foreign, "not signed by a key of site-1"),
        (lambda a: replace(a, head="0" * 64), "not signed by a key of site-1"),
        (lambda a: replace(a, sha256="0" * 64), "not signed by a key of site-1"),
    ],
)
def test_an_answer_without_its_sites_signature_loses_the_site_by_name(change: Any, why: str, tmp_path: Path) -> None:
    homes, an = house(tmp_path, min_replies=2)
    assert coordinator(tmp_path, an, Changed(homes, an, change)).run() == "finished"
    assert list(lost(tmp_path, an)) == ["site-1"]
    assert why in lost(tmp_path, an)["site-1"]
    two = {name: site for name, site in little_sites().items() if name != "site-1"}
    assert equal(reference(an, two)[0], state_of(tmp_path, an))


@pytest.mark.parametrize("kinds", [("hello",), ("do",)])
def test_no_run_goes_on_without_signatures(kinds: tuple[str, ...], tmp_path: Path) -> None:
    homes, an = house(tmp_path)
    carrier = Changed(homes, an, lambda a: replace(a, signature="", head=""), tuple(homes), kinds)
    assert coordinator(tmp_path, an, carrier).run() != "finished"
    assert "not signed" in json.loads((tmp_path / "server" / an.run / "status.json").read_text())["why"]


def test_who_is_shut_out_not_admitted_or_whose_certificate_has_ended_does_not_count(tmp_path: Path) -> None:
    homes, an = house(tmp_path)
    answers: list[Answer] = []
    known = admitted(tmp_path, homes)
    coordinator(tmp_path, an, Changed(homes, an, lambda a: answers.append(a) or a)).run()  # type: ignore[func-returns-value]
    answer, file = answers[0], tmp_path / "admitted.json"
    known.check(answer)
    entries = json.loads(file.read_text())

    def put(**changes: Any) -> None:
        file.write_text(json.dumps({**entries, "site-1": {**entries["site-1"], **changes}}))

    put(revoked="2026-10-02T10:00:00+00:00")
    with pytest.raises(BadMessage, match="revoked on 2026-10-02"):
        Signers(file).check(answer)
    put(signers=[{**entries["site-1"]["signers"][0], "expires": (datetime.now(UTC) - timedelta(1)).isoformat()}])
    with pytest.raises(BadMessage, match="has a certificate"):
        Signers(file).check(answer)
    file.write_text("{}")
    with pytest.raises(BadMessage, match="not admitted"):
        Signers(file).check(answer)
    file.write_text("{")
    with pytest.raises(BadMessage, match="cannot be checked"):
        Signers(file).check(answer)


def test_an_earlier_key_holds_for_a_week() -> None:
    until = datetime.now(UTC) + timedelta(days=700)
    old, new = (
        expected_signers.signer(key.public_key(), until) for key in (_foreign, rsa.generate_private_key(65537, 2048))
    )
    kept = expected_signers.added([old], new)
    assert [one["key"] for one in kept] == [old["key"], new["key"]]
    assert datetime.fromisoformat(kept[0]["expires"]) < datetime.now(UTC) + timedelta(days=8)
    assert expected_signers.added([old], old) == [old]


# Weights ----------------------------------------------------------------------------------------------------------------


class Heavy(LocalCarrier):
    """A carrier whose site-1 claims another weight for what it learned, and signs it."""

    def __init__(self, homes: Any, an: Any, weight: float) -> None:
        super().__init__(homes, an)
        self.weight = weight

    def arrived(self, seconds: float) -> Any:
        delivery = super().arrived(seconds)
        if delivery is None or delivery.site != "site-1" or self.calls[-1].kind != "do":
            return delivery
        path = self.homes["site-1"].path / "heavy"
        delivery.take(path, 10**9)
        reply = tensor_file.read_reply(path)
        mean = reply.mean("update")
        changed = replace(reply, parts={"update": replace(mean, total=dict(mean.total), weight=self.weight)})
        size, sha256 = tensor_file.write(path, changed)
        answer = replace(Answer.from_json(delivery.text), size=size, sha256=sha256)
        made = delivery._replace(
            text=answer.to_json(), take=lambda place, limit: (path.rename(place), (size, sha256))[1]
        )
        return signed_again(made, self.homes["site-1"])


def test_a_site_that_claims_to_be_everybody_is_lost_by_name(tmp_path: Path) -> None:
    homes, an = house(tmp_path, count=4, min_replies=2)
    assert coordinator(tmp_path, an, Heavy(homes, an, 1e12)).run() == "finished"
    assert list(lost(tmp_path, an)) == ["site-1"]
    assert "weight 1e+12 exceeds the limit of" in lost(tmp_path, an)["site-1"]
    assert json.loads((tmp_path / "server" / an.run / "status.json").read_text())["why"].startswith("without site-1 (")


def test_what_a_site_has_by_the_survey_it_may_claim(tmp_path: Path) -> None:
    """With counts two sites are enough for a comparison; and a large site is not refused for being large."""
    homes, an = house(tmp_path, count=2, min_replies=1)
    how = {"limits": Limits(counts={"site-0": 20, "site-1": 5000})}
    assert coordinator(tmp_path, an, Heavy(homes, an, 5000.0), **how).run() == "finished"
    assert lost(tmp_path, an) == {}
    other = replace(an, run="run-2")
    for home in homes.values():
        approve(home, other)
    assert coordinator(tmp_path, other, Heavy(homes, other, 5001.0), **how).run() == "finished"
    assert "the site's number of examples is 5000" in lost(tmp_path, other)["site-1"]
