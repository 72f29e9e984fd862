"""A privacy budget belongs to data, wherever they lie and whatever they are called."""

import hashlib
import json
import multiprocessing
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("dp_accounting", reason="needs polyclinic[privacy]")

from polyclinic.core.audit_log import Broken
from polyclinic.data.examples import Examples
from polyclinic.engines.policy.site_ledger import HEADS, KEY, LIST, SiteLedger, ledger_for, members_of
from polyclinic.engines.policy.site_policy import BadPolicy, Privacy
from polyclinic.learning.training.dp_sgd import Spend
from polyclinic.privacy.ledger import Exhausted, Ledger, locked

BUDGET = Privacy(epsilon=5.0, delta=1e-3)
ONE = Spend(2.0, unit="patient")


def ward(patients: range, seed: int = 0, prefix: str = "p", label: int = 0) -> Examples:
    """Two images of each patient; the images of a patient are the same in every ward of a seed."""
    images = torch.cat(
        [torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1000 * seed + p)) for p in patients]
    )
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
}


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
    """Another study may train on the patients that this one tests on."""
    roles = {"train": ward(range(5)), "test": ward(range(5, 10))}
    ledger_for(tmp_path / "ledgers", "ward", roles, "lyon", BUDGET).reserve([ONE])
    opened(tmp_path, ward(range(9, 10)), "another").reserve([ONE])
    assert spent(tmp_path) == [2]


def test_who_was_added_is_known_from_then_on(tmp_path: Path) -> None:
    opened(tmp_path, TEN)
    opened(tmp_path, ward(range(9, 20)))
    opened(tmp_path, ward(range(19, 20), prefix="q"), "another").reserve([ONE])
    assert spent(tmp_path) == [1]


AFFORDED = 8  # times ``ONE`` is paid for by the budget; nine times would be ε = 5.2


def test_data_of_two_ledgers_are_paid_for_from_both_or_not_at_all(tmp_path: Path) -> None:
    first, second = opened(tmp_path, TEN, "one"), opened(tmp_path, ward(range(20, 30)), "two")
    first.reserve([ONE])
    both = opened(tmp_path, ward(range(9, 21)), "three")
    assert {both.path, *(other.path for other in both.others)} == {first.path, second.path}
    said = both.reserve([ONE])
    assert spent(tmp_path) == [1, 2]
    assert said == Ledger(first.path).spent().epsilon_rdp > Ledger(second.path).spent().epsilon_rdp
    (last,) = both.others
    last.reserve([ONE._replace(steps=AFFORDED - len(last.spends()))])  # all of it, and enough is left in the first
    Ledger(both.path).check([ONE])
    before = spent(tmp_path)
    with pytest.raises(Exhausted, match="is used up"):
        both.reserve([ONE])
    assert spent(tmp_path) == before, "neither paid"


def test_all_ledgers_of_the_data_pay_what_is_asked_for_and_note_what_it_is_for(tmp_path: Path) -> None:
    opened(tmp_path, TEN, "one")
    opened(tmp_path, ward(range(20, 30)), "two")
    both = opened(tmp_path, ward(range(9, 21)), "three")
    said = both.reserve(iter([ONE, ONE._replace(steps=2)]), {"run": "r-7", "round": 3})
    paid = {ledger.path: ledger.spends() for ledger in (Ledger(both.path), *both.others)}
    assert len(paid) == 2
    assert set(paid.values()) == {(ONE, ONE._replace(steps=2))}
    assert said == Ledger(both.path).spent().epsilon_rdp
    for path in paid:
        last = json.loads(path.read_text().splitlines()[-1])
        assert last["about"] == {"run": "r-7", "round": 3}
    heads = json.loads((tmp_path / HEADS).read_text())
    assert heads == {path.name: Ledger(path).head() for path in paid}


def test_an_older_copy_of_any_of_the_ledgers_stops_a_payment(tmp_path: Path) -> None:
    opened(tmp_path, TEN, "one")
    opened(tmp_path, ward(range(20, 30)), "two")
    both = opened(tmp_path, ward(range(9, 21)), "three")
    (other,) = both.others
    parts = [other.path.with_name(other.path.name + end) for end in ("", ".head")]
    kept = [path.read_bytes() for path in parts]
    both.reserve([ONE])
    for path, content in zip(parts, kept, strict=True):
        path.write_bytes(content)
    with pytest.raises(
        Broken,
        match=f"{other.path.name}: this is an older copy or another ledger: it does not contain its last head [0-9a-f]{{16}},",
    ):
        both.reserve([ONE])
    assert len(Ledger(both.path).spends()) == 1, "neither paid"
    for path in parts:
        path.unlink()
    with pytest.raises(Broken, match=f"{other.path.name}: the ledger is missing, although {HEADS} lists it"):
        both.reserve([ONE])
    assert len(Ledger(both.path).spends()) == 1, "neither paid"


def pays(ledger: SiteLedger, go: Any, began: Any) -> None:
    go.wait(60)
    began.set()
    ledger.reserve([ONE])


def test_a_payment_waits_while_another_process_pays(tmp_path: Path) -> None:
    """Two releases at once could each find room for one."""
    ledger, context = opened(tmp_path, TEN), multiprocessing.get_context("fork")
    go, began = context.Event(), context.Event()
    process = context.Process(target=pays, args=(ledger, go, began))
    process.start()
    with locked(tmp_path / f"{HEADS}.lock"):
        go.set()
        assert began.wait(30)
        process.join(timeout=0.3)
        assert process.is_alive()
        assert ledger.spends() == ()
    process.join(timeout=30)
    assert process.exitcode == 0
    assert ledger.spends() == (ONE,)


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
    """Names and images are hashed with a key of the site's own, so names cannot be tried out."""
    for home in (tmp_path / "a", tmp_path / "b"):
        home.mkdir()
        opened(home, TEN)
    lists = [next((home / "ledgers").glob(f"*{LIST}")) for home in (tmp_path / "a", tmp_path / "b")]
    seen = [set(path.read_text().split()) for path in lists]
    assert len(seen[0]) == len(seen[1]) == 10 + 20
    assert not seen[0] & seen[1]
    assert "p3" not in "".join(
        path.read_text(errors="replace") for path in (tmp_path / "a").rglob("*") if path.is_file() and path.name != KEY
    )
    for path in (lists[0], tmp_path / "a" / "ledgers" / KEY):
        assert path.stat().st_mode & 0o077 == 0
    assert members_of(b"1" * 32, {"train": TEN}) != members_of(b"2" * 32, {"train": TEN})


def parts(home: Path) -> dict[str, Path]:
    (ledger,) = (home / "ledgers").glob("*.jsonl")
    beside = {"head": ".head", "list": LIST}
    found = {name: ledger.with_name(ledger.name + end) for name, end in beside.items()}
    return {"ledger": ledger, "key": home / "ledgers" / KEY, "heads": home / HEADS, **found}


def remove(paths: dict[str, Path], *names: str) -> None:
    for name in names:
        paths[name].unlink()


TAMPERED: dict[str, tuple[Callable[[dict[str, Path]], Any], str]] = {
    "ledger deleted": (lambda p: p["ledger"].unlink(), "missing"),
    "ledger and head deleted": (lambda p: remove(p, "ledger", "head"), "missing"),
    "all of a ledger deleted": (
        lambda p: remove(p, "ledger", "head", "list"),
        "is missing, although .* lists it",
    ),
    "and the heads too": (lambda p: remove(p, "ledger", "head", "heads"), "missing"),
    "head deleted": (lambda p: p["head"].unlink(), "do not agree"),
    "list deleted": (lambda p: p["list"].unlink(), "list of the data .* changed or truncated"),
    "list emptied": (lambda p: p["list"].write_bytes(b""), "list of the data .* changed or truncated"),
    "list edited": (lambda p: p["list"].write_bytes(b"z" + p["list"].read_bytes()[1:]), "list of the data"),
    "list cut": (lambda p: p["list"].write_bytes(p["list"].read_bytes()[:-33]), "list of the data"),
    "key deleted": (lambda p: p["key"].unlink(), "not the key"),
    "key replaced": (lambda p: p["key"].write_bytes(bytes(32)), "not the key"),
    "heads garbled": (lambda p: p["heads"].write_bytes(b"[1"), "not a list of ledger heads"),
    "heads of another kind": (lambda p: p["heads"].write_bytes(b"[1]"), "not a list of ledger heads"),
}


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
    for use in (
        lambda: opened(tmp_path, TEN),
        lambda: opened(tmp_path, ward(range(50, 60)), "x"),
        lambda: ledger.reserve([ONE]),
    ):
        with pytest.raises(Broken, match="an older copy or another ledger"):
            use()
    assert spent(tmp_path) == [1]


def test_a_crash_between_list_and_chain_loses_nobody(tmp_path: Path) -> None:
    """The list is on the disk first: what it holds beyond the chain counts, and a torn line is cut off."""
    opened(tmp_path, TEN)
    whole, path = (
        members_of(parts(tmp_path)["key"].read_bytes(), {"train": ward(range(10, 11))}),
        parts(tmp_path)["list"],
    )
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
    from polyclinic.engines.policy import site_ledger

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


def keyed(key: bytes, *parts: bytes) -> str:
    """A hash as lists hold it: BLAKE2b with a key over each part behind its length."""
    return hashlib.blake2b(
        b"".join(len(part).to_bytes(8, "little") + part for part in parts), key=key, digest_size=16
    ).hexdigest()


def test_hashes_are_those_of_lists_that_were_written_before() -> None:
    """Were they computed in another way, all data would be new, with a budget of their own."""
    key, data = bytes(range(32)), ward(range(2), prefix="ü")
    images = {keyed(key, b"inputs", b"torch.float32(1, 4, 4)", image.numpy().tobytes()) for image in data.inputs}
    assert members_of(key, {"train": data}) == images | {keyed(key, b"patient", name.encode()) for name in ("ü0", "ü1")}


def unnamed(images: torch.Tensor) -> Examples:
    count = tuple(map(str, range(len(images))))
    return Examples(images, torch.zeros(len(images), dtype=torch.int64), count, count)


def test_images_of_another_shape_or_type_are_other_data() -> None:
    key, image = b"k" * 32, torch.arange(16.0).reshape(1, 1, 4, 4)
    forms = [image, image.reshape(1, 1, 2, 8), image.view(torch.uint8).reshape(1, 1, 8, 8), image + 1]
    assert len(frozenset().union(*(members_of(key, {"train": unnamed(form)}) for form in forms))) == 4
    strided = image.transpose(2, 3).contiguous().transpose(2, 3)
    assert members_of(key, {"train": unnamed(strided)}) == members_of(key, {"train": unnamed(image)})


def test_one_pixel_that_differs_makes_an_image_someones() -> None:
    images = torch.zeros(2, 1, 4, 4)
    assert members_of(b"k" * 32, {"train": unnamed(images)}) == frozenset()
    images[1, 0, 3, 3] = 1.0
    assert len(members_of(b"k" * 32, {"train": unnamed(images)})) == 1


def test_data_of_nobody_have_the_budget_of_their_name(tmp_path: Path) -> None:
    """Rows without patients or inputs are known by what the site calls them, and only by that."""
    empty: dict[str, Any] = {"train": []}
    ledger_for(tmp_path / "ledgers", "ward", empty, "lyon", BUDGET).reserve([ONE])
    ledger_for(tmp_path / "ledgers", "ward", empty, "lyon", BUDGET).reserve([ONE])
    ledger_for(tmp_path / "ledgers", "another", empty, "lyon", BUDGET).reserve([ONE])
    assert spent(tmp_path) == [1, 2]


def test_the_folder_its_key_and_its_lists_are_the_users_alone(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "ledgers"
    (tmp_path / "old").mkdir(mode=0o777)
    for place in (folder, tmp_path / "old"):
        ledger_for(place, "ward", {"train": TEN}, "lyon", BUDGET)
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        assert stat.S_IMODE((place / KEY).stat().st_mode) == 0o600
        (members,) = place.glob(f"*{LIST}")
        assert stat.S_IMODE(members.stat().st_mode) == 0o600
        assert len((place / KEY).read_bytes()) == 32


def test_a_list_is_bound_to_its_chain_by_size_hash_and_key(tmp_path: Path) -> None:
    ledger, key = opened(tmp_path, TEN), parts(tmp_path)["key"].read_bytes()
    written = parts(tmp_path)["list"].read_bytes()
    assert written == "".join(f"{member}\n" for member in sorted(members_of(key, {"train": TEN}))).encode()
    said = ledger.members()
    assert said is not None
    facts = {
        "members": 30,
        "size": 30 * 33,
        "sha256": hashlib.sha256(written).hexdigest(),
        "check": keyed(key, b"check"),
    }
    assert {name: said[name] for name in facts} == facts


@pytest.mark.parametrize("left", [b"", b"x" * 31, b"x" * 33])
def test_a_key_of_another_length_is_not_used(tmp_path: Path, left: bytes) -> None:
    opened(tmp_path, TEN)
    parts(tmp_path)["key"].write_bytes(left)
    with pytest.raises(Broken, match=f"{KEY}: this is not the key .* Restore it from a copy"):
        opened(tmp_path, TEN)
    assert parts(tmp_path)["key"].read_bytes() == left


@pytest.mark.parametrize(("left", "fits"), [(b"", True), (b"x" * 31, False), (b"x" * 32, True)])
def test_a_key_without_lists_is_used_if_it_is_one(tmp_path: Path, left: bytes, fits: bool) -> None:
    """An empty one is of a crash before it was written."""
    (tmp_path / "ledgers").mkdir()
    path = tmp_path / "ledgers" / KEY
    path.write_bytes(left)
    if fits:
        opened(tmp_path, TEN)
        assert len(path.read_bytes()) == 32
        assert not left or path.read_bytes() == left
    else:
        with pytest.raises(Broken, match="not the key"):
            opened(tmp_path, TEN)


@pytest.mark.parametrize("torn", [b"abc", b"\xff\xfe", b"z" * 32])
def test_a_torn_line_of_a_list_counts_nobody_and_is_replaced(tmp_path: Path, torn: bytes) -> None:
    opened(tmp_path, TEN)
    path = parts(tmp_path)["list"]
    before = path.read_bytes()
    path.write_bytes(before + torn)
    opened(tmp_path, TEN)
    assert path.read_bytes() == before
    path.write_bytes(before + torn)
    opened(tmp_path, ward(range(10, 11)))
    lines = path.read_bytes().splitlines(keepends=True)
    assert [len(line) for line in lines] == [33] * 33
    assert path.read_bytes().startswith(before)


def test_a_list_is_on_the_disk_before_the_chain_speaks_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power failure could leave a chain that no list fits, and nothing could be released any more."""
    forced, fsync, said = set[int](), os.fsync, Ledger.note_members

    def noted(handle: int) -> None:
        forced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def bound(ledger: Ledger, details: Any) -> None:
        path = ledger.path.with_name(ledger.path.name + LIST)
        assert path.stat().st_ino in forced
        assert path.stat().st_size == details["size"]
        said(ledger, details)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Ledger, "note_members", bound)
    opened(tmp_path, TEN)


def test_a_policy_that_says_the_same_changes_no_budget(tmp_path: Path) -> None:
    ledger = opened(tmp_path, TEN)
    before = ledger.path.read_bytes()
    opened(tmp_path, TEN)
    assert ledger.path.read_bytes() == before
    opened(tmp_path, TEN, privacy=Privacy(epsilon=4.0, delta=1e-3))
    assert ledger.budget()["epsilon"] == 4.0, "less is set, too"
    assert json.loads(ledger.path.read_text().splitlines()[-1])["reason"] == "policy.toml says so"


def test_an_older_copy_of_another_ledger_of_the_site_stops_everything(tmp_path: Path) -> None:
    """Someone who put one back may have put back others; and a ledger that is gone may count these data, too."""
    opened(tmp_path, TEN)
    other = opened(tmp_path, ward(range(50, 60), seed=3), "other")
    kept = {path: path.read_bytes() for path in other.path.parent.glob(f"{other.path.name}*")}
    other.reserve([ONE])
    for path, content in kept.items():
        path.write_bytes(content)
    with pytest.raises(Broken, match=f"{other.path.name}: this is an older copy"):
        opened(tmp_path, TEN)
    for path in kept:
        path.unlink()
    with pytest.raises(Broken, match=f"{other.path.name}: the ledger is missing"):
        opened(tmp_path, TEN)
