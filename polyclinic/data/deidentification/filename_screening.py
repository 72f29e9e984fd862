"""Detection and masking of file names that look like a person, a record number or a date.

Uses patterns and two short word lists, so it has more false alarms than misses, and it misses unusual names in
lowercase. If DICOM headers are present, the check compares with the names in the headers instead.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

_IMAGING = """
abdomen abnormal acc adc adrenal ankle anterior aorta apex arm artery atlas axial background benign bladder
blood body bone bowel brain breast bright bronchi bw camera cancer canon cardiac carotid cell center
cerebellum cervix chase chest class clean clear colon contrast control coronal cortex covid cranial crop cup
cyst dark data delta density dicom diffusion disc disease dose drive dry dwi east echo edema elbow enhanced epi
esophagus eye fast fat femur fibula field fields finger flair flip foot frame front frontal fundus ge gland
grade gray green hand head heart hip hippocampus hospital humerus im image images img inferior inverted
kidney knee label labels large laser lateral left leg lesion level light line liver lobar lobe localizer low
lower lumbar lung lymph macula malignant mammo map mask masks medial medical mni module mouse mri nasal neck
negative nerve nikon nodule normal north ocular optic oral original osaka ovary pancreas part patch pelvis
phantom phase philips photo pleura pneumonia polyp positive post posterior pre prostate raw rectum red renal
rest retina rib right sagittal sample scan scanner scout section seg segmentation series shoulder side siemens
sinus site skin skull slice small soft source south spine spleen split stack stage stain stare std stent stomach
study subject superior t1 t1w t2 t2w task temporal test thorax thyroid tibia tissue topcon toshiba trachea train
training tumor type ultrasound upper uterus val validation valve vein vessel vessels view viral virus
volume west white window wrist xray zeiss zone
"""
_GIVEN_NAMES = """
aaron adam ahmed ali alice amelie amir ana andrea andreas andrew anna anne antonio astrid barbara ben bernard
bob carla carlos carmen caroline charles chen chloe chris christine claire daniel david deborah diana diego
dimitri donna dorothy edward elena elizabeth emily emma eric erik eva fatima felix fernando francesca frank
gabriel george giulia giuseppe grace hannah hans harry hassan heinrich helen henry hiroshi hugo ian ibrahim
ingrid isabel ivan jack jacob james jan jane javier jean jennifer jessica jing joan johan johanna john jonas
jorge jose joseph juan julia karen karl katarina kate keith kevin kim lars laura lena leo linda lisa louis lucas
lucia luis maria marie mario mark marta martin mary matteo matthew max mehmet mei michael miguel mohamed
mohammed monica nadia nancy natalia nicolas nina olga oliver omar pablo patricia paul pedro peter philip pierre
priya rachel rahul raj ravi rebecca ricardo richard robert roberto rosa ruth sam samuel sandra sara sarah sergei
simon sofia sophie stefan stephen steven susan takashi thomas tim tom ursula victor wang wei william yuki yusuf
zhang
"""
_BRITISH = {"centre", "colour", "grey", "tumour", "oesophagus", "oedema"}  # codespell:ignore
_WORDS, _GIVEN = set(_IMAGING.split()) | _BRITISH, set(_GIVEN_NAMES.split())


def in_name(parts: Sequence[str]) -> str | None:
    """Return what a path's parts look like (a person's name, a record number, a date, ...), or None."""
    for part in parts:
        stem = re.sub(r"(\.(nii|csv|tsv))?\.[A-Za-z]{2,5}$", "", part)
        if re.search(r"[A-Za-z]{2,}\^[A-Za-z]*", stem) or re.fullmatch(r"[A-Z][a-z]+, ?[A-Z][a-z]+.*", stem):
            return "a person's name"
        if re.search(r"[\w.+-]+@[\w-]+\.\w{2,}", stem):
            return "an e-mail address"
        if re.search(r"(?<!\d)\d{3}-\d{2}-\d{4}(?!\d)", stem):
            return "a social security number"
        if re.search(r"(?i)(?<![a-z])(mrn|nhs|ssn|cpr|pesel|hosp(ital)?[-_ ]?(no|nr|id))[-_ ]?\d{3,}", stem):
            return "a record number"
        if re.search(r"(?<!\d)(19|20)\d\d([-_.]?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])(?!\d)", stem):
            return "a date"
        research = re.match(r"(?i)(sub|subj|subject|case|participant|img|image|slice)[-_]?\d+", stem)
        uid = re.fullmatch(r"[0-9.]{16,64}", stem)
        if not research and not uid and re.search(r"(?<![\d.])\d{7,12}(?![\d.])", stem):
            return "a record number"
        if _two_names(stem):
            return "a person's name"
    return None


def _two_names(stem: str) -> bool:
    """Return whether two adjacent non-imaging words are both capitalized, or one is a common given name."""
    tokens = re.findall(r"[A-Za-z]+|\d+", stem)
    for first, second in itertools.pairwise(tokens):
        if min(len(first), len(second)) < 3 or not (first + second).isalpha():
            continue
        low = {first.lower(), second.lower()}
        if low & _WORDS:
            continue
        written = all(word.isupper() or word.istitle() for word in (first, second))
        if low & _GIVEN or (written and re.search(rf"{first}[_ ,.-]{{1,2}}{second}", stem) and len(low) == 2):
            return True
    return False


def shown(name: str) -> str:
    """Return a path for a report: a part that looks like a person is reduced to its initials."""
    parts = Path(name).parts
    return "/".join(_masked(part) if in_name([part]) else part for part in parts)


def _masked(part: str) -> str:
    stem, dot, suffix = part.partition(".")
    hidden = re.sub(r"[^\W\d_]+", lambda m: m[0][0] + "*" * (len(m[0]) - 1), stem)
    return re.sub(r"\d", "#", hidden) + dot + suffix
