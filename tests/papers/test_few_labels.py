"""Few labels and slow machines on real data. The whole studies are the scripts under benchmarks/."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
pytestmark = pytest.mark.slow


def test_waiting_for_the_slowest_costs_most_when_there_is_little_time(real_data: Path) -> None:
    """Ten minutes at four hospitals, of which one takes 20 s for a minibatch and one 1 s."""
    import unequal

    def accuracy(way: str) -> float:
        return float(np.mean([unequal.run(way, 10, 0.0, seed)[0] for seed in range(3)]))

    waits = accuracy("FedAvg, waits for all")
    assert accuracy("semi-synchronous, λ = 1") > waits + 0.04
    assert accuracy("FedAvg, deadline of 100 s") > waits + 0.04


def test_images_without_labels_are_used_as_said(real_data: Path) -> None:
    """Of the five hospitals of the study, nine in ten labels are gone, and nothing is left of them in the data."""
    import few_labels
    from hospitals import read, sites_of

    spec, how = few_labels.SETTINGS["Breast ultrasound, labels lost everywhere"]
    sites = sites_of(read(spec, 0), 0)
    for name, site in few_labels.hidden(sites, how).items():
        kept, free, before = site.data["train"], site.data["unlabeled"], sites[name].data["train"]
        assert len(kept) == round(len(before) / 10)
        assert len(kept) + len(free) == len(before)
        assert free.targets.unique().numel() == 1
        assert not {*kept.ids} & {*free.ids}
