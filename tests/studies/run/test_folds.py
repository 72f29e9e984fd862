"""Folds: every patient is tested once, by a model that never saw him, and every interval knows who was tested twice."""

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.core.audit_log import verify
from polyclinic.data.examples import DataError, Examples
from polyclinic.data.federation import DataSpec, federate
from polyclinic.data.splits import Fold, fold_patients, rng_for
from polyclinic.evaluation.costs import cost_of
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.evaluation.run_evaluation import Options, evaluate
from polyclinic.report.report_builder import build_report
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.records.run_description import patients_apart
from polyclinic.studies.run.scheduler import run
from tests.support.small_runs import facts, opened_once, tensors

TEXT = """\
name = "folds"
rounds = 2
seeds = [0, 1]
folds = 3

[data]
kind = "roi-phantom"
sites = "site"
subjects = 24
regions = 6

[task]
network = "mlp"
options = { width = 4, depth = 1 }

[engine]
kind = "in-process"

[[methods]]
name = "pooled"

[[methods]]
name = "fedavg"
"""


@given(
    st.lists(st.integers(0, 2), min_size=10, max_size=60),
    st.integers(2, 7),
    st.integers(0, 99),
)
@settings(max_examples=60)
def test_over_the_folds_every_patient_is_tested_once_and_never_trains_then(
    groups: list[Any], count: int, seed: int
) -> None:
    patients = {f"p{i}": group for i, group in enumerate(groups)}
    folds = [fold_patients(patients, Fold(i, count), (0.6, 0.15, 0.25), rng_for(seed, "split")) for i in range(count)]
    tested = [p for roles in folds for p, role in roles.items() if role == "test"]
    assert sorted(tested) == sorted(patients)
    sizes = [sum(role == "test" for role in roles.values()) for roles in folds]
    assert max(sizes) - min(sizes) <= 1
    for group in set(groups):  # as even within each class as whole patients allow
        each = [sum(role == "test" and patients[p] == group for p, role in roles.items()) for roles in folds]
        assert max(each) - min(each) <= 1


def test_too_few_patients_for_the_folds_are_refused_with_what_to_do() -> None:
    with pytest.raises(DataError, match="fewer folds"):
        fold_patients({"a": 0, "b": 1}, Fold(0, 3), (0.6, 0.15, 0.25), rng_for(0))


def test_leaving_one_site_out_trains_on_nobody_of_it() -> None:
    spec = DataSpec.model_validate({"kind": "roi-phantom", "sites": "site", "regions": 6, "subjects": 20})
    for i in range(2):
        data = federate(spec, 0, Fold(i, 2, "sites"))
        (out,) = data.external
        assert set(data.sites[out]) == {"test"}
        assert len(data.sites[out]["test"]) == 20
        assert set(data.sites[data.training[0]]) == {"train", "val"}
        patients_apart(data)


@given(
    st.integers(0, 50),
    st.sampled_from(["iid", "dirichlet", "quantity", "natural"]),
    st.sampled_from([None, "patients", "sites"]),
    st.floats(0, 0.5),
)
@settings(max_examples=12, deadline=None)
def test_no_configuration_puts_a_patient_in_two_places(
    archive: Path, seed: int, sites: str, by: str | None, unlabeled: float
) -> None:
    where: object = "site" if sites == "natural" else {"partition": sites, "count": 3, "least": 5}
    spec = DataSpec.model_validate(
        {"path": str(archive), "kind": "npz", "sites": where, "patient": "patient"}
        | {"unlabeled": unlabeled, "min_patients": 3}
    )
    folds = [None] if by is None else [Fold(i, 3, by) for i in range(3)]  # type: ignore[arg-type]
    for fold in folds:
        try:
            data = federate(spec, seed, fold)
        except DataError:
            assert sites not in ("natural", "iid")  # a draw that leaves a site too few patients is refused
            continue
        assert patients_apart(data)
        places = [{p for e in roles.values() for p in e.patients} for roles in data.sites.values()]
        assert not any(a & b for a, b in itertools.combinations(places, 2))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images a patient, thirty patients at three sites."""
    path = tmp_path_factory.mktemp("data") / "a.npz"
    rng, n = np.random.default_rng(0), 60
    patient = np.array([f"p{i // 2}" for i in range(n)])
    np.savez(
        path,
        images=rng.integers(0, 255, (n, 4, 4)).astype(np.uint8),
        labels=np.arange(n) // 2 % 2,
        patient=patient,
        site=np.array(list("abc"))[np.arange(n) // 2 % 3],
    )
    return path


def test_a_source_that_leaks_is_refused(archive: Path) -> None:
    spec = {"path": str(archive), "kind": "npz", "sites": "site", "patient": "patient", "min_patients": 3}
    data = federate(DataSpec.model_validate(spec))
    assert patients_apart(data)
    test = data.sites["a"]["test"]
    assert isinstance(test, Examples)
    stolen = {**data.sites["a"], "train": Examples(test.inputs, test.targets, test.patients, test.ids)}
    object.__setattr__(data, "sites", {**data.sites, "a": stolen})
    with pytest.raises(DataError, match="leaks test patients into training"):
        patients_apart(data)


REFUSED = {
    "one fold": ("folds = 3", "folds = 1", "from 2 to 50"),
    "a word": ("folds = 3", 'folds = "patient"', "leave one site out"),
    "the official split": ('sites = "site"', 'sites = "site"\nsplit = "official"', "leave folds out"),
    "no validation": ('sites = "site"', 'sites = "site"\nsplit = [0.7, 0.0, 0.3]', "validation"),
    "single cannot be left out": ("folds = 3", 'folds = "sites"\n', "has no model for a site that was held out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_with_folds_is_told(name: str) -> None:
    old, new, words = REFUSED[name]
    text = TEXT.replace(old, new).replace('name = "pooled"', 'name = "local"')
    with pytest.raises(BadStudy, match=words):
        parse(text)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with folds."""
    path = tmp_path_factory.mktemp("folds") / "run"
    assert [e.what for e in run(parse(TEXT), TEXT, path)].count("tested") == 12
    return path


def test_a_run_with_folds_reads_as_one_arm_a_seed_with_every_patient_once(done: Path) -> None:
    read = read_run(done)
    assert not read.missing
    assert set(read.arms) == {(m, s) for m in ("pooled", "fedavg") for s in (0, 1)}
    for sites in read.arms.values():
        for p in sites.values():
            assert len(p.patient) == len(set(p.patient.tolist())) == 24
    sizes = {s.name: s.patients["test"] for s in read.info.sites}
    assert set(sizes.values()) == {24}
    assert set(read.opened.values()) == {1}
    events = [e for e in verify(done / "journal.jsonl") if e["event"] == "test opened"]
    assert len(events) == len({(e["method"], e["seed"], e["fold"]) for e in events}) == 12


def test_costs_are_those_of_one_fold_and_comparison_counts_folds_as_splits(done: Path) -> None:
    read = read_run(done)
    cost = cost_of(read, "fedavg", "auc", True, None)
    assert cost is not None
    assert cost.rounds == 2
    (one, *_) = [r for r in read.rounds if r.method == "fedavg"]
    site = next(iter(one.bytes_up))
    assert cost.up[site] == 2 * one.bytes_up[site]
    result = evaluate(read, Options())
    assert set(result.patients.values()) == {24}
    assert result.over_splits["pooled"].n == 6  # two seeds of three folds
    assert "3 folds" in build_report(done).read_text()


def test_an_external_site_is_tested_by_one_fold_of_a_seed(tmp_path: Path) -> None:
    text = TEXT.replace("[0, 1]", "[0]").replace("subjects = 24\nregions = 6\n", 'external = ["c"]\n')
    text = text.replace('kind = "roi-phantom"', f'kind = "npz"\npath = "{_npz(tmp_path)}"')
    text = text.replace('"mlp"', '"cnn"').replace("depth = 1", "depth = 2")
    list(run(parse(text), text, tmp_path / "run"))
    read = read_run(tmp_path / "run")
    outside = [f for f in facts(tmp_path / "run") if f["kind"] == "test" and f["site"] == "c"]
    assert {f["fold"] for f in outside} == {0}
    p = read.arms["fedavg", 0]["c"]
    assert len(p.patient) == len(set(p.patient.tolist()))


def _npz(folder: Path) -> Path:
    rng, n = np.random.default_rng(0), 60
    labels = rng.integers(0, 2, n)
    images = (rng.normal(100, 30, (n, 8, 8)) + 40 * labels[:, None, None]).clip(0, 255).astype(np.uint8)
    np.savez(folder / "a.npz", images=images, labels=labels, site=np.array(list("abc"))[np.arange(n) % 3])
    return folder / "a.npz"


def test_leave_one_site_out_tests_every_site_by_models_that_never_saw_it(tmp_path: Path) -> None:
    text = TEXT.replace("folds = 3", 'folds = "sites"').replace("[0, 1]", "[0]")
    list(run(parse(text), text, tmp_path / "run"))
    read = read_run(tmp_path / "run")
    assert (read.info.folds, read.info.folds_by) == (2, "sites")
    assert {s.role for s in read.info.sites} == {"training"}
    tested = [
        (f["fold"], f["site"]) for f in facts(tmp_path / "run") if f["kind"] == "test" and f["method"] == "fedavg"
    ]
    asked = {f["fold"]: f["asked"] for f in facts(tmp_path / "run") if f["kind"] == "round" and f["method"] == "fedavg"}
    assert len(tested) == 2
    assert all(site not in asked[fold] for fold, site in tested)
    assert evaluate(read, Options()).of("fedavg").macro.value is not None
    page = build_report(tmp_path / "run").read_text()
    assert "left out in turn" in page
    assert "No site was held out of training" not in page


def assert_same_but_for_openings(a: Path, b: Path) -> None:
    """To the bit, except for how often a test set was opened, since arms may have been killed while theirs was open."""
    x, y = tensors(a), tensors(b)
    assert x.keys() == y.keys()
    assert all(torch.equal(x[k], y[k]) for k in x)
    assert opened_once(a) == opened_once(b)
    said = [f for f in facts(b) if f["kind"] == "sealed"]
    entries = [e for e in verify(b / "journal.jsonl") if e["event"] == "test opened"]
    for f in said:
        assert f["opened"] == sum(all(e[k] == f[k] for k in ("method", "seed", "fold")) for e in entries)


def test_a_finished_run_repeats_the_scores_of_each_fold(done: Path) -> None:
    scores: dict[tuple[str, int, int], dict[str, float]] = {}
    for fact in facts(done):
        if fact["kind"] == "test":
            scores.setdefault((fact["method"], fact["seed"], fact["fold"]), {})[fact["site"]] = fact["metrics"]["auc"]
    assert len(scores) == 12
    _, *events = run(parse(TEXT), TEXT, done, resume=True)
    assert {(e.label, e.seed, e.fold): dict(e.scores) for e in events} == scores


def test_arms_side_by_side_and_resumed_give_the_same_run(done: Path, tmp_path: Path) -> None:
    text = TEXT.replace('kind = "in-process"', 'kind = "workers"\nworkers = 2\nparallel = "arms"')
    events = run(parse(text), text, tmp_path / "run")
    for _ in range(9):
        next(events)
    events.close()  # as a crash leaves it
    assert read_run(tmp_path / "run").missing
    list(run(parse(text), text, tmp_path / "run", resume=True))
    assert_same_but_for_openings(done, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["folds"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_or_killed_with_children_at_work_it_goes_on_to_the_same_bits(
    how: signal.Signals, done: Path, tmp_path: Path
) -> None:
    text = TEXT.replace('kind = "in-process"', 'kind = "workers"\nworkers = 2')
    (tmp_path / "s.toml").write_text(text)
    command = [sys.executable, "-m", "polyclinic", "run", "s.toml"]
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while child.poll() is None and not list(tmp_path.rglob("checkpoint.safetensors")):
        time.sleep(0.05)
    child.send_signal(how)
    said, _ = child.communicate(timeout=120)
    if how == signal.SIGINT:
        assert child.returncode == 130
        assert "--resume" in said
        assert "Traceback" not in said
    subprocess.run([*command, "--resume"], cwd=tmp_path, check=True, timeout=600, capture_output=True)
    (folder,) = (tmp_path / "runs").glob("folds-*")
    assert_same_but_for_openings(done, folder)
