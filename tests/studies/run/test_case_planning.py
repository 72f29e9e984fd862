"""Plans from federated sums equal plans from the raw values of all cases, and tell no single case."""

import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.cli.run import run
from polyclinic.core.aggregates import WeightedMean
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.data.federation import rows_by_site
from polyclinic.data.fingerprint.case_rows import CaseRows
from polyclinic.data.fingerprint.nnunet_plan import NnunetPlan
from polyclinic.data.fingerprint.nnunet_planner import planned
from polyclinic.engines.local.in_process import InProcess
from polyclinic.errors import ConfigError, DataError
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks import case_sums
from polyclinic.learning.tasks.classification import Classification
from polyclinic.methods.statistics.case_statistics import CaseStatistics, median, planned_spacing, spacing
from polyclinic.studies.config import study_config
from polyclinic.studies.run import case_planning
from tests.data.fingerprint.test_nnunet_planner import EXPECTED, pooled
from tests.studies.run.test_patches import write_volumes


def rows_of(name: str) -> torch.Tensor:
    """Rows with the spacings and sizes of a data set, without a foreground."""
    given = EXPECTED[name]
    rows = torch.zeros(len(given["shapes"]), case_sums.HEAD + len(given["channels"]) * case_sums.CHANNEL)
    rows[:, 0], rows[:, 7], rows[:, 8] = 3, 1, 1
    rows[:, 1:4], rows[:, 4:7] = torch.tensor(given["spacings"]), torch.tensor(given["shapes"]).float()
    return rows


def at_sites(rows: torch.Tensor, count: int = 4) -> dict[str, CaseRows]:
    """The rows, dealt to sites."""
    return {
        f"site-{k}": CaseRows(rows[k::count], tuple(f"p{i}" for i in range(len(rows[k::count])))) for k in range(count)
    }


@pytest.mark.parametrize("name", EXPECTED)
def test_the_federated_plan_equals_the_pooled_one(name: str) -> None:
    sums = case_planning.statistics(at_sites(rows_of(name)), False)
    facts, wanted, size = pooled(name)
    if name == "hippocampus":
        assert spacing(sums, 0.5) == (1.0, 1.0, 1.0)
        assert median(sums["resampled"]) == (36, 50, 35)
    found = planned_spacing(sums).tolist()
    assert found == pytest.approx(list(wanted), rel=0.0051)  # half a bin
    assert median(sums["resampled"]) == pytest.approx(size, rel=0.02)
    federated = planned(facts, found, median(sums["resampled"]))
    exact = planned(facts, wanted, size)
    for key in ("full", "slices", "low"):
        one, other = getattr(federated, key), getattr(exact, key)
        assert (one is None) == (other is None)
        if one is not None:
            assert (one.patch, one.kernels, one.strides, one.widths) == (
                other.patch,
                other.kernels,
                other.strides,
                other.widths,
            )
            # the batch is limited by the number of voxels, which the rounding of three spacings changes by 1.5 %
            assert one.batch_size == (
                pytest.approx(other.batch_size, rel=0.03) if key == "slices" else other.batch_size
            )


PLANNED = """
name = "balls"
rounds = 1
[data]
kind = "pairs"
path = "{path}"
plan = "nnunet"
sites = {{ partition = "iid", count = 1 }}
[task]
kind = "segmentation"
network = "nnunet"
options = {{ width = 4 }}
[[methods]]
name = "fedavg"
"""


def test_a_study_may_leave_its_plan_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is made once, next to the study; one that a person has edited is used as it is."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    ran: list[Any] = []
    monkeypatch.setattr("polyclinic.cli.run.run_all", lambda file, scenarios, *how: ran.extend(scenarios))
    write_volumes(tmp_path / "volumes", 20)
    study, file = tmp_path / "balls.toml", tmp_path / "balls.plan.toml"
    study.write_text(PLANNED.format(path=tmp_path / "volumes"))
    run(study)
    plan = NnunetPlan.read(file)
    assert plan is not None
    assert plan.options["width"] == 4
    assert ran[0].study.data.options["patch"] == list(plan.patch)
    assert ran[0].study.task.batch_dice is plan.batch_dice is False
    assert study_config.parse(ran[0].text).hash == ran[0].study.hash  # what the run folder keeps
    file.write_text(file.read_text().replace("width = 4", "width = 6"))
    run(study, set_=["training.steps=1"])
    assert "width = 6" in file.read_text()
    assert ran[1].study.data.options["patch"] == list(plan.patch)


def test_sums_do_not_depend_on_how_cases_are_dealt() -> None:
    rows = rows_of("thin")
    whole, parts = (case_planning.statistics(at_sites(rows, count), False) for count in (1, 5))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_replies_are_sums_of_one_shape_and_requests_hold_the_spacing_only() -> None:
    method = CaseStatistics(Classification(Network("mlp", (1,), 1)))
    sites = {name: Site(name, {"train": rows}) for name, rows in at_sites(rows_of("small")).items()}
    state, requests = method.init({}), []
    while (request := method.request(state)) is not None:
        requests.append(request)
        replies = [method.site_update(request, {}, site)[0] for site in sites.values()]
        assert {type(part) for reply in replies for part in reply.parts.values()} == {WeightedMean}
        shapes = [{n: leaf.shape for n, leaf in reply.mean("sums").total.items()} for reply in replies]
        assert all(shape == shapes[0] for shape in shapes)
        merged = replies[0]
        for reply in replies[1:]:
            merged = merged + reply
        state = method.server_update(state, merged, Site("server", {}))
    assert [r.job for r in requests] == ["cases", "sizes"]
    assert [list(r.trees) for r in requests] == [[], ["spacing"]]
    assert method.evaluation_request(state).round == 1


def volumes(n: int = 12, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor, tuple[float, ...]]]:
    """CT-like volumes of unequal size with a margin of air stored as 0, and a mask."""
    rng, found = np.random.default_rng(seed), list[tuple[torch.Tensor, torch.Tensor, tuple[float, ...]]]()
    for _ in range(n):
        shape = tuple(int(s) for s in rng.integers(10, 20, 3))
        image = np.round(rng.normal(40, 200, shape)).clip(-1000, 3000)
        image[0], image[:, -2:] = 0, 0
        mask = (rng.random(shape) < 0.2).astype(np.int64)
        mask[0] = 0
        found.append((torch.from_numpy(image[None].astype(np.float32)), torch.from_numpy(mask), (2.5, 0.75, 0.75)))
    return found


def test_intensities_and_crops_are_those_of_numpy() -> None:
    cases = volumes()
    rows = torch.stack([case_sums.row_of(*case) for case in cases])
    sums = case_planning.statistics(at_sites(rows, 3), True)
    facts = case_planning.facts_of(sums, ["CT"], 2)
    (one,) = facts.intensities
    assert one is not None
    values = [image[0][mask > 0].double().numpy() for image, mask, _ in cases]
    assert one.mean == pytest.approx(np.mean([v.mean() for v in values]), abs=1e-3)
    second = np.mean([(v**2).mean() for v in values])
    assert one.deviation == pytest.approx(np.sqrt(second - one.mean**2), rel=1e-4)
    rng = np.random.default_rng(1)
    sample = np.concatenate([rng.choice(v, 20000) for v in values])  # each case with the same weight, as nnU-Net draws
    assert one.low == pytest.approx(np.percentile(sample, 0.5), abs=8)
    assert one.high == pytest.approx(np.percentile(sample, 99.5), abs=8)
    sizes = np.array([[s[0] - 1, s[1] - 2, s[2]] for s in (image.shape[1:] for image, _, _ in cases)])
    assert median(sums["size"]) == tuple(np.median(sizes, 0))
    left = np.median([np.prod(s) / image[0].numel() for s, (image, _, _) in zip(sizes, cases, strict=True)])
    assert facts.cropped == pytest.approx(left, abs=0.011)
    assert int(sums["labels"][1]) == len(cases)


def test_spacings_have_round_numbers_within_one_percent() -> None:
    for mm in (0.5, 0.625, 0.7, 0.7421875, 0.8, 1.0, 1.25, 1.5, 2.5, 3.0, 5.0, 10.0):
        found = case_sums.spacing_of(int(case_sums.spacing_bin(torch.tensor(mm))))
        assert abs(found / mm - 1) < 0.0101, (mm, found)
    exact = (0.5, 0.7, 0.8, 1.0, 1.25, 1.5, 2.5, 3.0, 5.0, 10.0)
    assert [case_sums.spacing_of(int(case_sums.spacing_bin(torch.tensor(mm)))) for mm in exact] == list(exact)


def test_quantiles_of_counts_are_numpys() -> None:
    rng = np.random.default_rng(3)
    for n in (1, 2, 5, 40, 41):
        values = rng.integers(1, 30, n)
        counts = torch.from_numpy(np.bincount(values, minlength=40)).double()
        for share in (0.1, 0.5, 0.9):
            low, high, weight = case_sums.quantile(counts, share)
            assert low + (high - low) * weight == pytest.approx(np.percentile(values, share * 100))


def test_what_a_plan_needs_is_asked_for() -> None:
    rows = rows_of("hippocampus")
    sums = case_planning.statistics(at_sites(rows), True)
    with pytest.raises(DataError, match=r"have 1 channels, and 2 are named \(T1, T2\): name each with --channels"):
        case_planning.facts_of(sums, ["T1", "T2"], 3)
    with pytest.raises(DataError, match="channel CT: CT is scaled by its foreground values, and no mask"):
        case_planning.plan_of(sums, ["CT"], 3, "default", None)
    rows[:7, 8] = 0
    with pytest.raises(DataError, match="7 of 260 volumes do not state their voxel size"):
        case_planning.facts_of(case_planning.statistics(at_sites(rows), True), ["MR"], 3)


def test_pictures_without_a_pixel_size_are_not_resampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    for i in range(24):
        size = tuple(int(n) for n in rng.integers(70, 130, 2))
        Image.fromarray(rng.integers(1, 255, size).astype(np.uint8)).save(tmp_path / "set" / "images" / f"p{i:02d}.png")
        Image.fromarray((rng.random(size) < 0.2).astype(np.uint8)).save(tmp_path / "set" / "labels" / f"p{i:02d}.png")
    study = tmp_path / "study.toml"
    study.write_text(STUDY.replace("PATH", str(tmp_path / "set")).replace("count = 3", "count = 1"))
    spec = study_config.read(study).data
    made = case_planning.plan(spec, "pictures")
    assert made.configuration == "2d"
    assert made.planned.full is None
    file = tmp_path / "a.plan.toml"
    file.write_text(made.text)
    plan = NnunetPlan.read(file)
    assert plan is not None
    assert [step["step"] for step in plan.steps] == ["crop_nonzero", "normalize"]
    assert len(plan.patch) == 2
    with pytest.raises(DataError, match="trained on as 2d"):
        case_planning.plan(spec, "pictures", configuration="3d_fullres")


def test_sums_that_count_nothing_give_no_plan() -> None:
    empty = {
        name: torch.zeros_like(leaf)
        for name, leaf in case_planning.statistics(at_sites(rows_of("small")), True).items()
    }
    with pytest.raises(DataError, match="the sums count no images"):
        case_planning.plan_of(empty, ["MR", "MR"][: len(empty["known"])], 2, "default", None)


def write_pairs(root: Path, count: int = 44, spacing_mm: tuple[float, ...] = (0.8, 0.8, 2.4)) -> Path:
    """nnU-Net's layout with small CT-like volumes."""
    import nibabel as nib

    (root / "imagesTr").mkdir(parents=True)
    (root / "labelsTr").mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        shape = tuple(int(n) for n in rng.integers((30, 30, 10), (38, 38, 16)))
        mask = np.zeros(shape, np.uint8)
        mask[10:20, 10:20, 3:7] = 1
        image = np.round(rng.normal(-50, 20, shape) + 150 * mask).astype(np.int16)
        affine = np.diag([*spacing_mm, 1.0])
        nib.save(nib.Nifti1Image(image, affine), root / "imagesTr" / f"case{i:02d}_0000.nii.gz")
        nib.save(nib.Nifti1Image(mask, affine), root / "labelsTr" / f"case{i:02d}.nii.gz")
    (root / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "spot": 1}})
    )
    return root


STUDY = """
name = "spots"
rounds = 1
[data]
kind = "pairs"
path = "PATH"
sites = { partition = "iid", count = 3 }
split = [0.8, 0.1, 0.1]
[task]
kind = "segmentation"
network = "nnunet"
[training]
steps = 1
[[methods]]
name = "fedavg"
"""


def test_the_command_writes_a_plan_to_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from polyclinic.cli import data

    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    study = tmp_path / "study.toml"
    study.write_text(STUDY.replace("PATH", str(write_pairs(tmp_path / "set"))))
    data.case_plan(study, width=8)
    assert "3d_fullres: patch" in capsys.readouterr().out
    text = (tmp_path / "study.plan.toml").read_text()
    plan = NnunetPlan.read(tmp_path / "study.plan.toml")
    assert plan is not None
    assert [step["step"] for step in plan.steps] == ["crop_nonzero", "normalize", "resample_cubic"]
    assert plan.steps[1]["schemes"] == ["ct"]
    assert plan.steps[1]["mean"][0] == pytest.approx(100, abs=2)
    assert plan.steps[2]["mm"] == [2.4, 0.8, 0.8]
    assert plan.options["width"] == 8
    assert plan.options["kernels"][0] == [1, 3, 3]
    assert "case0" not in text
    with pytest.raises(Exception, match="exists already; --force replaces it"):
        data.case_plan(study)
    data.case_plan(study, force=True, json_=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["used"]["patch"] == list(plan.patch)
    assert printed["configuration"] == "3d_fullres"
    for memory in (float("nan"), float("inf"), 0.0):
        with pytest.raises(ConfigError, match="--memory-gb need numbers above 0"):
            data.case_plan(study, memory_gb=memory, force=True)
    for channels in ("MR,MR", "CT,MR"):
        with pytest.raises(DataError, match="have 1 channels, and 2 are named"):
            data.case_plan(study, channels=channels, force=True)
    study.write_text(study.read_text().replace("count = 3", "count = 11"))
    with pytest.raises(DataError, match="no site has 10 training patients"):
        data.case_plan(study, force=True, set_=["data.min_patients=2"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_size = ", "batch_size = -", "must be a whole number from 1"),
        ("patch = [", "patches = [", r"\[use\] has no key 'patch'"),
        ('\nnetwork = "nnunet"', '\nnetwork = "unet"', 'must be "nnunet" or "resenc"'),
        ("version = 1", "version = 2", "another version"),
        ("\n[use]", "\n[used]", r"has no table \[use\]"),
        ("deep_supervision = true", "deep_supervision = 1", "must be true or false"),
        ("\nkernels = [[3, 3, 3]", "\nkernels = [[3, 2, 3]", "must be one list of odd numbers for each stage"),
    ],
)
def test_a_damaged_plan_is_refused_by_name(tmp_path: Path, old: str, new: str, message: str) -> None:
    facts, wanted, size = pooled("hippocampus")
    from polyclinic.data.fingerprint.nnunet_plan import text_of

    about = {"study": "hippo", "data": "0", "seed": 0, "patients": 260}
    text = text_of(planned(facts, wanted, size), facts, wanted, "3d_fullres", about, 32)
    file = tmp_path / "a.plan.toml"
    file.write_text(text)
    plan = NnunetPlan.read(file)
    assert plan is not None
    assert plan.patch == (40, 56, 40)
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        NnunetPlan.read(file)


def test_a_run_between_sites_gives_the_same_sums(tmp_path: Path) -> None:
    from polyclinic.core import serialization
    from polyclinic.studies.records.checkpoint import Checkpoint

    sites = at_sites(rows_of("small"))
    method = CaseStatistics(Classification(Network("mlp", (1,), 1)))
    engine = InProcess(method, {name: Site(name, {"train": rows}) for name, rows in sites.items()})
    state = method.init({})
    for step in train(method, engine, state, rounds=1):
        state = step.state
    file = tmp_path / "checkpoint.safetensors"
    serialization.save(file, Checkpoint(state, {}, 1, 0, 0, 0.0, True))
    found = case_planning.read_statistics(file)
    assert all(torch.equal(found[name], leaf) for name, leaf in case_planning.statistics(sites, True).items())
    serialization.save(file, Checkpoint(state._replace(sums={}), {}, 1, 0, 0, 0.0, True))
    with pytest.raises(DataError, match="not the checkpoint of a complete run"):
        case_planning.read_statistics(file)
    file.write_bytes(b"nothing")
    with pytest.raises(DataError, match="is not a checkpoint of a run of case-statistics"):
        case_planning.read_statistics(file)


def test_sums_of_another_run_give_the_plan_without_the_data() -> None:
    """The channels have to be named; the classes are the labels that occur, and the configuration one that fits."""
    sums = dict(case_planning.statistics(at_sites(rows_of("hippocampus")), False))
    unread: Any = None
    with pytest.raises(
        DataError, match="the sums of a run between hospitals name no channels: name them with --channels"
    ):
        case_planning.plan(unread, "s", sums=sums)
    sums["labels"] = torch.tensor([260.0, 200.0, 0.0, 1.0])
    made = case_planning.plan(unread, "brains", 3, ("MR",), width=8, sums=sums)
    used, about = (tomllib.loads(made.text)[key] for key in ("use", "facts"))
    assert (used["width"], about["classes"], about["cases"]) == (8, 4, 260)
    table = tomllib.loads(made.text)
    assert (table["study"], table["seed"], table["data"], table["configuration"]) == ("brains", 3, "", "3d_fullres")
    assert made.configuration == "3d_fullres"
    assert made.notes == ()
    assert made.planned == planned(case_planning.facts_of(sums, ("MR",), 4), [1.0, 1.0, 1.0], (36, 50, 35))
    with pytest.raises(DataError, match=r'configuration = "2d": this data can be trained on as 3d_fullres$'):
        case_planning.plan(unread, "s", channels=("MR",), configuration="2d", sums=sums)


@pytest.mark.parametrize("size", [case_sums.LARGEST - 1, case_sums.LARGEST])
def test_images_too_large_to_be_counted_give_no_plan(size: int) -> None:
    rows = rows_of("hippocampus")
    rows[:, 6] = size
    sums = case_planning.statistics(at_sites(rows), False)
    if size < case_sums.LARGEST:
        assert case_planning.plan_of(sums, ("MR",), 3, "default", None).full is not None
        return
    with pytest.raises(
        DataError, match=f"most images have {case_sums.LARGEST} voxels or more along an axis after resampling"
    ):
        case_planning.plan_of(sums, ("MR",), 3, "default", None)


def test_a_study_gives_its_plan_the_width_and_the_preset_of_its_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def made(spec: Any, study: str, seed: int, **how: Any) -> Any:
        asked.append({"study": study, "seed": seed, **how})
        return case_planning.Made("the text", None, "2d", ())  # type: ignore[arg-type]

    monkeypatch.setattr(case_planning, "plan", made)
    for network, options in (("nnunet", "{ width = 4 }"), ("resenc", "{}")):
        study = tmp_path / f"{network}.toml"
        text = PLANNED.format(path=tmp_path).replace(
            '"nnunet"\noptions = { width = 4 }', f'"{network}"\noptions = {options}'
        )
        study.write_text(text.replace("rounds = 1", "rounds = 1\nseeds = [6, 7]"))
        plan = tmp_path / f"{network}.plan.toml"
        assert case_planning.plan_beside(study, {"name": "other"}) == (plan, True)
        assert plan.read_text() == "the text"
        assert case_planning.plan_beside(study, {}) == (plan, False)
    common = {"study": "other", "seed": 6}
    assert asked == [{**common, "preset": "default", "width": 4}, {**common, "preset": "resenc-l", "width": 32}]


@pytest.mark.parametrize(
    ("modality", "count", "names"),
    [
        ("CT, PET", 2, ("CT", "PET")),
        ("CT, PET", 3, ("CT",) * 3),
        ("Lung CT", 1, ("Lung CT",)),
        ("lung ct of adults", 2, ("CT", "CT")),
        ("MR", 2, ("MR", "MR")),
    ],
)
def test_channels_have_the_names_of_the_data_or_of_the_modality(
    modality: str, count: int, names: tuple[str, ...]
) -> None:
    source: Any = SimpleNamespace(info=SimpleNamespace(modality=modality))
    assert case_planning.channels_of(source, count) == names


def test_small_sites_are_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "study.toml").write_text(STUDY.replace("PATH", str(write_pairs(tmp_path / "set", 20))))
    spec = study_config.read(tmp_path / "study.toml", {"data.min_patients": 2}).data
    counts = {name: len(set(rows.patients)) for name, rows in rows_by_site(spec, 0, spec.source()).items()}
    small = [name for name, count in counts.items() if count == min(counts.values())]
    assert len(small) < len(counts)
    monkeypatch.setattr(case_planning, "FEWEST", min(counts.values()) + 1)
    made = case_planning.plan(spec, "spots")
    kept = sum(count for name, count in counts.items() if name not in small)
    assert made.notes[0] == f"Left out, with fewer than {case_planning.FEWEST} training patients: {', '.join(small)}."
    assert f"# {made.notes[0]}" in made.text
    assert tomllib.loads(made.text)["patients"] == kept == tomllib.loads(made.text)["facts"]["cases"]
