"""Pictures of test cases: drawn for the report where a site's policy allows it, and nowhere else."""

import re
from pathlib import Path

import numpy as np
import pytest

from polyclinic.engines.policy.site_policy import Allow, Enforced, Limits, Policy
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.report import build_report
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.records.pictured_cases import read_pictures
from polyclinic.studies.run.case_pictures import NotPictured, draw
from polyclinic.studies.run.run_directory import read_plan
from polyclinic.studies.run.scheduler import run
from tests.report.test_report import FEW
from tests.studies.run.test_patches import STUDY, write_volumes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYCLINIC_CACHE", str(folder / "cache"))
        write_volumes(folder / "volumes", 12)
        text = STUDY.replace("rounds = 2", "rounds = 1").replace('"volumes"', f'"{folder}/volumes"')
        text = text.replace("count = 3", "count = 2").replace("split = [0.5, 0.25, 0.25]", "split = [0.5, 0.0, 0.5]")
        list(run(parse(text), text, folder / "run"))
    return folder / "run"


def test_every_site_shows_three_cases_and_the_report_has_them(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCLINIC_CACHE", str(trained.parent / "cache"))
    opened = read_run(trained).opened
    _, refused = draw(trained)
    assert refused == {}
    seed, sites = read_pictures(read_run(trained), "fedavg") or (None, {})
    assert seed == 0
    assert sites.keys() == {"site-1", "site-2"}
    tested = read_run(trained).arms["fedavg", 0]
    for site, cases in sites.items():
        assert list(cases) == ["best", "median", "worst"]
        known = sorted(tested[site].cases["dice"][:, 0])
        assert [case.mean for case in cases.values()] == pytest.approx([known[-1], known[1], known[0]], abs=1e-6)
        assert all(len(case.planes) == 3 for case in cases.values())
        assert all(case.planes[0].truth.any() for case in cases.values())
    page = build_report(trained, options=FEW)
    text = page.read_text(encoding="utf-8")
    assert text.count("case, mean Dice") == 6
    assert (page.parent / "tables" / "pictures.csv").read_text().startswith("site,case,mean,class_0")
    names = [case.name.split(".")[0] for case in (trained.parent / "volumes" / "images").iterdir()]
    assert len(names) == 12
    assert not re.search(rf"\b({'|'.join(names)})\b", text)
    assert read_run(trained).opened == opened


def test_a_policy_has_to_allow_pictures(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCLINIC_CACHE", str(trained.parent / "cache"))
    plan = read_plan(trained / "arms" / "fedavg-seed0" / "model.safetensors")
    few, names = Limits(min_patients=1), ("site-1", "site-2")
    usual = Enforced(Policy(limits=few), plan)
    with pytest.raises(NotPictured, match=r"'show/test' never runs here \(allow.never\)"):
        draw(trained, policies=dict.fromkeys(names, usual))
    listed = Enforced(Policy(allow=Allow(never=()), limits=few), plan)
    with pytest.raises(NotPictured, match="'show' would leave as a PerSite"):
        draw(trained, policies=dict.fromkeys(names, listed))
    open_ = Enforced(Policy(allow=Allow(never=(), gather=("show",)), limits=few), plan)
    _, refused = draw(trained, policies=dict.fromkeys(names, usual) | {"site-2": open_})
    assert refused.keys() == {"site-1"}


def test_labels_at_the_border_are_closed() -> None:
    from polyclinic.report.case_figures import case_picture
    from polyclinic.studies.records.pictured_cases import PicturedCase, Plane

    full = np.ones((4, 4), np.uint8)
    plane = Plane(np.zeros((4, 4, 1), np.uint8), full, 0 * full, 2.0)
    text = case_picture("one", "alt", PicturedCase(np.array([0.0]), (plane,)))
    assert text == case_picture("one", "alt", PicturedCase(np.array([0.0]), (plane,)))
    assert "#ffd23f" in text
