"""Studies between simulated machines and with simulated attackers: to the bit, within their time, and reported."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyclinic.core import serialization as states
from polyclinic.core.audit_log import verify
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.evaluation.run_comparison import panel, write_panel
from polyclinic.evaluation.run_evaluation import Options
from polyclinic.report import build_report
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.simulation_schema import attackers
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.deployment import NotElsewhere, method_runs
from polyclinic.studies.run.run_directory import read_tensors
from polyclinic.studies.run.scheduler import run
from tests.support.known import known
from tests.support.small_runs import npz

HEAD = """\
name = "simulated"
rounds = {rounds}
seeds = [0, 1]

[data]
path = "{path}"
kind = "npz"
sites = "site"

[task]
network = "mlp"
options = {{ width = 8, depth = 1 }}

[training]
batch_size = 8

[engine]
kind = "in-process"
"""
MACHINES = """
[machines]
seconds_per_batch = 1.0
minutes = {minutes}

[machines.sites.d]
seconds_per_batch = 10.0
drop_out = 0.2

[[methods]]
name = "fedavg"

[[methods]]
name = "fedbuff"
buffer = 2
"""
ATTACK = """
[attack]
name = "{attack}"
attackers = 1

[[methods]]
name = "local"

[[methods]]
name = "fedavg"

[[methods]]
name = "median"
"""


def study(folder: Any, rest: Any, rounds: Any = 3, **more: Any) -> Any:
    return HEAD.format(path=npz(folder), rounds=rounds) + rest.format(**more)


def done(folder: Any, text: Any) -> Any:
    return list(run(parse(text), text, folder))


def rounds(folder: Any, label: Any) -> Any:
    return [line for line in read_run(folder).rounds if line.method == label and line.seed == 0]


def test_an_arm_ends_when_its_time_is_up_and_nobody_waits_who_need_not(tmp_path: Path) -> None:
    text = study(tmp_path, MACHINES, rounds=50, minutes=3)  # 3 minibatches a round: 30 s at d, 3 s at others
    done(tmp_path / "run", text)
    waits, hurries = rounds(tmp_path / "run", "fedavg"), rounds(tmp_path / "run", "fedbuff")
    assert 6 <= len(waits) < 50
    assert len(hurries) == 50
    assert 150 <= sum(line.wall for line in waits) <= 180
    assert {name for line in waits for name in line.asked} == set("abcd") == {n for x in hurries for n in x.asked}
    assert max(len(line.asked) for line in hurries) == 2
    last = max(line.round for line in read_run(tmp_path / "run").curves if line.method == "fedavg")
    assert last == len(waits)  # the last round is judged, whenever time is up
    page = build_report(tmp_path / "run", options=Options()).read_text()
    assert "Simulated machines: time is virtual" in page


def test_the_last_round_is_judged_though_time_ran_out_between_two_evaluations(tmp_path: Path) -> None:
    text = study(tmp_path, MACHINES, rounds=50, minutes=2.6) + "\n[evaluation]\ninterval = 7\n"
    done(tmp_path / "run", text)
    judged = [s.round for s in read_run(tmp_path / "run").curves if (s.method, s.seed) == ("fedavg", 0)]
    assert sorted(set(judged)) == [len(rounds(tmp_path / "run", "fedavg"))]


@pytest.mark.parametrize("stop", [5, *(pytest.param(x, marks=pytest.mark.slow) for x in (2, 9))])
def test_interrupted_it_goes_on_to_the_same_bits_and_the_same_time(tmp_path: Path, stop: Any) -> None:
    text = study(tmp_path, MACHINES, rounds=6, minutes=2)
    done(tmp_path / "whole", text)
    events = run(parse(text), text, tmp_path / "cut")
    for _ in range(stop):
        next(events)
    events.close()
    list(run(parse(text), text, tmp_path / "cut", resume=True))
    for arm in ("fedavg-seed0", "fedbuff-seed0", "fedavg-seed1", "fedbuff-seed1"):
        ours, theirs = (
            read_tensors(tmp_path / which / "arms" / arm / "model.safetensors") for which in ("cut", "whole")
        )
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
        clocks = [
            states.load(tmp_path / which / "arms" / arm / "checkpoint.safetensors").clock for which in ("cut", "whole")
        ]
        assert clocks[0] == clocks[1]
    assert [r.wall for r in rounds(tmp_path / "cut", "fedavg")] == [
        r.wall for r in rounds(tmp_path / "whole", "fedavg")
    ]


def test_machines_that_always_fail_end_the_run_with_the_reason(tmp_path: Path) -> None:
    text = study(tmp_path, "[machines]\ndrop_out = 1.0\n\n[[methods]]\nname = 'fedavg'\n")
    with pytest.raises(RuntimeError, match=r"0 of 1 required replies\. a: dropped out; b: dropped out"):
        done(tmp_path / "run", text)


@pytest.mark.parametrize(
    "attack", ["label-flip", *(pytest.param(x, marks=pytest.mark.slow) for x in ("sign-flip", "ipm"))]
)
def test_an_attack_is_carried_out_named_and_told(tmp_path: Path, attack: Any) -> None:
    text = study(tmp_path, ATTACK, attack=attack)
    done(tmp_path / "run", text)
    read = read_run(tmp_path / "run")
    who = read.info.attack["by"]
    assert all(len(names) == 1 for names in who.values())
    hostile = {(s.seed, s.site) for s in read.standings if s.hostile}
    assert hostile == {(int(seed), names[0]) for seed, names in who.items()}
    assert {s.method for s in read.standings} == {"local", "fedavg", "median"}
    page = build_report(tmp_path / "run", options=Options()).read_text()
    assert "Simulated attack" in page
    assert f"Simulated attack: 1 of the sites attack ({attack})" in page
    assert (tmp_path / "run" / "report" / "tables" / "attack.csv").read_text().count("\n") == 4


def test_what_is_not_finite_is_refused_named_and_changes_no_bit_of_the_others(tmp_path: Path) -> None:
    text = study(tmp_path, ATTACK, attack="not-a-number").replace("attackers = 1", 'attackers = ["d"]')
    done(tmp_path / "run", text)
    named = {(s.method, s.site) for s in read_run(tmp_path / "run").standings if s.named}
    assert {site for method, site in named if method == "fedavg"} == {"d"}
    honest = text.replace('sites = "site"', 'sites = "site"\nexternal = ["d"]').partition("[attack]")
    honest = honest[0] + honest[2].partition("\n\n")[2]
    done(tmp_path / "honest", honest)
    a, b = (read_tensors(tmp_path / r / "arms" / "fedavg-seed0" / "model.safetensors") for r in ("run", "honest"))
    assert all(np.array_equal(a[name], b[name]) for name in b)


def test_a_model_that_an_attack_has_broken_is_tested_as_one_that_guesses(tmp_path: Path) -> None:
    text = study(tmp_path, ATTACK, rounds=6, attack="huge").replace("attackers = 1", "attackers = 1\nsize = 1e30")
    done(tmp_path / "run", text)
    kinds = [entry["event"] for entry in verify(tmp_path / "run" / "journal.jsonl")]
    assert "ended by the attack" in kinds
    page = build_report(tmp_path / "run", options=Options()).read_text()
    assert "diverged: its outputs are not finite for" in page
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    values = {m["label"]: m["macro"]["value"] for m in report["evaluation"]["methods"]}
    assert math.isclose(values["fedavg"], 0.5, abs_tol=0.05)
    assert values["median"] > 0.6


def test_a_panel_of_attacks_says_whom_alarms_name(tmp_path: Path) -> None:
    folders = []
    for attack in ("sign-flip", "huge"):
        done(tmp_path / attack, study(tmp_path, ATTACK, attack=attack))
        folders.append(tmp_path / attack)
    found = panel(folders, Options())
    assert found.named["huge", "fedavg"] == "0 of 2 attackers, 0 of 6 honest"  # no one looks, and it can be added up
    assert set(found.named) == {(run, m) for run in ("sign-flip", "huge") for m in ("local", "fedavg", "median")}
    assert "0 of 2 attackers, 0 of 6 honest" in write_panel(found, tmp_path).read_text()


def test_who_attacks_is_drawn_for_each_seed_and_never_among_the_spared(tmp_path: Path) -> None:
    spec = known(
        parse(study(tmp_path, ATTACK, attack="huge").replace("attackers = 1", 'attackers = 2\ntrusted = ["a"]')).attack
    )
    drawn = {attackers(spec, list("abcde"), seed) for seed in range(40)}
    assert len(drawn) == 6
    assert all("a" not in who and len(who) == 2 for who in drawn)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "huge"', 'name = "hug"', 'no attack is called "hug". Did you mean "huge"?'),
        ("attackers = 1", 'attackers = "a"', "must be how many sites attack, such as 2, or their names"),
        ("attackers = 1", "attackers = 0", "must be how many sites attack"),
        ("attackers = 1", "attackers = 1\nsise = 2", 'unknown key. Did you mean "size"?'),
        ("attackers = 1", 'attackers = ["x"]', "[attack] names x, which does not train here. There are a, b, c, d"),
        ("attackers = 1", "attackers = 4", "4 of 4 sites attack"),
        (
            'name = "median"',
            'name = "median"\nuplink = [{ name = "zstd" }]',
            "an attack changes the numbers that leave",
        ),
        (
            'name = "huge"',
            'name = "ipm"',
            "is asked after all others, alone: leave sites_per_round and min_replies out",
        ),
        ("[attack]", "[machines.sites.x]\nup = 1.0\n\n[attack]", "no such site. The sites are a, b, c, d"),
        ("[attack]", "[machines]\nup = 0\n\n[attack]", "must be more than 0"),
    ],
)
def test_what_cannot_be_is_told_at_its_line(tmp_path: Path, old: str, new: str, says: str) -> None:
    text = (
        study(tmp_path, ATTACK, attack="huge")
        .replace("rounds = 3", "rounds = 3\nsites_per_round = 2")
        .replace(old, new)
    )
    with pytest.raises(BadStudy) as error:
        done(tmp_path / "run", text)
    assert says in str(error.value)
    assert not (tmp_path / "run" / "arms").exists()


def test_between_hospitals_nothing_is_simulated(tmp_path: Path) -> None:
    for rest, says in ((ATTACK, "simulates an attack"), (MACHINES, "simulates machines")):
        text = study(tmp_path, rest, attack="huge", minutes=1)
        with pytest.raises(NotElsewhere, match=says):
            method_runs(parse(text), ["a", "b"])
