"""Drift is detected in changed data and rarely in unchanged data, from sums only."""

import json
import math

import numpy as np
import pytest
import torch

from polyclinic.data.examples import DataError
from polyclinic.data.fingerprint import preprocessing_planner
from polyclinic.data.fingerprint.dataset_fingerprint import Measured
from polyclinic.data.fingerprint.preprocessing_plan import DataPlan, Reference
from polyclinic.data.quality.drift import as_json, drift, lines
from polyclinic.learning.tasks.data_sums import Summary, count_up, middle, spread_out

NAMES = ("age", "dose", "dose is missing")
CLASSES = ("healthy", "ill")


def rows(n: int, seed: int, age: float = 60.0, gone: float = 0.1, ill: float = 0.4) -> Measured:
    """Patients with an age, a skewed dose that some lack, and a class."""
    rng = np.random.default_rng(seed)
    dose = np.where(rng.random(n) < gone, np.nan, rng.gamma(2, 30, n))
    table = torch.tensor(np.stack([rng.normal(age, 10, n), dose, np.isnan(dose)], 1))
    return Measured(NAMES, table, torch.tensor((rng.random(n) < ill).astype(np.int64)), tuple(map(str, range(n))))


def reference(data: Measured) -> Reference:
    """What the fingerprint finds, without a federation."""
    sums = count_up(data, len(CLASSES))
    found = Summary(sums, torch.empty(0))
    edges = found.mean[:, None] + 5 * found.std[:, None] * torch.linspace(-1, 1, 257, dtype=torch.float64)
    assert torch.allclose(middle(edges), found.mean)
    return preprocessing_planner.reference(
        Summary({**sums, **spread_out(data, edges)}, edges), NAMES, len(data), CLASSES
    )


PLAN = DataPlan("s", "d", 0, reference(rows(800, 0)), {"b": reference(rows(300, 1, age=40))})


def test_the_same_patients_raise_no_alarm_and_few_false_ones() -> None:
    alarms = [drift(PLAN, "a", rows(60, seed), CLASSES).alarm for seed in range(100, 300)]
    assert sum(alarms) <= 4  # at most 1 in 100 is expected


@pytest.mark.parametrize(
    ("change", "name"), [({"age": 72.0}, "age"), ({"gone": 0.5}, "dose"), ({"ill": 0.85}, "share of ill")]
)
def test_what_moved_is_named_with_its_numbers(change: dict[str, float], name: str) -> None:
    found = drift(PLAN, "a", rows(150, 9, **change), CLASSES)
    assert found.alarm
    assert name in {one.name for one in found.found if one.level == "moved"} or name == "share of ill"
    first = found.found[0]
    assert first.name.replace("healthy", "ill") == name
    assert "ALARM" in lines(found)[0]
    assert name.split()[0] in lines(found)[1]


def test_a_site_is_compared_with_itself_where_the_plan_knows_it() -> None:
    """Hospital b was younger from the beginning: that is not drift; for a stranger it is."""
    young = rows(150, 5, age=40)
    assert not drift(PLAN, "b", young, CLASSES).alarm
    assert "its own 300" in drift(PLAN, "b", young, CLASSES).against
    assert drift(PLAN, "c", young, CLASSES).alarm


def test_images_of_one_patient_are_not_many_patients() -> None:
    """A hundred images of ten patients prove as little as ten images."""
    few = rows(100, 3, age=66)
    same = Measured(few.names, few.rows, few.targets, tuple(str(i // 10) for i in range(100)))
    p = {one.name: one.p for one in drift(PLAN, "a", few, CLASSES).found}
    q = {one.name: one.p for one in drift(PLAN, "a", same, CLASSES).found}
    assert p["age"] < q["age"]


def test_few_patients_and_other_columns_are_refused() -> None:
    with pytest.raises(DataError, match="a has 9 patients: at least 10"):
        drift(PLAN, "a", rows(9, 0), CLASSES)
    other = Measured(("height",), torch.rand(20, 1), torch.zeros(20, dtype=torch.int64), tuple(map(str, range(20))))
    with pytest.raises(DataError, match="a has no age"):
        drift(PLAN, "a", other, CLASSES)


def test_labels_may_be_unknown_and_values_all_missing() -> None:
    new = rows(50, 2, gone=1.0)
    unknown = Measured(new.names, new.rows, torch.full((50,), -1), new.patients)
    found = drift(PLAN, "a", unknown, CLASSES)
    assert not any(one.name.startswith("share") for one in found.found)
    dose = next(one for one in found.found if one.name == "dose")
    assert math.isnan(dose.now)
    assert "none" in lines(found)[1]
    assert json.loads(json.dumps(as_json(found)))["found"][0]["now"] is None


def test_no_value_of_a_patient_is_told() -> None:
    new = rows(40, 7, age=90)
    told = "\n".join(lines(drift(PLAN, "a", new, CLASSES))) + json.dumps(as_json(drift(PLAN, "a", new, CLASSES)))
    assert not any(f"{value:.4g}" in told.split() for value in new.rows[:, 0].tolist())
