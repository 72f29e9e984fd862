"""A privacy budget belongs to data, wherever they lie and whatever they are called."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("dp_accounting", reason="needs polyclinic[privacy]")

from polyclinic.core.journal import Broken
from polyclinic.data.examples import Examples
from polyclinic.engines.policy import BadPolicy, Privacy
from polyclinic.engines.site_ledger import HEADS, KEY, LIST, SiteLedger, ledger_for, members_of
from polyclinic.tasks.dpsgd import Spend
from polyclinic.transforms.ledger import Exhausted, Ledger

BUDGET = Privacy(epsilon=5.0, delta=1e-3)
ONE = Spend(2.0, unit="patient")


def ward(patients: range, seed: int = 0, prefix: str = "p", label: int = 0) -> Examples:
    """Two images of each patient; the images of a patient are the same in every ward of a seed."""
    images = torch.cat([torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1000 * seed + p)) for p in patients])
    names = tuple(f"{prefix}{p}" for p in patients for _ in range(2))
    return Examples(images, torch.full((len(names),), label), names, tuple(map(str, range(len(names)))))


def opened(home: Path, data: Examples, name: str = "ward", privacy: Privacy = BUDGET) -> SiteLedger:
    return ledger_for(home / "ledgers", name, {"train": data}, "lyon", privacy)


def spent(home: Path) -> list[int]:
    """How many releases each ledger counts, fewest first."""
    return sorted(len(Ledger(path).spends()) for path in (home / "ledgers").glob("*.jsonl"))


TEN = ward(range(10))
SAME: dict[str, tuple[Examples, str]] = {
    "as it was": (TEN, "ward"),
    "renamed": (TEN, "another"),
    "one patient more": (ward(range(11)), "another"),
    "a subset": (ward(range(9, 10)), "another"),
    "one patient in common": (ward(range(9, 30)), "another"),
    "patients renamed": (ward(range(10), prefix="q"), "another"),
    "patients renamed, and a subset of images": (ward(range(10), prefix="q").subset(torch.tensor([7])), "another"),
    "other labels": (ward(range(10), prefix="q", label=1), "another"),
    "images prepared in another way": (Examples(TEN.inputs[..., :2], TEN.targets, TEN.patients, TEN.ids), "another"),
    "other data of that name": (ward(range(10), seed=5, prefix="q"), "ward"),
}  # fmt: skip


@pytest.mark.parametrize("what", SAME)
def test_the_same_data_have_the_same_budget(tmp_path: Path, what: str) -> None:
    opened(tmp_path, TEN).reserve([ONE])
    data, name = SAME[what]
    again = opened(tmp_path, data, name)
    again.reserve([ONE])
    assert spent(tmp_path) == [2]
    assert again.others == ()


def test_other_data_of_another_name_have_a_budget_of_their_own(tmp_path: Path) -> None:
    opened(tmp_path, TEN).reserve([ONE])
    opened(tmp_path, ward(range(20, 30), seed=1), "another").reserve([ONE])
    assert spent(tmp_path) == [1, 1]
    assert {Ledger(p).budget()["data"] for p in (tmp_path / "ledgers").glob("*.jsonl")} == {"ward", "another"}


def test_data_of_all_roles_count(tmp_path: Path) -> None:
    """Another study may train on whom this one tests on."""
    roles = {"train": ward(range(5)), "test": ward(range(5, 10))}
    ledger_for(tmp_path / "ledgers", "ward", roles, "lyon", BUDGET).reserve([ONE])
    opened(tmp_path, ward(range(9, 10)), "another").reserve([ONE])
    assert spent(tmp_path) == [2]


def test_who_was_added_is_known_from_then_on(tmp_path: Path) -> None:
    opened(tmp_path, TEN)
    opened(tmp_path, ward(range(9, 20)))
    opened(tmp_path, ward(range(19, 20), prefix="q"), "another").reserve([ONE])
    assert spent(tmp_path) == [1]


def spends(ledger: Ledger) -> bool:
    """Whether the ledger still allows one release, which it then pays for."""
    try:
        ledger.reserve([ONE])
    except Exhausted:
        return False
    return True


def test_data_of_two_ledgers_are_paid_for_from_both_or_not_at_all(tmp_path: Path) -> None:
    first, second = opened(tmp_path, TEN, "one"), opened(tmp_path, ward(range(20, 30)), "two")
    first.reserve([ONE])
    both = opened(tmp_path, ward(range(9, 21)), "three")
    assert {both.path, *(other.path for other in both.others)} == {first.path, second.path}
    said = both.reserve([ONE])
    assert spent(tmp_path) == [1, 2]
    assert said == Ledger(first.path).spent().epsilon_rdp > Ledger(second.path).spent().epsilon_rdp
    (last,) = both.others
    while spends(last):  # until nothing is left here, and enough in the one that is asked first
        pass
    Ledger(both.path).check([ONE])
    before = spent(tmp_path)
    with pytest.raises(Exhausted, match="is used up"):
        both.reserve([ONE])
    assert spent(tmp_path) == before, "neither paid"


def test_names_that_only_number_examples_are_no_patients_names(tmp_path: Path) -> None:
    def numbered(seed: int, names: tuple[str, ...]) -> Examples:
        images = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        return Examples(images, torch.zeros(4, dtype=torch.int64), names, ("3", "5", "6", "9"))

    opened(tmp_path, numbered(1, ("0", "1", "2", "3")), "one")
    opened(tmp_path, numbered(2, ("0", "1", "2", "3")), "two")
    opened(tmp_path, numbered(3, ("3", "5", "6", "9")), "three")
    opened(tmp_path, numbered(4, ("3", "5", "6", "9")), "four")
    assert len(spent(tmp_path)) == 4
    opened(tmp_path, numbered(5, ("0", "1", "2", "9")), "five")
    opened(tmp_path, numbered(6, ("9", "x", "y", "z")), "six")
    assert len(spent(tmp_path)) == 5, "a patient called 9 is in both"


def test_an_empty_image_is_no_ones(tmp_path: Path) -> None:
    def blank(seed: int) -> Examples:
        images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        images[1] = 0.25
        return Examples(images, torch.zeros(3, dtype=torch.int64), ("0", "1", "2"), ("0", "1", "2"))

    opened(tmp_path, blank(1), "one")
    opened(tmp_path, blank(2), "two")
    assert len(spent(tmp_path)) == 2


def test_the_files_tell_nothing_of_patients(tmp_path: Path) -> None:
    """Names and images are hashed with a key of the site's own, so nobody can try names out."""
    for home in (tmp_path / "a", tmp_path / "b"):
        home.mkdir()
        opened(home, TEN)
    lists = [next((home / "ledgers").glob(f"*{LIST}")) for home in (tmp_path / "a", tmp_path / "b")]
    seen = [set(path.read_text().split()) for path in lists]
    assert len(seen[0]) == len(seen[1]) == 10 + 20
    assert not seen[0] & seen[1]
    assert "p3" not in "".join(path.read_text(errors="replace") for path in (tmp_path / "a").rglob("*") if path.is_file()
                               and path.name != KEY)  # fmt: skip
    for path in (lists[0], tmp_path / "a" / "ledgers" / KEY):
        assert path.stat().st_mode & 0o077 == 0
    assert members_of(b"1" * 32, {"train": TEN}) != members_of(b"2" * 32, {"train": TEN})


def parts(home: Path) -> dict[str, Path]:
    (ledger,) = (home / "ledgers").glob("*.jsonl")
    beside = {"head": ".head", "list": LIST}
    found = {name: ledger.with_name(ledger.name + end) for name, end in beside.items()}
    return {"ledger": ledger, "key": home / "ledgers" / KEY, "heads": home / HEADS, **found}


TAMPERED: dict[str, tuple[Callable[[dict[str, Path]], Any], str]] = {
    "ledger deleted": (lambda p: p["ledger"].unlink(), "missing"),
    "ledger and head deleted": (lambda p: [p[k].unlink() for k in ("ledger", "head")], "missing"),
    "all of a ledger deleted": (lambda p: [p[k].unlink() for k in ("ledger", "head", "list")], "is missing, and .* knows of it"),
    "and the heads too": (lambda p: [p[k].unlink() for k in ("ledger", "head", "heads")], "missing"),
    "head deleted": (lambda p: p["head"].unlink(), "do not agree"),
    "list deleted": (lambda p: p["list"].unlink(), "list of whose data .* changed or cut"),
    "list emptied": (lambda p: p["list"].write_bytes(b""), "list of whose data .* changed or cut"),
    "list edited": (lambda p: p["list"].write_bytes(b"z" + p["list"].read_bytes()[1:]), "list of whose data"),
    "list cut": (lambda p: p["list"].write_bytes(p["list"].read_bytes()[:-33]), "list of whose data"),
    "key deleted": (lambda p: p["key"].unlink(), "not the key"),
    "key replaced": (lambda p: p["key"].write_bytes(bytes(32)), "not the key"),
    "heads garbled": (lambda p: p["heads"].write_bytes(b"[1"), "does not list the heads"),
    "heads of another kind": (lambda p: p["heads"].write_bytes(b"[1]"), "does not list the heads"),
}  # fmt: skip


@pytest.mark.parametrize("how", TAMPERED)
@pytest.mark.parametrize("renamed", [False, True])
def test_what_was_taken_away_buys_no_new_budget(tmp_path: Path, how: str, renamed: bool) -> None:
    before = opened(tmp_path, TEN)
    before.reserve([ONE])
    act, why = TAMPERED[how]
    act(parts(tmp_path))
    with pytest.raises(Broken, match=why):
        opened(tmp_path, TEN, "another" if renamed else "ward")


def test_an_older_copy_of_the_ledgers_is_noticed_and_a_newer_entry_is_not(tmp_path: Path) -> None:
    ledger = opened(tmp_path, TEN)
    ledger.reserve([ONE])
    shutil.copytree(tmp_path / "ledgers", tmp_path / "backup")
    Ledger(ledger.path).reserve([ONE])  # as a crash leaves it: paid, and the heads not yet written
    opened(tmp_path, TEN)
    ledger.reserve([ONE])
    shutil.rmtree(tmp_path / "ledgers")
    shutil.copytree(tmp_path / "backup", tmp_path / "ledgers")
    for use in (lambda: opened(tmp_path, TEN), lambda: opened(tmp_path, ward(range(50, 60)), "x"), lambda: ledger.reserve([ONE])):
        with pytest.raises(Broken, match="an older copy or another ledger"):
            use()
    assert spent(tmp_path) == [1]


def test_a_crash_between_list_and_chain_loses_nobody(tmp_path: Path) -> None:
    """The list is on the disk first: what it holds beyond the chain counts, and a torn line is cut off."""
    opened(tmp_path, TEN)
    whole, path = members_of(parts(tmp_path)["key"].read_bytes(), {"train": ward(range(10, 11))}), parts(tmp_path)["list"]
    path.write_bytes(path.read_bytes() + "".join(f"{m}\n" for m in sorted(whole)).encode() + b"abc")
    opened(tmp_path, ward(range(10, 11)), "another").reserve([ONE])
    assert spent(tmp_path) == [1]
    lines = path.read_bytes().splitlines(keepends=True)
    assert {len(line) for line in lines} == {33}
    assert len(lines) == len(set(lines)) == 30 + 3
    opened(tmp_path, TEN)


@pytest.mark.parametrize("step", range(40))
def test_a_site_that_dies_at_any_step_of_opening_goes_on(tmp_path: Path, step: int) -> None:
    """Whatever a first opening and a payment had written, the next finds it; nothing paid is forgotten."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=opened_until, args=(tmp_path, step))
    process.start()
    process.join(timeout=60)
    assert process.exitcode in (0, 9)
    paid = (tmp_path / "paid").exists()
    again = opened(tmp_path, TEN, "another")
    again.reserve([ONE])
    ledgers = [Ledger(path) for path in (tmp_path / "ledgers").glob("*.jsonl") if Ledger(path).begun]
    assert sum(len(ledger.spends()) for ledger in ledgers) in ((2,) if paid else (1, 2))
    assert opened(tmp_path, ward(range(1, 2), prefix="q"), "third").path == again.path


def opened_until(home: Path, step: int) -> None:
    """Opens a ledger and pays, and dies at a step that touches the disk."""
    count = 0

    def deadly(act: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **more: Any) -> Any:
            nonlocal count
            if count == step:
                os._exit(9)
            count += 1
            return act(*given, **more)

        return counted

    os.fsync, os.replace, os.open = deadly(os.fsync), deadly(os.replace), deadly(os.open)
    opened(home, TEN).reserve([ONE])
    (home / "paid").touch()
    os._exit(0)


def test_opening_again_writes_nothing(tmp_path: Path) -> None:
    opened(tmp_path, TEN)
    before = {path: path.read_bytes() for path in (tmp_path / "ledgers").iterdir()}
    opened(tmp_path, ward(range(3, 7)))
    assert {path: path.read_bytes() for path in (tmp_path / "ledgers").iterdir()} == before


def test_the_policys_budget_is_the_ledgers(tmp_path: Path) -> None:
    ledger = opened(tmp_path, TEN)
    assert ledger.budget() == {"site": "lyon", "data": "ward", "unit": "patient", "epsilon": 5.0, "delta": 1e-3}
    opened(tmp_path, TEN, privacy=Privacy(epsilon=6.5, delta=1e-3))
    assert ledger.budget()["epsilon"] == 6.5
    for wrong in (Privacy(epsilon=6.5, delta=1e-4), Privacy(epsilon=6.5, delta=1e-3, unit="site")):
        with pytest.raises(BadPolicy, match=r"for every patient with delta = 0\.001, and a ledger cannot be recounted"):
            opened(tmp_path, TEN, privacy=wrong)


def racer(home: str, number: int, start: Any, results: Any) -> None:
    start.wait()
    ledger = opened(Path(home), ward(range(number, number + 6)), f"name-{number}")
    ledger.reserve([ONE])
    results.put(len(ledger.others))


def test_runs_that_begin_at_once_share_one_ledger(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(4), context.Queue()
    racers = [context.Process(target=racer, args=(str(tmp_path), n, start, results)) for n in range(4)]
    for process in racers:
        process.start()
    others = [results.get(timeout=120) for _ in racers]
    for process in racers:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert others == [0, 0, 0, 0]
    assert spent(tmp_path) == [4]
    heads = json.loads((tmp_path / HEADS).read_text())
    assert list(heads.values()) == [Ledger(parts(tmp_path)["ledger"]).head()]


def test_data_are_hashed_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polyclinic.engines import site_ledger

    count = 0

    def counted(*given: Any) -> Any:
        nonlocal count
        count += 1
        return iter(["x" * 32])

    monkeypatch.setattr(site_ledger, "_members", counted)
    roles = {"train": TEN}
    for _ in range(3):
        members_of(b"k" * 32, roles)
    assert count == 1
    members_of(b"k" * 32, {"train": TEN})
    members_of(b"l" * 32, roles)
    assert count == 3
