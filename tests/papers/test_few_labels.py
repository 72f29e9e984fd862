"""Few labels and slow machines on real data. The whole studies are the scripts under benchmarks/."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
pytestmark = pytest.mark.slow


def test_waiting_for_the_slowest_costs_most_when_there_is_little_time(real_data: Path) -> None:
    """Ten minutes at four hospitals, of which one takes 20 s for a minibatch and one 1 s, each in turn."""
    import unequal

    def auc(way: str) -> float:
        runs = [unequal.run(way, 10, 0.0, seed, assignment) for seed in range(2) for assignment in unequal.LATIN]
        return float(np.mean([unequal.outcomes(one)[0] for one in runs]))

    waits = auc("FedAvg, waits for all")
    assert auc("semi-synchronous, λ = 1") > waits + 1
    assert auc("FedAvg, deadline of 100 s") > waits + 1


def test_every_hospital_has_every_speed_once_in_the_latin_square() -> None:
    import unequal

    for column in zip(*unequal.LATIN, strict=True):
        assert sorted(column) == sorted(unequal.SECONDS)
    assert set(unequal.LATIN) <= set(unequal.ALL)


def test_the_slowest_hospital_is_the_one_that_is_scored() -> None:
    import unequal

    by = {"a": 0.5, "b": 0.7}
    one = {"auc": by, "accuracy": {"a": 0.1, "b": 0.2}, "slowest": "b", "exchanges": 3}
    assert unequal.outcomes(one) == pytest.approx([60, 15, 70, 20])


def test_images_without_labels_are_used_as_said(real_data: Path) -> None:
    """Three labels of every hospital are left, nothing of the others is in the data, and no image is in two places."""
    import few_labels

    where = "Breast ultrasound"
    sites = few_labels.federation(where, 0)
    for name, site in few_labels.hidden(sites).items():
        kept, free, before = site.data["train"], site.data["unlabeled"], sites[name].data["train"]
        assert len(kept) == few_labels.LABELS
        assert len(kept) + len(free) == len(before) == few_labels.CANDIDATES[where].each
        assert free.targets.unique().numel() == 1
        assert not {*kept.ids} & {*free.ids}
    training, validation, test = few_labels.dealt(where)
    places = [*training.flatten().tolist(), *validation.tolist(), *test.tolist()]
    assert len(set(places)) == len(places) == len(few_labels.archive(where)[1])
    assert all(len(trials) == 3 for trials in few_labels.TRIALS.values())
