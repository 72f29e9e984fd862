"""Secure sums between hospitals: the same bits, sites lost at every stage, servers that lie."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polyclinic.core.audit_log import verify
from polyclinic.engines.flare.protocol.messages import Call
from polyclinic.testing import equal
from tests.engines.flare.test_exchange import reference, state_of
from tests.support.local_deployment import LocalCarrier, approve, coordinator, hospital, identities, order

pytestmark = pytest.mark.usefixtures("looks")
NAMES = ("site-0", "site-1", "site-2", "site-3", "site-4")
SUM = {"name": "secure-sum", "limit": 8.0, "bits": 20}
GROUP = {"width": 8, "norm": "group"}


def setting(
    root: Path, count: int = 5, policy: str = "[limits]\nmin_patients = 2\n", approved: bool = True, **changes: Any
) -> Any:
    homes = hospital(root, count, policy)
    plan = {"options": {"uniform": True}, "uplink": [SUM], "network_options": GROUP, **changes.pop("plan", {})}
    an = order("fedavg", sites=tuple(homes), plan=plan, identities=identities(homes), **changes)
    if approved:
        for home in homes.values():
            approve(home, an)
    return homes, an


def run(root: Path, an: Any, homes: Any, **how: Any) -> tuple[str, dict[str, Any]]:
    carrier = LocalCarrier(homes, an, **how)
    outcome = coordinator(root, an, carrier).run()
    carrier.close()
    lines = (root / "server" / an.run / "records.jsonl").read_text().splitlines()
    lost = [json.loads(line)["lost"] for line in lines if json.loads(line)["kind"] == "round"]
    return outcome, (lost[0] if lost else {})


def test_the_same_bits_as_a_secure_sum_in_one_process(tmp_path: Path) -> None:
    from tests.conftest import little_sites

    homes, an = setting(tmp_path, rounds=2, score_every=2)
    assert run(tmp_path, an, homes) == ("finished", {})
    assert equal(reference(an, little_sites(count=5))[0], state_of(tmp_path, an))


@pytest.mark.parametrize("method", ["histogram-match", "local"])
def test_replies_without_parts_arrive_although_there_is_nothing_to_sum(method: str, tmp_path: Path) -> None:
    from tests.conftest import little_sites

    plan: dict[str, Any] = {"method": method, "uplink": [{**SUM, "limit": 2.0**14, "bits": 14, "heaviest": 64.0}]}
    plan |= {"options": {"uniform": True}} if method != "local" else {"options": {}}
    homes, an = setting(tmp_path, count=3, rounds=2, plan=plan)
    assert run(tmp_path, an, homes) == ("finished", {})
    assert equal(reference(an, little_sites(count=3))[0], state_of(tmp_path, an))


def test_no_number_leaves_but_under_masks(tmp_path: Path) -> None:
    """Nothing that the server received holds a site's vector, and what it received of numbers looks like noise."""
    import torch

    from polyclinic.engines.flare.protocol import tensor_file
    from polyclinic.secure_aggregation import vector_of
    from polyclinic.secure_aggregation.secure_messages import Masked

    homes, an = setting(tmp_path, count=3, rounds=1)
    received, carrier = list[tuple[str, Any]](), LocalCarrier(homes, an)
    arrived = carrier.arrived

    def listen(seconds: Any) -> Any:
        delivery = arrived(seconds)
        if delivery is not None and json.loads(str(delivery.text))["size"]:
            path = tmp_path / f"heard-{len(received)}"
            delivery.take(path, 2**30)
            received.append((delivery.site, tensor_file.read(path)))
        return delivery

    carrier.arrived = listen  # type: ignore[method-assign]
    assert coordinator(tmp_path, an, carrier).run() == "finished"
    masked = {site: value.vector for site, value in received if isinstance(value, Masked)}
    assert set(masked) == set(homes)
    for site, home in homes.items():
        own = vector_of(tensor_file.read(next(home.memory(an.run).glob("*.reply"))))
        assert not torch.equal(masked[site], own)
        bits = ((masked[site][:, None] >> torch.arange(32)) & 1).float()
        assert abs(float(bits.mean()) - 0.5) < 0.02
        assert float((own.abs() > 2**25).float().mean()) == 0  # small numbers ...
        assert float((masked[site].abs() > 2**25).float().mean()) > 0.9  # ... under large masks
    for _, value in received:
        assert type(value).__name__ != "Reply"
    carrier.close()


@pytest.mark.parametrize(
    "stage", ["", "mask", "reveal", *(pytest.param(x, marks=pytest.mark.slow) for x in ("advertise", "share", "agree"))]
)
def test_a_site_lost_at_any_stage_is_lost_alone(stage: str, tmp_path: Path) -> None:
    homes, an = setting(tmp_path, rounds=1, deadline=100.0)
    outcome, lost = run(
        tmp_path, an, homes, lose=lambda c: c.site == "site-2" and c.stage == stage and c.kind in ("do", "secure")
    )
    assert outcome == "finished"
    # Once its vector is in the sum, a site is not missed any more.
    assert list(lost) == (["site-2"] if stage in ("", "advertise", "share", "mask") else [])


def test_too_few_give_no_sum_and_the_round_is_tried_again(tmp_path: Path) -> None:
    homes, an = setting(tmp_path, rounds=1, deadline=100.0)
    outcome, _ = run(tmp_path, an, homes, lose=lambda c: c.site in ("site-2", "site-3") and c.stage == "mask")
    assert outcome == "interrupted"
    assert run(tmp_path, an, homes) == ("finished", {})


@pytest.mark.parametrize(
    "stage", ["mask", "reveal", *(pytest.param(x, marks=pytest.mark.slow) for x in ("share", "agree"))]
)
def test_a_server_that_crashes_in_a_sum_goes_on(stage: str, tmp_path: Path) -> None:
    from tests.conftest import little_sites

    homes, an = setting(tmp_path, count=3, rounds=2)
    assert (
        run(tmp_path, an, homes, crash=lambda c: c.stage == stage and c.round == 1 and c.site == "site-1")[0]
        == "interrupted"
    )
    assert run(tmp_path, an, homes)[0] == "finished"
    assert equal(reference(an, little_sites(count=3))[0], state_of(tmp_path, an))
    trained = [e for e in verify(homes["site-0"].journal) if e["event"] == "asked"]
    assert len(trained) == 2


def test_a_second_sum_over_other_sites_is_refused(tmp_path: Path) -> None:
    """Two sums of one round that differ by a site would show that site's update."""
    homes, an = setting(tmp_path, rounds=1, deadline=100.0)
    folder = tmp_path / "server" / an.run
    carrier = LocalCarrier(homes, an, crash=lambda c: c.kind == "end")
    coordinator(tmp_path, an, carrier).run()
    carrier.close()
    (folder / "checkpoint.safetensors").unlink()  # the server says that it has forgotten
    outcome, _ = run(tmp_path, an, homes, lose=lambda c: c.site == "site-4" and c.kind == "do")
    assert outcome == "interrupted"
    why = json.loads((folder / "status.json").read_text())["why"]
    assert "was opened already" in why or "agreements" in why


def _session_of(tmp_path: Path, change: Any) -> Any:
    """What the sites answer to a server that changes calls."""
    homes, an = setting(tmp_path, count=3, rounds=1, deadline=100.0)
    outcome, _ = run(tmp_path, an, homes, tamper=change)
    return outcome, json.loads((tmp_path / "server" / an.run / "status.json").read_text())["why"]


def test_a_policy_that_asks_for_more_peers_is_obeyed(tmp_path: Path) -> None:
    homes, an = setting(tmp_path, count=3, rounds=1, policy="[limits]\nmin_patients = 2\n[require]\nmin_sites = 4\n")
    outcome, _ = run(tmp_path, an, homes)
    assert outcome == "failed"
    assert "require.min_sites" in json.loads((tmp_path / "server" / an.run / "status.json").read_text())["why"]


def test_a_session_with_other_keys_than_were_approved_is_refused(tmp_path: Path) -> None:
    homes, an = setting(tmp_path, count=3, rounds=1)
    other = identities(hospital(tmp_path / "others", 3))
    lying = replace(an, identities={**an.identities, "site-2": other["site-2"]})
    carrier = LocalCarrier(homes, an)
    con = coordinator(tmp_path, an, carrier)
    con.order = lying  # the server's own copy
    con.order.__dict__["hash"] = an.hash
    carrier.tamper = lambda call: replace(call, order=an.hash)
    assert con.run() == "failed"
    assert "another key" in json.loads((tmp_path / "server" / an.run / "status.json").read_text())["why"]
    carrier.close()


def test_stages_out_of_order_or_without_an_ask_are_refused(tmp_path: Path) -> None:
    def skip(call: Call) -> Call:
        return replace(call, stage="mask") if call.stage == "share" else call

    outcome, why = _session_of(tmp_path / "a", skip)
    assert outcome == "interrupted"
    assert "refused" in why or "required" in why
    outcome, why = _session_of(
        tmp_path / "b", lambda c: replace(c, number=c.number + 1) if c.stage == "advertise" else c
    )
    assert outcome == "interrupted"
