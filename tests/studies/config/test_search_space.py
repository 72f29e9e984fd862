"""A search: the same number of trials for every method, on validation data, chosen values that a person may change."""

import json
from pathlib import Path
from typing import Any

import pytest

from polyclinic.core.audit_log import verify
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.learning.tasks.task_evaluation import Evaluated
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.search_space import NotChosen, SearchSpec, read_chosen, read_trials
from polyclinic.studies.config.study_config import parse, with_values
from polyclinic.studies.run.run_directory import read_plan
from polyclinic.studies.run.scheduler import run
from tests.support.known import known
from tests.support.small_runs import facts, same

TEXT = """\
name = "search"
rounds = 2
folds = 2

[data]
kind = "roi-phantom"
sites = "site"
subjects = 24
regions = 6

[task]
network = "mlp"
options = { width = 4, depth = 1 }

[search]
trials = 2
rounds = 1
[search.space]
training.lr = [0.01, 0.3]
[search.methods.fedprox]
mu = { low = 0.001, high = 1.0, log = true }

[engine]
kind = "in-process"

[[methods]]
name = "pooled"

[[methods]]
name = "fedprox"
"""

REFUSED = {
    "budgets that differ": ("trials = 2", "trials = 3", "pooled has 2 settings to try: every method gets the same"),
    "an unknown label": ("methods.fedprox]", "methods.fedproxx]", "no method of this study is called so"),
    "a value out of range": ("[0.01, 0.3]", "[-1.0, 0.3]", "cannot use -1.0"),
    "an unknown key": ("mu =", "mew =", "fedprox cannot use"),
    "a key of one method for all": ("training.lr = [", "mu = [", "only training.… is allowed here"),
    "a learning rate of no kind": ("[0.01, 0.3]", '[0.01, "fast"]', "must be a number"),
    "an empty range": ("low = 0.001, high = 1.0", "low = 2.0, high = 1.0", "low must be below high"),
    "one value that is no list": ("[0.01, 0.3]", "0.01", "must be a list of values"),
    "one trial": ("trials = 2", "trials = 1", "at least 2"),
    "a search on test data": ("rounds = 1\n", 'rounds = 1\nrole = "test"\n', "unknown key"),
    "a privacy budget": ("[engine]", "[privacy]\nepsilon = 1.0\ndelta = 1e-5\n[engine]", "trials spend privacy too"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_told_in_words(name: str) -> None:
    old, new, words = REFUSED[name]
    with pytest.raises(BadStudy) as caught:
        parse(TEXT.replace(old, new, 1))
    assert words in str(caught.value)


def test_settings_are_the_same_number_drawn_without_repeats_and_alike_every_time() -> None:
    spec = SearchSpec.model_validate(
        {"trials": 5, "space": {"training": {"lr": [1, 2, 3]}}, "methods": {"a": {"x": [1, 2, 3, 4]}}}
    )
    for seed in range(5):
        found = spec.settings("a", seed)
        assert len(found) == 5
        assert len({json.dumps(s) for s in found}) == 5
        assert found == spec.settings("a", seed)
        assert all(set(s) == {"training.lr", "x"} for s in found)
    assert len(spec.settings("b", 0)) == 3
    ranges = SearchSpec.model_validate({"trials": 50, "space": {"y": {"low": 0.001, "high": 1.0, "log": True}}})
    values = [s["y"] for s in ranges.settings("a", 0)]
    assert all(0.001 <= v <= 1 for v in values)
    assert sum(v < 0.0316 for v in values) in range(12, 39)  # half below the geometric middle


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a search; while trials run, no site is asked about test data."""
    path, asked = tmp_path_factory.mktemp("search") / "run", []
    real = Evaluated.site_update

    def watched(self: Any, request: Any, memory: Any, site: Any) -> Any:
        if request.job.endswith("/test"):
            asked.append(sorted(p.name for p in path.rglob("trials")))
        assert "test" not in site.data or not list(path.glob("arms/*/trials"))
        return real(self, request, memory, site)

    Evaluated.site_update = watched  # type: ignore[method-assign]
    try:
        list(run(parse(TEXT), TEXT, path))
    finally:
        Evaluated.site_update = real  # type: ignore[method-assign]
    assert asked
    assert not any(asked)
    return path


def test_every_method_and_split_gets_its_trials_and_trains_with_the_best(done: Path) -> None:
    read = read_run(done)
    each = {(t.method, t.fold) for t in read.trials}
    assert each == {(m, f) for m in ("pooled", "fedprox") for f in (0, 1)}
    for method, fold in each:
        trials = [t for t in read.trials if (t.method, t.fold) == (method, fold)]
        assert [t.rounds for t in trials] == [1, 1]
        assert [t.values for t in trials] == known(parse(TEXT).search).settings(method, 0, fold)
        (chosen,) = [c for c in read.chosen if (c.method, c.fold) == (method, fold)]
        assert chosen.by == "search"
        assert chosen.values == max(trials, key=lambda t: t.score or 0).values
        arm = done / "arms" / f"{method}-seed0-fold{fold}"
        assert read_chosen(arm / "chosen.toml") == chosen.values
        assert [t["values"] for t in read_trials(arm / "search.jsonl")] == [t.values for t in trials]
    opened = [e for e in verify(done / "journal.jsonl") if e["event"] == "test opened"]
    assert len(opened) == 4
    assert not any("trial" in e for e in opened)


def test_a_search_stopped_anywhere_goes_on_to_the_same_bits(done: Path, tmp_path: Path) -> None:
    for stop_after in (2, 4, 9):
        path = tmp_path / str(stop_after)
        events = run(parse(TEXT), TEXT, path)
        for _ in range(stop_after):
            next(events)
        events.close()
        list(run(parse(TEXT), TEXT, path, resume=True))
        for one in (done, path):
            for fact in facts(one):
                fact.pop("seconds", None)
        assert same(done, path), stop_after


def test_a_person_may_change_what_was_chosen_but_not_once_it_trains(tmp_path: Path) -> None:
    path, study = tmp_path / "run", parse(TEXT)
    events = run(study, TEXT, path)
    while next(events).what != "arm":  # the search of the first arm is over, and it begins
        pass
    events.close()
    file = path / "arms" / "pooled-seed0-fold0" / "chosen.toml"
    other = {"training.lr": 0.123}
    file.write_text('[chosen]\n"training.lr" = 0.123\n')
    events = run(study, TEXT, path, resume=True)
    while next(events).what != "round":
        pass
    events.close()
    file.write_text('[chosen]\n"training.lr" = 0.5\n')
    with pytest.raises(NotChosen, match="changed after training had begun"):
        list(run(study, TEXT, path, resume=True))
    file.write_text('[chosen]\n"training.lr" = "fast"\n')
    with pytest.raises(NotChosen, match="must be a number"):
        list(run(study, TEXT, path, resume=True))
    file.write_text('[chosen]\n"training.lr" = 0.123\n')
    list(run(study, TEXT, path, resume=True))
    chosen = {(c.method, c.fold): c for c in read_run(path).chosen}
    assert chosen["pooled", 0].values == other
    assert chosen["pooled", 0].by == "hand"
    assert with_values(study.methods[0], other).training == {"lr": 0.123}


@pytest.mark.parametrize(("metric", "best"), [("auc", max), ("loss", min)])
def test_trials_are_told_noted_and_recorded_before_training(tmp_path: Path, metric: str, best: Any) -> None:
    text = TEXT.replace("folds = 2\n", "seeds = [3]\n").replace(
        "[engine]", f'[evaluation]\nmetric = "{metric}"\n[engine]'
    )
    path = tmp_path / "run"
    events = list(run(parse(text), text, path))
    records = facts(path)
    entries = [
        {k: v for k, v in e.items() if k not in ("seq", "previous", "hash")} for e in verify(path / "journal.jsonl")
    ]
    for method in ("pooled", "fedprox"):
        mine = [e for e in events if e.label == method]
        assert [(e.what, e.seed, e.round, e.rounds) for e in mine[:3]] == [
            ("trial", 3, 1, 2),
            ("trial", 3, 2, 2),
            ("arm", 3, 0, 2),
        ]
        first, second, chosen, *others = (r for r in records if r["method"] == method)
        who = {"method": method, "seed": 3}
        scores = []
        for trial, (line, event) in enumerate(zip((first, second), mine, strict=False)):
            assert line.items() >= ({"kind": "trial", "trial": trial, "rounds": 1} | who).items()
            assert event.scores == {"validation": line["score"]}
            scores.append((line["score"], line["values"]))
            noted = {"event": "trial", **who, **{key: line[key] for key in ("trial", "values", "score")}}
            assert entries.count(noted) == 1
        assert chosen == {"kind": "chosen", **who, "values": best(scores, key=lambda pair: pair[0])[1], "by": "search"}
        assert entries.count({**{k: v for k, v in chosen.items() if k != "kind"}, "event": "chosen"}) == 1
        assert "trial" not in {r["kind"] for r in others}
        trained = read_plan(path / "arms" / f"{method}-seed3" / "model.safetensors")
        assert trained.training["lr"] == chosen["values"]["training.lr"]
        assert trained.rounds == 2
        folder = path / "arms" / f"{method}-seed3"
        assert not (folder / "trials").exists()
        assert read_trials(folder / "search.jsonl")[0]["seconds"] > 0
    assert len([e for e in entries if e["event"] == "round" and "trial" in e]) == 4
