"""A privacy budget that is never under-counted: not by crashes, not by races, not by an editor."""

import fcntl
import json
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("dp_accounting", reason="needs polyclinic[privacy]")

from polyclinic.core import atomic, audit_log
from polyclinic.core.audit_log import Broken
from polyclinic.core.execution import Refused, execute
from polyclinic.core.method import Request
from polyclinic.core.pipeline import send_through
from polyclinic.core.site import Site
from polyclinic.engines.site_runtime import work
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import Evaluated
from polyclinic.learning.training.dp_sgd import DPSGD, Spend
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.privacy.accounting import epsilon
from polyclinic.privacy.budget_policy import Budget
from polyclinic.privacy.gaussian import Clip, Gaussian
from polyclinic.privacy.ledger import Exhausted, Ledger, locked
from tests.conftest import blobs

ONE = Spend(4.0, 1.0, 1, "patient")
SMALL: dict[str, Any] = {"site": "a", "data": "ward-7", "unit": "patient", "epsilon": 1.8, "delta": 1e-5}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(tmp_path / "budget.jsonl")
    made.begin(**SMALL)
    return made


def test_spends_add_up_until_the_budget_is_used_up(ledger: Ledger) -> None:
    assert ledger.spent().epsilon == 0
    said = [ledger.reserve([ONE], {"round": r}) for r in range(3)]
    assert said == sorted(said)
    assert ledger.spent().epsilon_rdp == said[-1] > ledger.spent().epsilon
    assert ledger.spent().epsilon < 1.8 < said[-1], "the quick bound does not refuse what fits"
    assert ledger.spent().spends == (ONE._replace(steps=3),)
    with pytest.raises(
        Exhausted, match=r"ε = 1.8 \(δ = 1e-05\) for every patient of ward-7 is used up: 1\.698 is spent"
    ):
        ledger.reserve([ONE])
    assert ledger.spent().epsilon_rdp == said[-1], "a refusal costs nothing"
    assert "for every patient" in str(ledger.spent())


def test_a_person_may_raise_the_budget_and_must_say_why(ledger: Ledger) -> None:
    head = ledger.head()
    ledger.raise_budget(9.0, "ethics board, minute 4 of 2026-11-02")
    assert ledger.budget()["epsilon"] == 9.0
    assert ledger.head() != head
    assert json.loads(ledger.path.read_text().splitlines()[-1])["reason"] == "ethics board, minute 4 of 2026-11-02"
    ledger.raise_budget(0.5, "lower is allowed, too")
    assert ledger.budget() == {**SMALL, "epsilon": 0.5}
    for wrong in ((9.0, " "), (0.0, "why not"), (math.inf, "why not"), (math.nan, "why not")):
        with pytest.raises(ValueError, match="above 0 and a reason"):
            ledger.raise_budget(*wrong)


def test_a_ledger_begins_once(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be reset"):
        ledger.begin(**SMALL)
    ledger.path.unlink()
    with pytest.raises(ValueError, match="cannot be reset"):
        ledger.begin(**SMALL)
    for wrong in (
        {"epsilon": 0},
        {"epsilon": math.inf},
        {"epsilon": math.nan},
        {"delta": 1},
        {"delta": 0},
        {"unit": "hospital"},
    ):
        with pytest.raises(ValueError, match="a budget has"):
            Ledger(tmp_path / "other").begin(**{**SMALL, **wrong})
    assert not Ledger(tmp_path / "other").begun
    Ledger(tmp_path / "other").begin(**{**SMALL, "epsilon": 0.5})
    assert Ledger(tmp_path / "other").budget() == {**SMALL, "epsilon": 0.5}


def test_a_crash_between_an_entry_and_its_head_loses_neither(ledger: Ledger) -> None:
    """The entry counts, the head is made up for, and the budget still cannot be reset."""
    head = ledger.path.with_name("budget.jsonl.head")
    head.unlink()
    assert ledger.begun
    with pytest.raises(ValueError, match="cannot be reset"):
        ledger.begin(**SMALL)
    for _ in range(2):  # the second time it reads what the first has made up for
        assert ledger.budget() == SMALL
        assert head.read_text().strip() == ledger.head()
    before = head.read_bytes()
    ledger.reserve([ONE])
    head.write_bytes(before)
    for _ in range(2):
        assert ledger.spends() == (ONE,)
        assert head.read_text().strip() == json.loads(ledger.path.read_text().splitlines()[-1])["hash"]


def test_a_head_that_is_two_entries_behind_is_no_crash(ledger: Ledger) -> None:
    head = ledger.path.with_name("budget.jsonl.head")
    before = head.read_bytes()
    for _ in range(2):
        ledger.reserve([ONE])
    head.write_bytes(before)
    with pytest.raises(Broken, match="do not agree"):
        ledger.spent()


def test_a_torn_last_entry_was_never_acknowledged_and_is_cut_off(ledger: Ledger) -> None:
    ledger.reserve([ONE])
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + b'{"seq":2,"event":"spe')
    assert ledger.spends() == (ONE,)
    assert ledger.path.read_bytes() == whole
    ledger.reserve([ONE])
    assert ledger.spends() == (ONE, ONE)


def test_only_one_process_at_a_time_and_only_its_owner_touches_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.lock"

    def free() -> bool:
        with path.open() as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    with locked(path):
        assert not free()
    assert free(), "and it lets go"
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ZeroDivisionError), locked(path):
        raise ZeroDivisionError
    assert free(), "after an error, too"


def test_every_use_of_a_ledger_waits_for_its_turn(ledger: Ledger) -> None:
    """A process that holds the lock of the ledger blocks all that read and write it."""
    head = ledger.head()
    uses: list[Callable[[], Any]] = [
        lambda: ledger.reserve([ONE]),
        lambda: ledger.check([ONE]),
        ledger.spent,
        ledger.spends,
        ledger.budget,
        ledger.head,
        lambda: ledger.knows(head),
        lambda: ledger.note_members({"members": 1}),
        ledger.members,
        lambda: ledger.raise_budget(9.0, "because"),
    ]
    with ThreadPoolExecutor(len(uses)) as threads:
        with locked(ledger.path.with_name("budget.jsonl.lock")):
            waiting = [threads.submit(use) for use in uses]
            done, _ = wait(waiting, timeout=0.2, return_when="FIRST_COMPLETED")
            assert not done
        assert len(wait(waiting, timeout=60).done) == len(uses)
    assert ledger.spends() == (ONE,)


def test_without_file_locks_there_is_no_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(OSError, match="needs file locks, which this system does not have"):
        Ledger(tmp_path / "budget.jsonl").begin(**SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("torn", [b"", b'{"seq":0,"event":"budget","si'])
def test_a_ledger_whose_beginning_was_torn_begins(tmp_path: Path, torn: bytes) -> None:
    ledger = Ledger(tmp_path / "budget.jsonl")
    ledger.path.write_bytes(torn)
    assert not ledger.begun
    ledger.begin(**SMALL)
    assert ledger.begun
    assert ledger.budget()["data"] == "ward-7"


def changed(ledger: Ledger, how: Callable[[list[bytes]], list[bytes]]) -> None:
    ledger.path.write_bytes(b"".join(how(ledger.path.read_bytes().splitlines(keepends=True))))


def cheaper(lines: list[bytes]) -> list[bytes]:
    return [line.replace(b'"multiplier":4.0', b'"multiplier":400.0') for line in lines]


HOW: list[Callable[[list[bytes]], list[bytes]]] = [
    cheaper,
    lambda lines: lines[:-1],
    lambda lines: lines[:1] + lines[2:],
    lambda lines: [lines[0], lines[2], lines[1]],
    lambda lines: [*lines[:-1], lines[-1][:-9]],
    lambda lines: [],
    lambda lines: [*lines, lines[-1]],
    lambda lines: [b"{}\n", *lines],
]


@pytest.mark.parametrize("how", HOW)
def test_a_ledger_that_was_changed_releases_nothing(ledger: Ledger, how: Any) -> None:
    for _ in range(2):
        ledger.reserve([ONE])
    changed(ledger, how)
    for use in (lambda: ledger.reserve([ONE]), ledger.spent, ledger.head, lambda: ledger.raise_budget(9.0, "because")):
        with pytest.raises(Broken):
            use()


def test_a_ledger_that_is_gone_releases_nothing(ledger: Ledger, tmp_path: Path) -> None:
    ledger.reserve([ONE])
    copy = ledger.path.read_bytes()
    ledger.path.unlink()
    with pytest.raises(Broken, match="is missing, although its head exists"):
        ledger.reserve([ONE])
    ledger.path.write_bytes(copy)
    (tmp_path / "budget.jsonl.head").unlink()
    with pytest.raises(Broken, match="do not agree"):
        ledger.reserve([ONE])
    with pytest.raises(Broken, match="create one with the budget"):
        Ledger(tmp_path / "new.jsonl").reserve([ONE])


def test_entries_of_other_journals_are_no_ledger(tmp_path: Path) -> None:
    other = audit_log.Journal(tmp_path / "j")
    other.write("asked", {})
    other.close()
    with pytest.raises(Broken, match="not a ledger: its first line sets no budget"):
        Ledger(tmp_path / "j").spent()


def forged(ledger: Ledger, event: str, details: dict[str, Any]) -> None:
    """One more entry, with hashes and head as they should be, as who can write here could make it."""
    made = audit_log.Journal(ledger.path)
    head = made.write(event, details)
    made.close()
    ledger.path.with_name("budget.jsonl.head").write_text(head + "\n")


@pytest.mark.parametrize(
    ("event", "details"),
    [
        ("budget", {**SMALL, "epsilon": 1e6}),
        ("refund", {}),
        ("spent", {"spends": []}),
        ("Spend", {"spends": []}),
        ("", {}),
    ],
)
def test_an_entry_of_no_known_kind_breaks_the_ledger(ledger: Ledger, event: str, details: dict[str, Any]) -> None:
    """A second budget among them: the first holds for ever, and is raised in the open."""
    forged(ledger, event, details)
    for use in (ledger.spent, ledger.budget, lambda: ledger.reserve([ONE]), lambda: ledger.note_members({})):
        with pytest.raises(Broken, match=f"{event!r} is not a valid ledger entry, or is out of order"):
            use()


def rounds_until_killed(ledger: Ledger, released: Path, deadly: int) -> None:
    """What a site does, round after round: pay, then release. Kills itself at the n-th step that touches the disk."""
    count = 0

    def deadly_at(step: Callable[..., Any], torn: bool = False) -> Callable[..., Any]:
        def counted(*given: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == deadly:
                if torn:
                    given[0].write(bytes(given[1])[: len(given[1]) // 2])  # half a line has reached the disk
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*given, **more)

        return counted

    class Torn:
        """A file whose writes can be cut in half."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> "Torn":
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.close()

        def write(self, data: bytes) -> Any:
            return deadly_at(lambda file, given: file.write(given), torn=True)(self.file, data)

    def opened(path: Any, mode: str = "r", *given: Any, **more: Any) -> Any:
        file = open(path, mode, *given, **more)  # noqa: SIM115
        return Torn(file) if mode in ("ab", "wb") else file

    os.fsync, os.replace = deadly_at(os.fsync), deadly_at(os.replace)
    audit_log.open = atomic.open = opened  # type: ignore[attr-defined]
    for _ in range(2):
        ledger.reserve([ONE])
        with released.open("a") as out:
            out.write(f"{count}\n")


def test_kill_9_at_any_step_never_under_counts(ledger: Ledger, tmp_path: Path) -> None:
    ledger.raise_budget(1e3, "for a test")
    released, context = tmp_path / "released", multiprocessing.get_context("fork")

    def run(deadly: int) -> int:
        """Runs until killed; how many replies have left by then, in all."""
        process = context.Process(target=rounds_until_killed, args=(ledger, released, deadly))
        process.start()
        process.join(timeout=120)
        assert process.exitcode == (-signal.SIGKILL if deadly else 0)
        return len(released.read_text().splitlines()) if released.exists() else 0

    assert run(0) == 2
    steps = int(released.read_text().split()[1])
    assert steps >= 10, "a write, a forced write and a rename, for entry and head, twice"
    counted = 2
    for deadly in range(1, steps + 1):
        before = len(released.read_text().splitlines())
        left = run(deadly) - before
        after = sum(spend.steps for spend in ledger.spent().spends)
        assert left <= after - counted <= left + 1, "what left is counted, and at most one that did not"
        assert left == (deadly > steps // 2)
        counted = after
    ledger.reserve([ONE])
    assert sum(spend.steps for spend in ledger.spent().spends) == counted + 1, "and the ledger works as before"


def racer(path: str, start: Any, results: Any) -> None:
    start.wait()
    try:
        Ledger(Path(path)).reserve([ONE])
        results.put(True)
    except Exhausted:
        results.put(False)


def test_two_jobs_that_race_for_the_last_budget_do_not_both_get_it(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.reserve([ONE])
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(4), context.Queue()
    racers = [context.Process(target=racer, args=(str(ledger.path), start, results)) for _ in range(4)]
    for process in racers:
        process.start()
    won = [results.get(timeout=60) for _ in racers]
    for process in racers:
        process.join(timeout=60)
    assert sorted(won) == [False, False, False, True]
    assert sum(spend.steps for spend in ledger.spent().spends) == 3


def test_nothing_of_the_data_is_written(ledger: Ledger) -> None:
    ledger.reserve([ONE], {"run": "r1", "round": 3})
    entry = json.loads(ledger.path.read_text().splitlines()[-1])
    assert set(entry) == {"seq", "event", "spends", "about", "previous", "hash"}
    assert entry["about"] == {"run": "r1", "round": 3}


def test_a_ledger_with_spends_of_several_units_counts_each_for_its_own(tmp_path: Path) -> None:
    """Spends stay as they were released; what they cost a patient is computed when they are read."""
    ledger = Ledger(tmp_path / "mixed.jsonl")
    ledger.begin(**{**SMALL, "epsilon": 50.0})
    patient, site = Spend(3.0, unit="patient"), Spend(4.0, share=7)
    ledger.reserve([patient])
    said = ledger.reserve([site])
    assert ledger.spends() == (patient, site)
    spent = ledger.spent()
    assert (spent.unit, spent.spends, spent.epsilon_rdp) == ("patient", tuple(sorted([patient, site])), said)
    assert spent.epsilon == pytest.approx(epsilon([Spend((3.0**-2 + 2.0**-2) ** -0.5)], SMALL["delta"]), abs=1e-3)
    assert "which is σ = 2 for a patient inside" in str(spent)
    assert "the noise of at least 7 sites" in str(spent)


@pytest.mark.parametrize(
    "wrong",
    [
        Spend(math.nan),
        Spend(math.inf),
        Spend(1e-9),
        Spend(1e30),
        Spend(-1.0),
        Spend(0.0),
        Spend(1.0, 0.0),
        Spend(1.0, 1.1),
        Spend(1.0, steps=0),
        Spend(1.0, steps=-4),
        Spend(0.0, pure=-1.0),
        Spend(0.0, pure=math.nan),
        Spend(1.0, share=0),
        Spend(1.0, unit="town"),  # type: ignore[arg-type]
    ],
)
def test_a_method_that_meters_nonsense_releases_nothing_and_leaves_no_mark(ledger: Ledger, wrong: Spend) -> None:
    before = ledger.path.read_bytes()
    for given in ([wrong], [ONE, wrong], [wrong, ONE]):
        with pytest.raises(Exhausted, match=r"cannot be accounted for, so nothing leaves: .* must be"):
            ledger.reserve(given)
        with pytest.raises(Exhausted, match="cannot be accounted for"):
            ledger.check(given)
    assert ledger.path.read_bytes() == before


@pytest.mark.parametrize("given", [[], [ONE], [ONE, Spend(4.0, unit="record")]])
def test_a_budget_for_sites_is_not_paid_from_by_what_protects_only_patients(tmp_path: Path, given: list[Spend]) -> None:
    ledger = Ledger(tmp_path / "site.jsonl")
    ledger.begin(**{**SMALL, "unit": "site"})
    for use in (ledger.reserve, ledger.check):
        with pytest.raises(Exhausted, match="this budget protects every site, which nothing in this release does"):
            use(given)
    assert ledger.spends() == ()


def test_a_budget_may_be_used_up_to_its_last_digit(tmp_path: Path) -> None:
    """What fits exactly is allowed, by the tight figure where the quick one is too large; and nothing above."""
    exact = epsilon([ONE, ONE], 1e-5)
    ledger = Ledger(tmp_path / "exact.jsonl")
    ledger.begin(**{**SMALL, "epsilon": exact})
    ledger.reserve([ONE, ONE])
    assert ledger.spent().epsilon == exact
    short = Ledger(tmp_path / "short.jsonl")
    short.begin(**{**SMALL, "epsilon": math.nextafter(exact, 0)})
    with pytest.raises(Exhausted, match="is used up"):
        short.reserve([ONE, ONE])
    assert short.spends() == ()


def test_a_refusal_says_what_spends_of_several_units_come_to_for_the_budgets(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "mixed.jsonl")
    ledger.begin(**{**SMALL, "epsilon": 3.0})
    patient, site = Spend(4.0, unit="patient"), Spend(6.0)
    ledger.reserve([patient])
    ledger.reserve([site])
    now, after = (
        f"{epsilon(spends, 1e-5, 'patient'):.3f}" for spends in ([patient, site], [patient, site, Spend(3.0)])
    )
    with pytest.raises(Exhausted, match=f"{now} is spent, and this would make it {after}. Nothing was released"):
        ledger.reserve([Spend(3.0)])
    assert ledger.spends() == (patient, site)


def test_a_check_spends_nothing(ledger: Ledger) -> None:
    before = ledger.path.read_bytes()
    ledger.check([ONE])
    with pytest.raises(Exhausted, match="is used up"):
        ledger.check([ONE] * 9)
    assert ledger.path.read_bytes() == before


def rewritten(ledger: Ledger, change: Callable[[dict[str, Any]], None]) -> None:
    """The ledger with its last entry changed and every hash made right again, as who can write here could."""
    entries = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    change(entries[-1])
    entries[-1].pop("hash")
    entries[-1]["hash"] = audit_log._hash(entries[-1])
    ledger.path.write_text("".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries))
    ledger.path.with_name("budget.jsonl.head").write_text(entries[-1]["hash"] + "\n")


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("unit", "record", "does not protect a patient"),
        ("multiplier", 0.0, "multiplier must be"),
        ("steps", -1, "steps must be"),
        ("color", 3, "unexpected keyword"),
    ],
)
def test_an_entry_that_is_no_spend_breaks_the_ledger(ledger: Ledger, field: str, value: Any, why: str) -> None:
    ledger.reserve([ONE])
    rewritten(ledger, lambda entry: entry["spends"][0].update({field: value}))
    with pytest.raises(Broken, match=f"cannot be accounted for: .*{why}"):
        ledger.spent()


def test_an_older_pair_of_files_is_noticed_by_who_kept_a_head(ledger: Ledger) -> None:
    """Both files agree, so nothing inside them tells; the head that a run or the site kept does."""
    head = ledger.path.with_name("budget.jsonl.head")
    old = ledger.path.read_bytes(), head.read_bytes()
    first = ledger.head()
    ledger.reserve([ONE])
    kept = ledger.head()
    assert ledger.knows(kept)
    assert ledger.knows(first), "an earlier one is still in it"
    ledger.path.write_bytes(old[0])
    head.write_bytes(old[1])
    assert ledger.spent().epsilon == 0
    assert not ledger.knows(kept)
    assert ledger.knows(first)
    assert not ledger.knows("")


def test_members_are_bound_to_the_chain(ledger: Ledger) -> None:
    assert ledger.members() is None
    ledger.note_members({"members": 3, "size": 99})
    ledger.note_members({"members": 4, "size": 132})
    ledger.reserve([ONE])
    found = ledger.members()
    assert found is not None
    assert (found["members"], found["size"]) == (4, 132)
    assert ledger.spends() == (ONE,)


class Ward:
    """Eight patients."""

    def __init__(self) -> None:
        rows = blobs(1, 8, (1, 8, 8))
        self.x, self.y, self.patients = rows.x, rows.y, tuple(f"p{i}" for i in range(8))

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index]


TASK = Classification(Network("cnn", (1, 8, 8), 2, (("width", 2), ("depth", 2), ("norm", "group"))))


def test_a_site_releases_only_what_it_paid_for(ledger: Ledger) -> None:
    site, policy = Site("a", {"train": Ward()}), Budget(ledger)
    private = FedAvg(TASK, DPSGD(noise=4.0, batch_size=8, steps=1))
    request = private.request(private.init(TASK.first()))
    for round in range(3):
        reply, _ = execute(private, replace(request, round=round), {}, site, policy)
        assert reply.parts
    assert sum(spend.steps for spend in ledger.spent().spends) == 3
    done = work(private, request, {"kept": {}}, site, policy)
    assert done.reply is None
    assert "refused: budget.jsonl: the budget of ε = 1.8" in done.lost
    assert done.memory == {"kept": {}}
    with pytest.raises(Refused, match="added none: train with DPSGD, or send the method through Clip and Gaussian"):
        execute(FedAvg(TASK, LocalTraining()), request, {}, site, policy)
    ledger.path.write_text("")
    with pytest.raises(Refused, match="do not agree"):
        execute(private, request, {}, site, policy)


def test_site_level_noise_is_paid_from_a_budget_for_sites(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "site.jsonl")
    ledger.begin(**{**SMALL, "unit": "site"})
    method = send_through(FedAvg(TASK, LocalTraining(epochs=1), uniform=True), Clip(1.0), Gaussian(4.0))
    request = method.request(method.init(TASK.first()))
    assert request is not None
    execute(method, request, {}, Site("a", {"train": Ward()}), Budget(ledger))
    assert ledger.spent().spends == (Spend(4.0),)
    patients = FedAvg(TASK, DPSGD(noise=4.0, batch_size=8, steps=1))
    with pytest.raises(Refused, match="this budget protects every site, which nothing in this release does"):
        execute(patients, ask_of(patients), {}, Site("a", {"train": Ward()}), Budget(ledger))


def ask_of(method: FedAvg) -> Request:
    return method.request(method.init(TASK.first()))


def test_scores_are_free_unless_the_site_says_no(ledger: Ledger) -> None:
    score = Request(0, {"params": TASK.first()}, job="score/val")
    site, method = Site("a", {"train": Ward(), "val": Ward()}), Evaluated(FedAvg(TASK, LocalTraining()), TASK)
    reply, _ = execute(method, score, {}, site, Budget(ledger))
    assert set(reply.parts) == {"score"}
    with pytest.raises(Refused, match="the job 'score/val' added none"):
        execute(method, score, {}, site, Budget(ledger, free=()))


def test_another_file_is_no_ledger_and_stays_as_it_is(tmp_path: Path) -> None:
    """Reading a ledger cuts a torn last line off; of any other file nothing may be cut."""
    for text in (
        "rounds = 3\nseeds = [0]",
        '{"event":"begun","seq":0}\n{"torn',
        '{"score": 0.9}',
        "notes",
        "{}",
        '{"seq":0,"event":"asked"',
        '{"x":"' + 2**16 * "x" + '"}\n{"torn',
        '{"note":"\\"event\\":\\"budget\\"","event":"budget"}\nlast',
    ):
        file = tmp_path / "study.toml"
        file.write_text(text)
        with pytest.raises(Broken, match="this is not a ledger: its first line sets no budget"):
            Ledger(file).budget()
        with pytest.raises(ValueError, match="another file exists in the place of the ledger"):
            Ledger(file).begin(**SMALL)
        assert file.read_text() == text
