"""Progress of a run in a pipe: one line per round, and ε rounded up."""

import io

from rich.console import Console

from polyclinic.cli.progress import Display
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.events import Event

WHOM = "per patient (add or remove one patient)"
STUDY = 'name = "small"\nrounds = 3\nseeds = [0]\n[data]\nuse = "lidc-nodules"\n[[methods]]\nname = "fedavg"\n'


def shown(*events: Event) -> list[str]:
    out = io.StringIO()
    with Display(Console(file=out, width=160, highlight=False), parse(STUDY)) as display:
        for event in events:
            display.show(event)
    return out.getvalue().splitlines()


def test_epsilon_is_a_bound_until_the_last_round_and_is_rounded_up() -> None:
    begun = Event("arm", "fedavg", rounds=3)
    rounds = [
        Event("round", "fedavg", round=r, rounds=3, scores={"a": 0.9}, epsilon=1.001 * r, protects=WHOM)
        for r in (1, 2, 3)
    ]
    lines = [line for line in shown(begun, *rounds) if "ε" in line]
    assert [line.split("ε")[1].strip() for line in lines] == [f"≤ 1.01 {WHOM}", f"≤ 2.01 {WHOM}", f"= 3.01 {WHOM}"]


def test_the_worst_site_and_a_lost_one_are_named() -> None:
    begun, lost = Event("arm", "fedavg", rounds=3), {"c": "no reply within 30 s"}
    last = Event("round", "fedavg", round=3, rounds=3, scores={"a": 0.9, "b": 0.7, "c": float("nan")}, lost=lost)
    text = "\n".join(shown(begun, last, Event("tested", "fedavg", round=3, rounds=3, scores={"a": 0.8, "b": 0.6})))
    assert "c did not contribute: no reply within 30 s" in text
    assert "auc 0.800  worst site b 0.700" in text
    assert "✓ fedavg" in text
    assert "test auc 0.700  worst site b 0.600" in text


def test_a_pipe_gets_one_line_per_round_and_quiet_none() -> None:
    rounds = [Event("round", "fedavg", round=r, rounds=3, scores={"a": 0.9}) for r in (1, 2, 3)]
    lines = [line for line in shown(Event("arm", "fedavg", rounds=3), *rounds) if "round" in line and "/3" in line]
    assert [line.split()[2] for line in lines] == ["1/3", "2/3", "3/3"]
    out = io.StringIO()
    with Display(Console(file=out, quiet=True), parse(STUDY)) as display:
        display.show(Event("arm", "fedavg", rounds=3))
        display.show(rounds[0])
    assert out.getvalue() == ""
