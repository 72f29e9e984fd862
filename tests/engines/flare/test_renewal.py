"""Certificates and keys that change during a run; and a site whose only outgoing connection is an HTTP proxy."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polyclinic.cli.journal import check_signatures
from polyclinic.core.audit_log import Broken
from polyclinic.testing import equal
from tests.support.flare_deployment import Hospitals, reference, study, until
from tests.support.http_proxy import HttpProxy

pytestmark = [pytest.mark.deploy, pytest.mark.slow]
SUM = {
    "options": {"uniform": True},
    "uplink": [{"name": "secure-sum", "limit": 8.0, "bits": 20}],
    "network_options": {"width": 8, "norm": "group"},
}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    pytest.importorskip("nvflare", reason="the extra [flare] is not installed")
    with Hospitals(Path(tmp_path_factory.mktemp("three")), wait_for_all=120) as made:
        yield made


@pytest.fixture
def house(three: Hospitals) -> Iterator[Hospitals]:
    three.reset()
    yield three
    three.release()
    three.journals_hold()


def join(house: Hospitals, site: str, *more: str) -> None:
    """As in the guide: the site stops, and joins with the coordinator's join file."""
    home = house.homes[site]
    fingerprint = house.command("server", "fingerprint", home=house.server.path).strip()
    data = str(house.root / "data" / site)
    house.command(
        "site",
        "join",
        str(home.path / f"{site}.join"),
        "--data",
        data,
        "--fingerprint",
        fingerprint,
        *more,
        home=home.path,
    )


def called(pid: int) -> set[int]:
    """The ports to which a process is connected."""
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if f"socket:[{words[9]}]" in links and words[3] == "01":  # established
                ports.add(int(words[2].rpartition(":")[2], 16))
    return ports


@pytest.mark.parametrize(("method", "plan"), [("scaffold", {}), ("fedavg", SUM)], ids=["memory", "secure sum"])
@pytest.mark.parametrize("new", [False, True], ids=["same keys", "new keys"])
def test_a_certificate_is_renewed_while_a_run_goes_on(
    method: str, plan: dict[str, Any], new: bool, house: Hospitals
) -> None:
    """In the middle of a round; the site stops for it, and the run ends with the bits of the undisturbed one."""
    run, home = f"renewed-{method}-{'new' if new else 'same'}", house.homes["site-0"]
    an = house.order(study(run, method, rounds=4, min_replies=3, plan=plan))
    house.hold(2, "site-0")
    house.held(2, "site-0")
    before, certificate = (home.keys / "site.key").read_text(), (home.kit / "startup" / "client.crt").read_text()
    house.command(
        "site",
        "init",
        "--name",
        "site-0",
        "--organization",
        "hospital",
        "--renew",
        *(["--new-keys"] if new else []),
        home=home.path,
    )
    house.command("server", "admit", str(home.path / "site-0.request"), home=house.server.path)
    house.command("site", "stop", home=home.path)
    join(house, "site-0")
    house.release()
    house.start_site("site-0")
    house.finished(run)
    assert ((home.keys / "site.key").read_text() != before) is new
    assert (home.kit / "startup" / "client.crt").read_text() != certificate
    state, memory = reference(an)
    assert house.lost(run) == []
    assert equal(state, house.state(run))
    assert equal(memory["site-0"], house.memory(run, "site-0"))
    journal = house.server.run(run) / "journal.jsonl"
    assert check_signatures(journal, home.certificates) >= 4
    if new:  # some were signed under the earlier one
        with pytest.raises(Broken, match="not the signature"):
            check_signatures(journal, home.kit / "startup" / "client.crt")
    assert "valid for" in house.command("site", "diagnose", home=home.path)


def test_a_site_behind_a_proxy_takes_part(house: Hospitals) -> None:
    """Its line to the server is cut, but through the proxy; a model large enough to travel as a file."""
    outside, home = HttpProxy(), house.homes["site-1"]
    house.command("site", "stop", home=home.path)
    join(house, "site-1", "--proxy", outside.url)
    house.start_site("site-1")
    until(lambda: outside.asked, "the site to go out by the proxy", 60)
    house.together()
    assert set(outside.asked) == {f"localhost:{house.port}"}
    for look in ("diagnose", "status"):
        assert f"through {outside.url}" in house.command("site", look, home=home.path)
    run, plan = "behind", {"network": "mlp", "network_options": {"width": 512, "depth": 2}}
    an = house.order(study(run, rounds=2, min_replies=3, score_every=2, plan=plan))
    house.hold(1, "site-1")
    house.held(1, "site-1")
    there = [pid for kind in ("site parent", "site job", "training") for pid in house.pids(kind, "site-1")]
    assert len(there) == 3
    assert house.port not in set().union(*(called(pid) for pid in there))  # nothing goes past the proxy
    house.release()
    house.finished(run)
    assert house.lost(run) == []
    assert equal(reference(an)[0], house.state(run))
    assert outside.passed > 4 * 1_300_000  # the model came and went twice
    assert len(outside.asked) > 1  # the site's parent, and its job process
    house.command("site", "stop", home=home.path)
    join(house, "site-1", "--proxy", "")
    outside.close()
