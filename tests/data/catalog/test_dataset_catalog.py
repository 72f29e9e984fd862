"""The catalog: every entry is whole, and every layout it describes is read as it says, on small files laid out so."""

import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from polyclinic.data.catalog import dataset_catalog
from polyclinic.data.config import KINDS
from polyclinic.data.examples import DataError
from polyclinic.data.federation import DataSpec, federate
from polyclinic.data.sources.feature_tables import FeatureTable
from tests.support.data_sets import data_spec, loaded

DICE = np.random.default_rng(0)
NAMES = [one.name for one in dataset_catalog.list_datasets()]


def picture(path: Path, size: tuple[int, ...] = (40, 50), values: tuple[int, ...] = ()) -> None:
    """A picture of random pixels, or of the given values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = DICE.choice(values, size) if values else DICE.integers(0, 256, size)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def volume(path: Path, labels: tuple[int, ...] = (), size: tuple[int, ...] = (12, 10, 6)) -> None:
    """A NIfTI volume of random values, or of the given labels."""
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    array = DICE.choice(labels, size).astype(np.uint8) if labels else DICE.normal(50, 40, size).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([2.0, 2.0, 3.0, 1.0])), path)


def table(path: Path, header: str, rows: list[str]) -> None:
    """A CSV table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n")


def ham10000(root: Path) -> None:
    """Dataverse's metadata; two images of every third lesion."""
    sources, kinds = (
        ("rosendahl", "vidir_modern", "vidir_molemax", "vienna_dias"),
        ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"),
    )
    rows = []
    for i in range(112):
        picture(root / "HAM10000_images" / f"ISIC_00{24306 + i}.jpg", (45, 60, 3))
        rows.append(
            f"HAM_{i - (i % 3 == 1):07d},ISIC_00{24306 + i},{kinds[i % 7]},histo,{40 + i},male,scalp,{sources[i // 28]}"
        )
    table(root / "HAM10000_metadata.csv", "lesion_id,image_id,dx,dx_type,age,sex,localization,dataset", rows)


def isic2019(root: Path) -> None:
    """FLamby's folds."""
    rows = []
    for i in range(96):
        picture(root / "ISIC_2019_Training_Input_preprocessed" / f"ISIC_{i:07d}.jpg", (40, 40, 3))
        fold = "train" if i % 24 < 18 else "test"
        rows.append(f"ISIC_{i:07d},{i % 8},{i % 6},{fold},{fold}_{i % 6}")
    table(root / "train_test_folds.csv", "image,target,center,fold,fold2", rows)


def chexpert(root: Path) -> None:
    """The small version: its own name comes again in every path."""
    names = (
        "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,"
        "Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
    )
    rows = []
    for i in range(40):
        path = f"CheXpert-v1.0-small/train/patient{i // 2:05d}/study{i % 2 + 1}/view1_frontal.jpg"
        picture(root.parent / path)
        marks = [str(DICE.choice(["", "0.0", "1.0", "-1.0"])) for _ in range(14)]
        rows.append(f"{path},Female,68,Frontal,AP,{','.join(marks)}")
    table(root / "train.csv", f"Path,Sex,Age,Frontal/Lateral,AP/PA,{names}", rows)


def chestxray14(root: Path) -> None:
    """NIH's entries."""
    rows = []
    for i in range(40):
        picture(root / "images" / f"{i // 2:08d}_{i % 2:03d}.png")
        rows.append(
            f"{i // 2:08d}_{i % 2:03d}.png,{['No Finding', 'Mass|Nodule', 'Hernia'][i % 3]},{i % 2},{i // 2},58,M,PA"
        )
    table(
        root / "Data_Entry_2017.csv",
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position",
        rows,
    )


def eyepacs(root: Path) -> None:
    """Both eyes of 30 patients."""
    rows = []
    for i in range(60):
        name = f"{i // 2 + 10}_{('left', 'right')[i % 2]}"
        picture(root / "train" / f"{name}.jpeg", (50, 60, 3))
        rows.append(f"{name},{i // 2 % 5}")
    table(root / "trainLabels.csv", "image,level", rows)


def camelyon17(root: Path) -> None:
    """WILDS's metadata, with its nameless first column."""
    rows = []
    for i in range(60):
        patient, x, y = f"{i // 2:03d}", 3328 + i, 21792 + i
        picture(root / f"patches/patient_{patient}_node_0/patch_patient_{patient}_node_0_x_{x}_y_{y}.png", (96, 96, 3))
        rows.append(f"{i},{patient},0,{x},{y},{i // 2 % 2},{i},{i // 2 % 5},0")
    table(root / "metadata.csv", ",patient,node,x_coord,y_coord,tumor,slide,center,split", rows)


def fets2022(root: Path) -> None:
    """A partition of 24 cases to two institutions, labels 0, 1, 2 and 4."""
    rows = []
    for i in range(24):
        name = f"FeTS2022_{i:05d}"
        for kind in ("t1", "t1ce", "t2", "flair"):
            volume(root / name / f"{name}_{kind}.nii.gz")
        volume(root / name / f"{name}_seg.nii.gz", (0, 1, 2, 4))
        rows.append(f"{i % 2 + 1},{name}")
    table(root / "partitioning_1.csv", "Partition_ID,Subject_ID", rows)


def brats(root: Path) -> None:
    """The same without a partition."""
    fets2022(root)
    (root / "partitioning_1.csv").unlink()


def kits19(root: Path) -> None:
    """FLamby's silos."""
    rows = []
    for i in range(12):
        volume(root / f"case_{i:05d}" / "imaging.nii.gz")
        volume(root / f"case_{i:05d}" / "segmentation.nii.gz", (0, 1, 2))
        split = "train" if i < 8 else "test"
        rows.append(f"case_{i:05d},{i % 2},{split},{split}_{i % 2}")
    table(root / "thresholded_sites.csv", "case_ids,site_ids,train_test_split,train_test_split_silo", rows)


def prostate(root: Path) -> None:
    """Six folders."""
    for site in ("RUNMC", "BMC", "I2CVB", "UCL", "BIDMC", "HK"):
        for i in range(4):
            volume(root / site / f"Case{i:02d}.nii.gz")
            volume(root / site / f"Case{i:02d}_segmentation.nii.gz", (0, 1))


def promise12(root: Path) -> None:
    """One folder."""
    for i in range(12):
        volume(root / f"Case{i:02d}.nii.gz")
        volume(root / f"Case{i:02d}_segmentation.nii.gz", (0, 1))


def fundus(root: Path) -> None:
    """Four domains with gray masks."""
    for domain in range(1, 5):
        for i in range(10):
            split = ("train", "test")[i % 2]
            picture(root / f"Domain{domain}/{split}/ROIs/image/gdrishtiGS_{i:03d}.png", (30, 30, 3))
            picture(root / f"Domain{domain}/{split}/ROIs/mask/gdrishtiGS_{i:03d}.png", (30, 30), (0, 128, 255))


def ixi_tiny(root: Path) -> None:
    """Three hospitals."""
    for i in range(36):
        name = f"IXI{i:03d}-{('Guys', 'HH', 'IOP')[i % 3]}-{800 + i:04d}"
        volume(root / "image" / f"{name}_image.nii.gz")
        volume(root / "label" / f"{name}_label.nii.gz", (0, 1))


def acdc(root: Path) -> None:
    """Two frames a patient, and a 4-D file that is not one of them."""
    for i in range(1, 13):
        for frame in (1, 12):
            volume(root / f"patient{i:03d}/patient{i:03d}_frame{frame:02d}.nii.gz")
            volume(root / f"patient{i:03d}/patient{i:03d}_frame{frame:02d}_gt.nii.gz", (0, 1, 2, 3))
        volume(root / f"patient{i:03d}/patient{i:03d}_4d.nii.gz")


def manifest_of(task: str, suffix: str = ".nii.gz", sites: bool = True, labels: str = "") -> Any:
    """A manifest such as a recipe asks for."""

    def build(root: Path) -> None:
        rows = []
        for i in range(24):
            make = volume if suffix == ".nii.gz" else picture
            make(root / f"{i}{suffix}")  # type: ignore[operator]
            row = f"{i}{suffix},p{i // 2},{'AB'[i // 2 % 2] if sites else ''}"
            if task == "segmentation":
                volume(root / f"{i}_mask.nii.gz", (0, 1))
                row += f",{i}_mask.nii.gz"
            elif labels:
                row += "," + ",".join(str(int(v)) for v in DICE.integers(0, 2, len(labels.split(","))))
            else:
                row += f",{('normal', 'pneumonia', 'covid')[i // 2 % 3]}"
            rows.append(row)
        table(
            root / "manifest.csv", f"path,patient,site,{'mask' if task == 'segmentation' else labels or 'label'}", rows
        )

    return build


def adni(root: Path) -> None:
    """Two visits of 30 subjects at three sites."""
    rows = []
    for i in range(60):
        volume(root / f"I{1000 + i}.nii.gz")
        subject = f"{(2, 11, 130)[i // 2 % 3]:03d}_S_{i // 2:04d}"
        rows.append(f"I{1000 + i},{subject},{('CN', 'MCI', 'AD')[i // 6 % 3]},F,70,m{i % 2 * 12:02d}")
    table(root / "images.csv", "Image Data ID,Subject,Group,Sex,Age,Visit", rows)


def features(name: str, header: str, row: Any) -> Any:
    """A table of features."""
    return lambda root: table(root / name, header, [row(i) for i in range(60)])


def busi(root: Path) -> None:
    """Three folders."""
    for kind in ("benign", "malignant", "normal"):
        for i in range(1, 21):
            picture(root / kind / f"{kind} ({i}).png", (40, 50))


def retina(root: Path) -> None:
    """Three cameras, two eyes."""
    for site in ("DRIVE", "CHASE", "STARE"):
        for i in range(24):
            picture(root / site / "images" / f"{i // 2}_{'LR'[i % 2]}.png", (32, 32, 3))
            picture(root / site / "masks" / f"{i // 2}_{'LR'[i % 2]}.png", (32, 32), (0, 255))


def decathlon(channels: int = 1, labels: int = 3) -> Any:
    """The Decathlon's layout: channels in a fourth dimension, and the hidden files of the computer that packed it."""

    def build(root: Path) -> None:
        for i in range(12):
            size = (12, 10, 6) if channels == 1 else (12, 10, 6, channels)
            volume(root / "imagesTr" / f"case_{i:03d}.nii.gz", size=size)
            volume(root / "labelsTr" / f"case_{i:03d}.nii.gz", tuple(range(labels)))
            (root / "imagesTr" / f"._case_{i:03d}.nii.gz").write_bytes(b"hidden")
        volume(root / "imagesTs" / "case_099.nii.gz")

    return build


def medmnist(root: Path) -> None:
    """An archive of MedMNIST."""
    arrays: dict[str, Any] = {}
    for split, n in (("train", 40), ("val", 10), ("test", 20)):
        arrays[f"{split}_images"] = DICE.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(n)[:, None] % 2
    np.savez(root / "pneumoniamnist.npz", **arrays)


LAYOUTS: dict[str, tuple[Any, dict[str, Any], int, tuple[int, ...]]] = {  # builder, further keys, sites, input's shape
    "ham10000": (ham10000, {}, 4, (3, 150, 200)),
    "isic2019": (isic2019, {"split": "official"}, 6, (3, 200, 200)),
    "chexpert": (chexpert, {"sites": {"partition": "iid", "count": 2}}, 2, (1, 224, 224)),
    "chestxray14": (chestxray14, {"sites": {"partition": "iid", "count": 2}}, 2, (1, 224, 224)),
    "eyepacs": (eyepacs, {"sites": {"partition": "dirichlet", "count": 2, "alpha": 9.0}}, 2, (3, 224, 224)),
    "camelyon17": (camelyon17, {"min_patients": 5}, 5, (3, 96, 96)),
    "fets2022": (fets2022, {}, 2, (4, 6, 10, 12)),
    "brats": (brats, {"sites": {"partition": "iid", "count": 2}}, 2, (4, 6, 10, 12)),
    "kits19": (kits19, {"split": "official", "min_patients": 6}, 2, (1, 96, 96, 96)),
    "prostate-6sites": (prostate, {"min_patients": 4, "steps": [{"step": "crop_pad", "size": 8}]}, 6, (1, 8, 8, 8)),
    "promise12": (promise12, {"sites": {"partition": "iid", "count": 1}, "steps": []}, 1, (1, 6, 10, 12)),
    "fundus-4sites": (fundus, {"split": "official"}, 4, (3, 256, 256)),
    "ixi-tiny": (ixi_tiny, {}, 3, (1, 6, 10, 12)),
    "acdc": (acdc, {"sites": {"partition": "iid", "count": 1}}, 1, (1, 10, 160, 160)),
    "mnms": (manifest_of("segmentation"), {"min_patients": 5}, 2, (1, 12, 192, 192)),
    "lidc-idri": (manifest_of("segmentation"), {"min_patients": 5}, 2, (1, 48, 48, 48)),
    "covidx": (manifest_of("classification", ".png"), {"min_patients": 5}, 2, (1, 224, 224)),
    "rsna-hemorrhage": (
        manifest_of("multilabel", ".png", labels="epidural,intraparenchymal,intraventricular,subarachnoid,subdural"),
        {"sites": {"partition": "iid", "count": 1}},
        1,
        (1, 256, 256),
    ),
    "adni": (adni, {}, 3, (1, 6, 10, 12)),
    "abide": (
        features(
            "features.csv",
            "SUB_ID,SITE_ID,DX_GROUP,c1,c2",
            lambda i: f"{i},{['NYU', 'UM'][i % 2]},{i // 2 % 2 + 1},{i}.5,{-i}",
        ),
        {},
        2,
        (2,),
    ),
    "uk-biobank": (
        features("participants.csv", "eid,center,age,v1", lambda i: f"{i},{11025 + i % 2},{45 + i},{i}.5"),
        {},
        2,
        (1,),
    ),
    "brain-roi": (
        features(
            "regions.csv",
            "subject,site,age,sex,r1,r2",
            lambda i: f"s{i},{'AB'[i % 2]},{20 + i},{i // 2 % 2},{i},{2 * i}",
        ),
        {},
        2,
        (2,),
    ),
    "heart-disease": (
        features(
            "heart.csv",
            "age,sex,cp,trestbps,chol,fbs,restecg,thalach,exang,oldpeak,slope,ca,thal,num,site",
            lambda i: f"{i},1,{i % 4 + 1},?,{i % 2 * 9},0,{i % 3},150,0,2,3,-9,{i % 3},{i % 5},{'ab'[i // 30]}",
        ),
        {},
        2,
        (9 + 4 + 3 + 1 + 3 + 3,),
    ),
    "busi": (busi, {"sites": {"partition": "iid", "count": 2}}, 2, (1, 40, 50)),
    "retina-vessels": (retina, {}, 3, (3, 32, 32)),
    **{
        f"msd-{name}": (
            decathlon(channels, labels),
            {"sites": {"partition": "iid", "count": 1}, "steps": [{"step": "crop_pad", "size": 8}]},
            1,
            (channels, 8, 8, 8),
        )
        for name, channels, labels in (
            ("brain-tumor", 4, 4),
            ("heart", 1, 2),
            ("liver", 1, 3),
            ("hippocampus", 1, 3),
            ("prostate", 2, 3),
            ("lung", 1, 2),
            ("pancreas", 1, 3),
            ("hepatic-vessel", 1, 3),
            ("spleen", 1, 2),
            ("colon", 1, 2),
        )
    },
    "pneumoniamnist": (medmnist, {"sites": {"partition": "iid", "count": 2}, "split": "official"}, 2, (1, 28, 28)),
}


LARGE = ("mnms", "kits19", "acdc")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in sorted(LAYOUTS)]
)
def test_a_layout_is_read_as_the_catalog_says(name: str, tmp_path: Path) -> None:
    """From ``use`` and ``path`` alone: sites, shapes, classes, and no patient in two places."""
    build, further, sites, shape = LAYOUTS[name]
    root = tmp_path / ("CheXpert-v1.0-small" if name == "chexpert" else "data")
    root.mkdir()
    build(root)
    data = federate(DataSpec(use=name, path=str(root), **further))
    one = dataset_catalog.entry(name)
    assert len(data.sites) == sites
    assert data.shape == shape
    assert data.info.name == name
    assert data.info.task == one.task
    assert data.info.license == one.license
    if one.classes:
        assert data.info.classes == one.classes
    places: dict[str, set[tuple[str, str]]] = {}
    for site, roles in data.sites.items():
        for role, examples in roles.items():
            for patient in examples.patients:
                places.setdefault(patient, set()).add((site, role))
            if one.task == "segmentation":
                assert int(loaded(examples).targets.max()) < len(data.info.classes)
    assert all(len(where) == 1 for where in places.values())


def test_every_reader_has_a_layout() -> None:
    """What the catalog says can be read is tried above, except nodules and fastMRI (tested separately) and MedMNIST
    (one of 18).
    """
    readable = {
        one.name
        for one in dataset_catalog.list_datasets()
        if one.kind not in ("", "nodules", "fastmri") and not one.md5
    }
    assert readable == set(LAYOUTS) - {"pneumoniamnist"}


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_is_whole(name: str) -> None:
    """Nothing that a person needs is missing, and checksums are checksums."""
    one = dataset_catalog.entry(name)
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", name)
    assert all((one.title, one.modality, one.organ, one.task, one.size, one.license, one.sites, one.citation, one.get))
    assert one.url.startswith("http")
    assert one.kind in (*KINDS, "")
    assert all(re.fullmatch(r"[0-9a-f]{32}", md5) for md5 in one.md5.values())
    page = dict(dataset_catalog.show(name))
    assert page["license"] == one.license
    assert ("study file" in page) == bool(one.kind)
    if one.kind:
        import tomllib

        DataSpec(**tomllib.loads(page["study file"])["data"])


def test_all_of_medmnist() -> None:
    """Eighteen sets; 2-D in four sizes, 3-D in two; the two whose official checksum was seen on real files."""
    sets = [one for one in dataset_catalog.list_datasets() if one.automatic and "mnist" in one.name]
    assert len(sets) == 18
    assert all(set(one.md5) == ({28, 64} if one.name.endswith("3d") else {28, 64, 128, 224}) for one in sets)
    assert len({md5 for one in sets for md5 in one.md5.values()}) == 12 * 4 + 6 * 2


def test_checksums_are_those_of_the_real_file(real_data: Path) -> None:
    """A byte-identical official file has the MD5 that the catalog lists."""
    import hashlib

    found = hashlib.md5((real_data / "adrenalmnist3d" / "adrenalmnist3d.npz").read_bytes()).hexdigest()
    assert dataset_catalog.entry("adrenalmnist3d").md5[28] == found


def test_what_cannot_be_used_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Misspelt; without a path; without a reader; not fetched; a size that does not exist; kind together with use."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path))
    for given, where, says in (
        ({"use": "ham1000"}, "use", 'Did you mean "ham10000"'),
        ({"use": "adni"}, "use", "Apply at LONI"),
        ({"use": "camelyon16", "path": "x"}, "use", "no reader for it"),
        ({"use": "breastmnist", "size": 99}, "use", "comes in 28, 64, 128, 224 pixels"),
        ({"use": "adni", "path": "x", "kind": "manifest"}, "kind", "remove one of them"),
        ({"use": "ham10000", "path": "x", "labell": "dx"}, "labell", 'Did you mean "label"'),
        ({"use": "ham10000", "path": "x", "about": {}}, "about", "unknown key"),
    ):
        with pytest.raises(ValidationError) as error:
            DataSpec(**given)  # type: ignore[arg-type]
        (line,) = error.value.errors()
        assert line["loc"] == (where,)
        assert says in line["msg"]
    spec = data_spec(use="breastmnist", sites={"partition": "iid"})
    with pytest.raises(DataError, match="is not here yet: fetch it with `polyclinic data get breastmnist`"):
        federate(spec)


def test_heart_disease_is_embedded() -> None:
    """920 patients of four hospitals, prevalences as published, and no value that means missing but a 0 that is named."""
    data = federate(DataSpec(use="heart-disease"))
    labels = {name: torch.cat([roles[k].labels for k in roles]) for name, roles in data.sites.items()}  # type: ignore[misc]
    assert {name: (len(found), int(found.sum())) for name, found in labels.items()} == {
        "budapest": (294, 106),
        "cleveland": (303, 139),
        "long-beach": (200, 149),
        "zurich-basel": (123, 115),
    }
    assert data.info.license == "CC BY 4.0"
    assert "Janosi" in data.info.citation
    text = resources.files("polyclinic.data.catalog").joinpath("heart_disease.csv").read_text(encoding="utf-8")
    assert text.splitlines()[0].startswith("site,age,sex,")
    assert "-9" not in text
    assert "?" not in text


def test_the_embedded_table_is_that_of_the_public_file(real_data: Path) -> None:
    names = {"cleveland": "cleveland", "hungarian": "budapest", "switzerland": "zurich-basel", "va": "long-beach"}
    own = DataSpec(use="heart-disease", path=str(real_data / "uci_heart_4hospitals" / "heart_4sites.csv"))
    public, ours = own.source(), DataSpec(use="heart-disease").source()
    assert isinstance(public, FeatureTable)
    assert isinstance(ours, FeatureTable)
    assert ours.names == public.names
    assert np.array_equal(ours.inputs[0], public.inputs[0], equal_nan=True)
    one, other = public.table(), ours.table()
    assert one.labels is not None
    assert other.labels is not None
    assert np.array_equal(one.labels, other.labels)
    assert [names[site] for site in one.columns["site"]] == list(other.columns["site"])
