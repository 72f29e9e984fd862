"""One rule for the best round: its law, and that both engines follow it although a site is absent in some rounds."""

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyclinic.core.audit_log import verify
from polyclinic.engines.best_round import BestRound
from polyclinic.learning.tasks.task_evaluation import evaluate as real
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.scheduler import run
from tests.support.local_deployment import LocalCarrier, approve, coordinator, hospital, order
from tests.support.small_runs import npz

Scores = Mapping[str, float]
SCORES = st.lists(st.dictionaries(st.sampled_from("abc"), st.floats(-1, 1)), max_size=6)


def best_of(rounds: Sequence[Scores], higher: bool = True) -> BestRound:
    best = BestRound(higher)
    for i, scores in enumerate(rounds, 1):
        best = best.after(i, scores)
    return best


@given(SCORES, st.booleans())
def test_the_best_round_has_the_best_mean_of_latest_scores(rounds: list[Scores], higher: bool) -> None:
    latest: dict[str, float] = {}
    means = []
    for scores in rounds:
        latest |= scores
        means.append(sum(latest[s] for s in sorted(latest)) / len(latest) if latest else None)
    known = [mean for mean in means if mean is not None]
    best = best_of(rounds, higher)
    assert dict(best.scores) == latest
    assert best.round == (1 + means.index((max if higher else min)(known)) if known else 0)
    assert not known or best.score == means[best.round - 1]


def test_absence_neither_improves_nor_worsens_a_round() -> None:
    assert best_of([{"a": 0.9, "b": 0.3}, {"a": 0.8}]).round == 1
    assert best_of([{"a": 0.9, "b": 0.3}, {"b": 0.4}, {}]).round == 2
    assert best_of([{"a": 0.1, "b": 0.7}, {"a": 0.2}], higher=False).round == 1
    assert best_of([{"a": 0.5}, {"a": 0.5}]).round == 1, "the earlier of two equal rounds"
    assert best_of([{}, {"a": 0.5}]).round == 2


# The last site is absent from the second round on; among the others each of these rounds is better than the first.
SCRIPT = [(0.90, 0.90, 0.30), (0.95, 0.92, None), (0.80, 0.80, None)]
WORSE = [(0.90, 0.90, 0.30), (0.80, 0.80, None), (0.85, 0.85, None)]


def scripted(sites: Sequence[str], script: Any) -> Callable[..., Any]:
    """``evaluate`` with validation scores by round from ``script``."""

    def evaluate(method: Any, federation: Any, state: Any, asked: Sequence[str], job: str = "score/val") -> Any:
        if job != "score/val":
            return real(method, federation, state, asked, job)
        by_site = dict(
            zip(sites, script[method.request(state).round - 1 if method.request(state) else -1], strict=True)
        )
        return {
            site: {"auc": torch.tensor(score, dtype=torch.float64), "n": torch.tensor(4.0)}
            for site, score in by_site.items()
            if score is not None
        }

    return evaluate


def opened_round(journal: Path) -> int:
    return next(int(entry["round"]) for entry in verify(journal) if entry["event"] == "test opened")


STUDY = """\
name = "absent"
rounds = 3

[data]
path = "{path}"
kind = "npz"
sites = "site"

[task]
options = {{ width = 4, depth = 2 }}

[engine]
kind = "in-process"

[[methods]]
name = "fedavg"
"""


@pytest.mark.parametrize(("script", "expected"), [(SCRIPT, 2), (WORSE, 1)], ids=["better", "worse"])
@pytest.mark.parametrize("stopped", [0, 2])
def test_in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Any, expected: int, stopped: int) -> None:
    path = npz(tmp_path)
    text = STUDY.format(path=path)
    four = [(a, a, b, c) for a, b, c in script]
    monkeypatch.setattr("polyclinic.studies.run.method_run.evaluate", scripted("abcd", four))
    events = run(parse(text), text, tmp_path / "run")
    assert isinstance(events, Generator)
    for event in events:
        if stopped and (event.what, event.round) == ("round", stopped):
            events.close()
    if stopped:
        list(run(parse(text), text, tmp_path / "run", resume=True))
    assert opened_round(tmp_path / "run" / "journal.jsonl") == expected
    lines = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines if line["kind"] == "scores" and line["site"] == "d"] == [1]


@pytest.mark.parametrize(("script", "expected"), [(SCRIPT, 2), (WORSE, 1)], ids=["better", "worse"])
def test_over_flare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Any, expected: int) -> None:
    best = {"metric": "auc", "higher": True}
    homes, an = hospital(tmp_path), order(rounds=3, score_every=1, best=best, test="score/test")
    for home in homes.values():
        approve(home, an)
    monkeypatch.setattr("polyclinic.engines.flare.server.run_coordinator.evaluate", scripted(tuple(homes), script))
    carrier = LocalCarrier(homes, an)
    assert coordinator(tmp_path, an, carrier).run() == "finished"
    carrier.close()
    assert opened_round(tmp_path / "server" / an.run / "journal.jsonl") == expected
