"""What privacy costs is asked by an ordinary study, whose noise keeps each ε at the smallest site."""

from pathlib import Path
from typing import Any

import pytest

from polyclinic.cli.app import app
from polyclinic.evaluation.run_evaluation import Options
from polyclinic.privacy.accounting import BadPlan
from polyclinic.statistics.intervals import Estimate
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.scenarios import parse_all
from polyclinic.studies.run.scheduler import run
from polyclinic.studies.utility_curve import PLAIN, Price, best_rounds, priced, prices
from tests.support.known import known
from tests.support.small_runs import npz

STUDY = """\
name = "small"
rounds = 2
seeds = [0]

[data]
path = "{path}"
kind = "npz"
sites = "site"

[task]
network = "mlp"
options = {{ width = 8, depth = 1 }}

[training]
batch_size = 8
lr = 0.2

[engine]
kind = "in-process"

[[methods]]
name = "local"

[[methods]]
name = "fedavg"
training = {{ epochs = 2 }}
"""


@pytest.fixture
def file(tmp_path: Path) -> Any:
    path = tmp_path / "small.toml"
    path.write_text(STUDY.format(path=npz(tmp_path)))
    return path


@pytest.mark.slow
def test_each_epsilon_is_kept_and_priced_for_each_number_of_rounds(file: Any, tmp_path: Path) -> None:
    runs = {}
    for scenario in parse_all(priced(file, (2.0, 20.0), 1e-2, (1, 3))):
        folder = scenario.folder(tmp_path)
        events = list(run(scenario.study, scenario.text, folder))
        spent = {e.label: e.epsilon for e in events if e.what == "round" and e.round == scenario.study.rounds}
        assert spent == {PLAIN: None, "eps-2": pytest.approx(2.0, rel=2e-3), "eps-20": pytest.approx(20.0, rel=2e-3)}
        assert known(spent["eps-2"]) <= 2.0
        runs[scenario.study.rounds] = folder
    found = prices(runs, (20.0, 2.0), Options())
    assert [(one.rounds, one.epsilon) for one in found] == [(r, e) for r in (1, 3) for e in (None, 2.0, 20.0)]
    noise = {(one.rounds, one.epsilon): one.noise for one in found}
    assert noise[1, 2.0] > noise[1, 20.0] > 0 == noise[1, None]
    assert noise[3, 2.0] > noise[1, 2.0]  # more rounds spend more, so each hides more
    assert all(one.value.value is not None for one in found)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"method": "fedprox"}, 'no federated method of the study is called "fedprox". There are: fedavg'),
        ({"delta": 0.5}, "δ = 0.5 must be below 1 in 24, the patients of the smallest site"),
        ({"epsilons": ()}, "give one ε or more, each once"),
        ({"epsilons": (1.0, 1.0)}, "give one ε or more, each once"),
        ({"epsilons": (-1.0,)}, "epsilon must be above 0, not -1.0"),
    ],
)
def test_what_cannot_be_priced_is_told(file: Any, how: Any, says: str) -> None:
    with pytest.raises((BadStudy, BadPlan)) as error:
        priced(file, **{"epsilons": (1.0,), "delta": 1e-2} | how)
    assert says in str(error.value)


def test_the_command_draws_the_curve_and_tells_the_best_number_of_rounds(
    file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--epsilon", "5", "--delta", "0.01", "--rounds", "1", "--rounds", "2"]
    with pytest.raises(SystemExit) as end:
        app(["privacy", "plan", str(file), *given])
    assert end.value.code in (0, None)
    said = capsys.readouterr().out.split("on test patients, mean over sites")[1]
    rows = [line.split()[:3] for line in said.splitlines() if "█" in line]
    assert [row[:2] for row in rows] == [["1", "none"], ["1", "5"], ["2", "none"], ["2", "5"]]
    assert float(rows[3][2]) > float(rows[1][2]) > 0 == float(rows[0][2])
    assert "Best on validation patients: ε = 5 in " in said
    folder = next((tmp_path / "runs" / "small-priced").glob("rounds-2-*"))
    with pytest.raises(SystemExit):
        app(["privacy", "ledger", str(folder)])
    said = capsys.readouterr().out
    assert "eps-5-seed0: " in said
    assert said.count("is left") == len(list(folder.glob("arms/eps-5-*/ledgers/*.jsonl"))) > 0
    assert "no-noise" not in said


def test_more_rounds_are_told_to_be_better_only_where_validation_says_so() -> None:
    def price(rounds: Any, validation: Any) -> Any:
        return Price(2.0, 1.0, rounds, Estimate(0.9), None, validation)

    assert best_rounds([price(9, 0.7), price(3, 0.8), price(5, 0.8)], True) == {2.0: 3}
    assert best_rounds([price(9, 0.7), price(3, 0.8), price(5, 0.8)], False) == {2.0: 9}
    assert best_rounds([price(9, None)], True) == {}


def test_without_a_study_the_noise_alone_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app(["privacy", "plan", "--patients", "100", "--rounds", "2", "--epsilon", "4", "--delta", "0.001"])
    assert "100 patients, batches of 16 (q = 0.160), 2 rounds of 7 steps" in capsys.readouterr().out
    with pytest.raises(BadPlan, match="give a study file, or the number of patients and rounds"):
        app(
            ["privacy", "plan", "--epsilon", "4", "--delta", "0.001"], result_action="return_value", exit_on_error=False
        )
