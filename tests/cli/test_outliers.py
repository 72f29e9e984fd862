"""Outlier notes are shown, and an excluded site is left out of the aggregate."""

import json
from pathlib import Path

import numpy as np
import pytest

from polyclinic.cli.outliers import outliers
from polyclinic.errors import ConfigError
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.records.site_outliers import NoSiteOutliers, read
from polyclinic.studies.run.scheduler import run

STUDY = """\
name = "watching"
rounds = 3
[data]
path = "{path}"
kind = "npz"
sites = "site"
[task]
options = {{ width = 4, depth = 2 }}
[training]
batch_size = 8
[engine]
kind = "in-process"
"""


def odd_site(folder: Path) -> Path:
    """Five hospitals; the last one's labels are wrong and its images are of another scale."""
    rng, n = np.random.default_rng(0), 200
    labels, site = rng.integers(0, 2, n), np.arange(n) % 5
    images = rng.normal(0, 1, (n, 8, 8)) + labels[:, None, None]
    images[site == 4] *= 40
    path = folder / "sites.npz"
    np.savez(
        path,
        images=images.astype(np.float32),
        labels=np.where(site == 4, 1 - labels, labels),
        site=np.array(list("abcde"))[site],
    )
    return path


def go(folder: Path, methods: str, name: str) -> Path:
    text = STUDY.format(path=odd_site(folder)) + methods
    list(run(parse(text), text, folder / name))
    return folder / name


def test_who_stands_out_is_shown_and_a_person_may_leave_a_site_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = go(tmp_path, '[[methods]]\nname = "watched"\n[[methods]]\nname = "fedavg"\n', "first")
    (arm,) = read(done)
    assert arm.round == 3
    assert arm.notes["e"].outlying == 3
    assert all(arm.notes[site].outlying == 0 for site in "abcd")
    assert [alarm[0] for alarm in arm.alarms] == ["e"]
    outliers(done)
    shown = capsys.readouterr().out
    assert "watched-seed0" in shown
    assert "3 of 3" in shown
    assert 'quarantined = ["SITE"]' in shown
    outliers(done, json_=True)
    assert json.loads(capsys.readouterr().out)[0]["sites"]["e"]["seen"] == 3
    without = go(tmp_path, '[[methods]]\nname = "watched"\nquarantined = ["e"]\n', "second")
    note = read(without)[0].notes["e"]
    assert note.excluded
    assert note.share == 0.0
    assert note.seen == 3  # still looked at, so that a person can see when to hear it again


def test_what_keeps_no_notes_says_so(tmp_path: Path) -> None:
    done = go(tmp_path, '[[methods]]\nname = "fedavg"\n', "plain")
    with pytest.raises(NoSiteOutliers, match='use the method "watched"'):
        read(done)
    with pytest.raises(ConfigError, match="there is no run here"):
        read(tmp_path / "nowhere")
