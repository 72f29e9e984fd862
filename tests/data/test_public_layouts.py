"""The layouts of public data sets, recreated at small size: recognized, checked, loaded, and written as a study that runs.

Names of files, folders and columns are those of the published sets; all values are made up.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from polyclinic.data.examples import Dataset
from polyclinic.data.federation import federate
from polyclinic.data.quality.recognition import recognize
from polyclinic.data.quality.site_check import check_folder
from polyclinic.studies.config import study_config
from polyclinic.studies.config.new_study import new_study, study_name
from polyclinic.studies.config.study_config import Study

RNG = np.random.default_rng


def picture(path: Path, i: int, shape: tuple[int, ...] = (40, 36)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG(i).integers(0, 255, shape).astype(np.uint8)).save(path)


def outline(path: Path, i: int, shape: tuple[int, int] = (40, 36)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = np.zeros(shape, np.uint8)
    drawn[4 : 9 + i % 5, 5:20] = 255
    Image.fromarray(drawn).save(path)


def volume(path: Path, i: int, size: tuple[int, ...] = (16, 16, 12), labels: tuple[int, ...] = ()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = RNG(i).integers(0, 900, size).astype(np.int16)
    if labels:
        data = np.zeros(size, np.uint8)
        for k, label in enumerate(labels):
            data[2 : 8 - k, 3 : 9 - k, 2 + k : 8] = label
    nibabel.save(nibabel.Nifti1Image(data, np.diag([1.0, 1.0, 3.0, 1.0])), path)


def table(path: Path, head: str, rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, *rows]) + "\n")


def lgg(root: Path) -> Path:
    """The set of lower-grade gliomas: kaggle_3m, a folder for each patient, and a table of patients that lists no images."""
    for i in range(24):
        name = f"TCGA_{('CS', 'DU', 'HT')[i // 2 % 3]}_{4941 + i // 2}_19960909"
        picture(root / f"kaggle_3m/{name}/{name}_{1 + i % 2}.tif", i, (40, 36, 3))
        outline(root / f"kaggle_3m/{name}/{name}_{1 + i % 2}_mask.tif", i)
    table(
        root / "kaggle_3m/data.csv",
        "Patient,RNASeqCluster,age_at_initial_pathologic,gender,death01",
        [f"TCGA_CS_{4941 + i},2,{40 + i},1,0" for i in range(12)],
    )
    (root / "kaggle_3m/README.md").write_text("LGG")
    return root


def isic_segmentation(root: Path) -> Path:
    for i in range(12):
        picture(root / f"ISIC2018_Task1-2_Training_Input/ISIC_{i:07d}.jpg", i, (40 + i, 36, 3))
        outline(root / f"ISIC2018_Task1_Training_GroundTruth/ISIC_{i:07d}_segmentation.png", i, (40 + i, 36))
    (root / "ISIC2018_Task1-2_Training_Input/LICENSE.txt").write_text("CC-0")
    return root


def isic_classification(root: Path) -> Path:
    classes = "MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK"
    rows, facts = [], []
    for i in range(24):
        picture(root / f"ISIC_2019_Training_Input/ISIC_{i:07d}.jpg", i, (40, 36, 3))
        rows.append(f"ISIC_{i:07d}," + ",".join(f"{float(k == i % 3)}" for k in range(9)))
        facts.append(f"ISIC_{i:07d},55.0,anterior torso,,female")
    table(root / "ISIC_2019_Training_GroundTruth.csv", f"image,{classes}", rows)
    table(root / "ISIC_2019_Training_Metadata.csv", "image,age_approx,anatom_site_general,lesion_id,sex", facts)
    return root


def chexpert(root: Path) -> Path:
    base, rows = root / "CheXpert-v1.0-small", []
    for i in range(24):
        name = f"train/patient{i // 2 + 1:05d}/study1/view{i % 2 + 1}_frontal.jpg"
        picture(base / name, i, (40 + i % 3, 36))
        rows.append(
            f"CheXpert-v1.0-small/{name},Female,68,Frontal,AP,{('1.0', '')[i % 2]},,{('0.0', '-1.0', '1.0')[i % 3]},"
        )
    head = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Edema"
    table(base / "train.csv", head, rows)
    picture(base / "valid/patient64541/study1/view1_frontal.jpg", 99, (40, 36))
    table(
        base / "valid.csv",
        head,
        ["CheXpert-v1.0-small/valid/patient64541/study1/view1_frontal.jpg,Male,73,Frontal,AP,0.0,1.0,0.0,0.0"],
    )
    return base


def nih(root: Path) -> Path:
    rows = []
    for i in range(24):
        name = f"{i // 2 + 1:08d}_{i % 2:03d}.png"
        picture(root / f"images_{1 + i // 8:03d}/images/{name}", i, (40, 40))
        found = ("Cardiomegaly", "Cardiomegaly|Emphysema", "No Finding", "Hernia")[i % 4]
        rows.append(f"{name},{found},{i % 2},{i // 2 + 1},058Y,M,PA,2682,2749,0.143,0.143,")
    head = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
    table(root / "Data_Entry_2017.csv", head + ",OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],", rows)
    table(
        root / "BBox_List_2017.csv",
        "Image Index,Finding Label,Bbox [x,y,w,h],,,",
        ["00000001_000.png,Cardiomegaly,225.1,547.0,86.8,79.2,,,"],
    )
    (root / "train_val_list.txt").write_text("00000001_000.png\n")
    return root


def ham10000(root: Path) -> Path:
    rows = []
    for i in range(24):
        picture(root / f"HAM10000_images_part_{1 + i // 12}/ISIC_{24306 + i:07d}.jpg", i, (45, 60, 3))
        rows.append(f"HAM_{i // 2:07d},ISIC_{24306 + i:07d},{('bkl', 'nv', 'mel')[i // 2 % 3]},histo,80.0,male,scalp")
    table(root / "HAM10000_metadata.csv", "lesion_id,image_id,dx,dx_type,age,sex,localization", rows)
    table(
        root / "hmnist_8_8_L.csv",
        ",".join([*(f"pixel{k:04d}" for k in range(64)), "label"]),
        [",".join(["9"] * 65)] * 3,
    )
    return root


def camelyon17(root: Path) -> Path:
    """WILDS: no column names the patches."""
    rows = []
    for i in range(48):
        patient, node, x, y = f"{4 + i // 4:03d}", i % 2, 3328 + 32 * i, 21792 - 16 * i
        name = f"patient_{patient}_node_{node}"
        picture(root / f"patches/{name}/patch_{name}_x_{x}_y_{y}.png", i, (32, 32, 3))
        rows.append(f"{i},{patient},{node},{x},{y},{i // 2 % 2},{i // 4},{i // 4 % 3},{i % 2}")
    table(root / "metadata.csv", ",patient,node,x_coord,y_coord,tumor,slide,center,split", rows)
    (root / "RELEASE_v1.0.txt").write_text("")
    return root


def brats(root: Path) -> Path:
    for i in range(12):
        name = f"BraTS2021_{i:05d}"
        for channel in ("flair", "t1", "t1ce", "t2"):
            volume(root / name / f"{name}_{channel}.nii.gz", i, (20, 20, 16))
        volume(root / name / f"{name}_seg.nii.gz", i, (20, 20, 16), (1, 2, 4) if i % 3 else (1, 2))
    return root


def kits(root: Path) -> Path:
    """KiTS19: 90 of its 300 cases have no segmentation."""
    for i in range(14):
        size = (24 + i % 2 * 8, 24, 16)
        volume(root / f"data/case_{i:05d}/imaging.nii.gz", i, size)
        if i < 12:
            volume(root / f"data/case_{i:05d}/segmentation.nii.gz", i, size, (1, 2) if i % 2 else (1,))
    (root / "data/kits.json").write_text("[]")
    return root


def adni(root: Path) -> Path:
    """ADNIMERGE.csv: several visits of a patient, whose number is there twice."""
    head = "RID,COLPROT,PTID,SITE,VISCODE,EXAMDATE,AGE,PTGENDER,APOE4,ABETA,MMSE,Hippocampus,DX,update_stamp"
    rows = []
    for i in range(60):
        who = i // 2
        rows.append(
            f"{who + 2},ADNI1,{10 + who % 3:03d}_S_{who:04d},{10 + who % 3},{('bl', 'm06')[i % 2]},2005-09-{who % 28 + 1:02d},"
            f"{60 + who % 20}.3,{('Male', 'Female')[who % 2]},{who % 3},{('>1700', '741.5', '')[who % 3]},{20 + who % 10},"
            f"{'' if i % 7 == 0 else 7000 + i},{('CN', 'MCI', 'Dementia', '')[i % 4]},2022-08-22 04:54:{i:02d}.0"
        )
    table(root / "ADNIMERGE.csv", head, rows)
    return root


def oasis_table(root: Path) -> Path:
    openpyxl = pytest.importorskip("openpyxl", reason="needs the tables extra")
    book = openpyxl.Workbook()
    book.active.append(["ID", "M/F", "Hand", "Age", "Educ", "SES", "MMSE", "CDR", "eTIV", "nWBV", "ASF", "Delay"])
    for i in range(40):
        cdr = (0, 0.5, 1, None)[i % 4]
        book.active.append(
            [f"OAS1_{i + 1:04d}_MR1", "MF"[i % 2], "R", 20 + i, 2, None, 29, cdr, 1344 + i, 0.743, 1.306, "N/A"]
        )
    book.save(root / "oasis_cross-sectional.xlsx")
    return root


def oasis_slices(root: Path) -> Path:
    """Slices in folders by dementia, as on Kaggle: the patient is in the file's name only."""
    for i in range(24):
        label = ("Non Demented", "Mild Dementia")[i // 2 % 2]
        picture(root / f"Data/{label}/OAS1_{i // 2 + 1:04d}_MR1_mpr-1_{100 + i}.jpg", i, (40, 36))
    return root


def oasis_volumes(root: Path) -> Path:
    """OASIS-1 as published: Analyze volumes in folders by disc, and a table without paths."""
    rows = []
    for i in range(12):
        who = f"OAS1_{i + 1:04d}_MR1"
        place = root / f"disc{1 + i // 6}/{who}/PROCESSED/MPRAGE/T88_111/{who}_mpr_n4_anon_111_t88_gfc.img"
        place.parent.mkdir(parents=True)
        nibabel.save(nibabel.AnalyzeImage(RNG(i).integers(0, 900, (12, 14, 12)).astype(np.int16), np.eye(4)), place)
        rows.append(f"{who},{'MF'[i % 2]},R,{60 + i},2,3,29,{(0, 0.5)[i % 2]},1344,0.743,1.306,N/A")
    table(root / "oasis_cross-sectional.csv", "ID,M/F,Hand,Age,Educ,SES,MMSE,CDR,eTIV,nWBV,ASF,Delay", rows)
    return root


@dataclass(frozen=True)
class Public:
    """How a set's files are made, and what is in them."""

    make: Callable[[Path], Path]
    task: str
    examples: int
    patients: int | None
    sites: int = 0
    options: dict[str, Any] = field(default_factory=dict)


SETS: dict[str, Public] = {
    "LGG": Public(lgg, "segmentation", 24, 12, options={"images": ["kaggle_3m/{patient}/{case}.tif"]}),
    "ISIC 2018 (segmentation)": Public(isic_segmentation, "segmentation", 12, None),
    "ISIC 2019 (classification)": Public(isic_classification, "multilabel", 24, None),
    "CheXpert": Public(chexpert, "multilabel", 24, 12, options={"patient_pattern": r"(patient\d+)"}),
    "NIH ChestX-ray14": Public(
        nih, "multilabel", 24, 12, options={"images": ["*/images/{Image Index}"], "patient": "Patient ID"}
    ),
    "HAM10000": Public(
        ham10000, "classification", 24, 12, options={"images": ["*/{image_id}.jpg"], "patient": "lesion_id"}
    ),
    "Camelyon17 (WILDS)": Public(
        camelyon17,
        "classification",
        48,
        12,
        sites=3,
        options={
            "images": [
                "patches/patient_{patient}_node_{node}/patch_patient_{patient}_node_{node}_x_{x_coord}_y_{y_coord}.png"
            ],
            "label": "tumor",
        },
    ),
    "BraTS 2021": Public(
        brats,
        "segmentation",
        12,
        12,
        options={
            "images": [f"{{patient}}/{{case}}_{c}.nii.gz" for c in ("flair", "t1", "t1ce", "t2")],
            "mask": "{patient}/{case}_seg.nii.gz",
        },
    ),
    "KiTS19": Public(
        kits,
        "segmentation",
        12,
        12,
        options={
            "images": ["data/{patient}/imaging.nii.gz"],
            "mask": "data/{patient}/segmentation.nii.gz",
            "missing_labels": "drop",
        },
    ),
    "ADNI": Public(
        adni,
        "classification",
        45,
        30,
        sites=3,
        options={
            "label": "DX",
            "patient": "PTID",
            "leave_out": ["RID", "EXAMDATE", "update_stamp"],
        },
    ),
    "OASIS-1 (table)": Public(oasis_table, "classification", 30, 30, options={"label": "CDR", "patient": "ID"}),
    "OASIS (slices by class)": Public(oasis_slices, "classification", 24, 12, options={"patient": r"(OAS1_\d+)"}),
    "OASIS-1 (volumes)": Public(
        oasis_volumes,
        "classification",
        12,
        12,
        options={"images": ["*/{ID}/PROCESSED/MPRAGE/T88_111/{ID}_mpr_n4_anon_111_t88_gfc.hdr"], "label": "CDR"},
    ),
}


def study_of(root: Path) -> tuple[str, Study]:
    text = new_study(recognize(root), study_name(str(root)), 1).text
    return text, study_config.parse(text)


@pytest.mark.parametrize("name", SETS)
def test_check_loader_and_new_study_agree(name: str, tmp_path: Path) -> None:
    public = SETS[name]
    (tmp_path / "data").mkdir()
    root = public.make(tmp_path / "data")
    text, study = study_of(root)
    assert study.task.kind == public.task, text
    assert study.data.options.items() >= public.options.items(), text
    report = check_folder(root)
    assert not [f.message for f in report.findings if f.code in ("study", "unreadable")]
    assert report.examples == public.examples or public.task == "classification" and report.kind == "table"
    assert report.patients == public.patients
    assert len(report.sites) == public.sites
    table = study.data.source().table()
    assert len(table) == public.examples
    assert len(set(table.patients)) == (public.patients or public.examples)
    federation = federate(study.data, 0)
    sets: list[Dataset] = [data for roles in federation.sites.values() for data in roles.values()]
    assert sum(map(len, sets)) == public.examples
    assert "patch" in study.data.options or name != "KiTS19"


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_the_study_runs(name: str, tmp_path: Path) -> None:
    from polyclinic.studies.run.scheduler import run

    (tmp_path / "data").mkdir()
    text, study = study_of(SETS[name].make(tmp_path / "data"))
    events = list(run(study, text, tmp_path / "run"))
    assert {event.label for event in events if event.what == "tested"} == {"local", "pooled", "fedavg"}
