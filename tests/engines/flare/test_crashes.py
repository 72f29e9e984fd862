"""A run dies at every single write, before it and after it, and each time resumes with bit-identical results.

Server and sites are one process here, so that it takes a second and not a minute; test_faults.py kills real ones.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyclinic.core.audit_log import Broken, Journal, verify
from polyclinic.engines.flare.client.run_memory import RunMemory
from polyclinic.engines.flare.protocol import tensor_file
from polyclinic.engines.flare.protocol.paths import SiteFolder
from polyclinic.privacy.ledger import Ledger
from polyclinic.testing import equal
from tests.engines.flare.test_exchange import EVERYTHING, reference, state_of
from tests.engines.flare.test_secure import GROUP, SUM
from tests.support.local_deployment import LocalCarrier, approve, coordinator, hospital, identities, order

CASES: dict[str, dict[str, Any]] = {
    "scaffold": {"score_every": 2},
    "mime": {},
    "secure": {"method": "fedavg", "plan": {"options": {"uniform": True}, "uplink": [SUM], "network_options": GROUP}},
}
DEATH = 9


class Moments:
    """The moments around writes: `os.replace` and `os.fsync`. In the wanted one this process dies without a word."""

    def __init__(self, wanted: int | None) -> None:
        self.wanted, self.count = wanted, 0

    def pass_by(self) -> None:
        if self.count == self.wanted:
            os._exit(DEATH)
        self.count += 1

    def around(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def doing(*arguments: Any, **more: Any) -> Any:
            self.pass_by()
            done = real(*arguments, **more)
            self.pass_by()
            return done

        return doing


def attempt(root: Path, an: Any, homes: dict[str, SiteFolder], die_at: int | None = None) -> tuple[int, int]:
    """One attempt in a process of its own: how it ended, and how many moments it passed."""
    seen = root / "moments"
    pid = os.fork()
    if pid == 0:
        moments = Moments(die_at)
        # What a killed process has written stays with the kernel, so that nothing needs to be forced to the disk.
        os.replace, os.fsync = moments.around(os.replace), moments.around(lambda handle: None)
        code = 1
        try:
            carrier = LocalCarrier(homes, an)
            code = 0 if coordinator(root, an, carrier).run() == "finished" else 2
            carrier.close()
            seen.write_text(str(moments.count))
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), int(seen.read_text()) if seen.exists() else 0


class Town:
    """Hospitals that can be made again and again."""

    def __init__(self, root: Path, case: str, policy: str = EVERYTHING, **how: Any) -> None:
        self.root = root
        homes = hospital(root / "template", policy=policy)
        how = {"method": case, "rounds": 2, **CASES.get(case, {}), **how}
        self.order = order(**how, identities=identities(homes))
        for home in homes.values():
            approve(home, self.order)
        self.expected, self.memory = reference(self.order)

    def made(self, name: str) -> tuple[Path, dict[str, SiteFolder]]:
        place = self.root / name
        shutil.copytree(self.root / "template", place)
        return place, {site: SiteFolder(place / site) for site in self.memory}

    def check(self, place: Path, homes: dict[str, SiteFolder]) -> None:
        """The bits of the undisturbed run, at the server and at every site, and whole journals."""
        an = self.order
        assert equal(self.expected, state_of(place, an))
        for site, home in homes.items():
            memory = RunMemory(home.memory(an.run))
            kept = memory.chain.links[-1].memory
            assert equal(self.memory[site], tensor_file.read(memory.folder / kept) if kept else {})
            assert list(verify(home.journal))
        assert [e["event"] for e in verify(place / "server" / an.run / "journal.jsonl")][-1] == "finished"
        shutil.rmtree(place)


@pytest.fixture(
    params=["scaffold", *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != "scaffold")]
)
def town(request: pytest.FixtureRequest, tmp_path: Path) -> Town:
    return Town(tmp_path, request.param)


def moments_of(town: Town, same: bool = True) -> int:
    place, homes = town.made("undisturbed")
    code, count = attempt(place, town.order, homes)
    assert code == 0
    if same:
        town.check(place, homes)
    return count


def dies_and_goes_on(town: Town, *moments: int) -> None:
    place, homes = town.made("-".join(map(str, moments)))
    for moment in moments:
        code, _ = attempt(place, town.order, homes, moment)
        assert code in (DEATH, 0), f"moment {moment}: {code}"
    code, _ = attempt(place, town.order, homes)
    assert code == 0, f"after {moments} it did not go on"
    town.check(place, homes)


def test_a_run_that_dies_at_some_writes_goes_on_to_the_bit(town: Town) -> None:
    count = moments_of(town)
    assert count > 100
    for moment in range(5, count, count // 3):
        dies_and_goes_on(town, moment)


@pytest.mark.slow
def test_a_run_that_dies_at_any_write_goes_on_to_the_bit(town: Town) -> None:
    for moment in range(moments_of(town)):
        dies_and_goes_on(town, moment)


@pytest.mark.slow
def test_a_run_that_dies_three_times_goes_on_to_the_bit(town: Town) -> None:
    count = moments_of(town)
    for first in range(7, count, 23):
        dies_and_goes_on(town, first, (7 * first) % 61, (13 * first) % 97)


PRIVATE = (
    EVERYTHING
    + """
[privacy]
epsilon = 1000.0
delta = 1e-3
unit = "record"
"""
)


def spends_of(home: SiteFolder) -> int:
    """Return the number of releases in the site's ledger."""
    return sum(len(Ledger(path).spends()) for path in home.ledgers.glob("*.jsonl"))


def releases_of(home: SiteFolder) -> int:
    """How many different replies left a site: each was made from noise of its own."""
    return len({e["reply"] for e in verify(home.journal) if e["event"] == "answered" and e["job"] == "train"})


def spend_is_never_too_small(root: Path, step: int) -> None:
    pytest.importorskip("dp_accounting", reason="needs polyclinic[privacy]")
    training = {"batch_size": 8, "lr": 0.05, "steps": 1, "private": {"noise": 2.0, "bound": 1.0, "unit": "record"}}
    town = Town(root, "fedavg", PRIVATE, plan={"training": training, "network_options": GROUP})
    count = moments_of(town, same=False)
    assert count > 100
    extra = 0
    for moment in range(3, count, step):
        place, homes = town.made(f"at-{moment}")
        assert attempt(place, town.order, homes, moment)[0] in (DEATH, 0)
        assert attempt(place, town.order, homes)[0] == 0
        for home in homes.values():
            assert spends_of(home) >= releases_of(home) >= 2
            extra += spends_of(home) - 2
        shutil.rmtree(place)
    assert extra <= count // step + 1  # and hardly ever too large: what was paid for and lost, once for each death


def test_privacy_spend_is_never_under_counted_whenever_a_run_dies(tmp_path: Path) -> None:
    spend_is_never_too_small(tmp_path, 300)


@pytest.mark.slow
def test_privacy_spend_is_never_under_counted_at_any_write(tmp_path: Path) -> None:
    spend_is_never_too_small(tmp_path, 1)


def test_a_journal_on_a_full_disk_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be written was not written: neither half of it, nor later by surprise."""
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("first")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            journal.write("second")
    other = Journal(tmp_path / "journal.jsonl")  # of another process
    other.write("third")
    journal.close()
    assert [entry["event"] for entry in verify(tmp_path / "journal.jsonl")] == ["first", "third"]
    assert issubclass(Broken, ValueError)
