"""Suspected protected health information: in DICOM headers by tag number, in other formats' free text, and faces.

Reports locations, never values. The screening is not complete: information that is not found may still be present.
Tags: DICOM PS3.15, table E.1-1, those that name a person, a visit or a place, plus every person name (VR PN) and every
private element at any depth.
"""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from polyclinic.data.deidentification.filename_screening import in_name
from polyclinic.data.formats.dicom.file import quiet
from polyclinic.data.formats.pictures import PICTURES
from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, read_text
from polyclinic.data.formats.volume import Volume, canonical

_IDENTIFYING = {
    0x00080050,
    0x00080080,
    0x00080081,
    0x00080090,
    0x00080092,
    0x00080094,
    0x00081010,
    0x00081040,
    0x00081048,
    0x00081050,
    0x00081060,
    0x00081070,
    0x00100010,
    0x00100020,
    0x00100021,
    0x00100030,
    0x00100032,
    0x00100050,
    0x00101000,
    0x00101001,
    0x00101005,
    0x00101040,
    0x00101060,
    0x00101090,
    0x00102150,
    0x00102152,
    0x00102154,
    0x00102160,
    0x00102180,
    0x001021B0,
    0x001021F0,
    0x00104000,
    0x00120040,
    0x00181000,
    0x00200010,
    0x00204000,
    0x00321032,
    0x00380010,
    0x00380300,
    0x00380400,
    0x00400006,
    0x00401001,
    0x00402016,
    0x00402017,
    0x40080114,
}
PRIVATE = -1
PREAMBLE = -2
OVERLAY = -3
_PSEUDONYM = (0x00100010, 0x00100020)  # allowed if (0012,0062) states that the identity was removed
TEXT_LIKELY = ("US", "IVUS", "XA", "RF", "OT", "ES", "XC", "GM", "SC", "DOC")
_SIDECAR = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "InstitutionName",
    "InstitutionAddress",
    "AccessionNumber",
    "ReferringPhysicianName",
    "OperatorsName",
    "DeviceSerialNumber",
    "AcquisitionDateTime",
)
_EXIF = {
    270: "ImageDescription",
    315: "Artist",
    33432: "Copyright",
    34853: "GPS",
    37510: "UserComment",
    40091: "XPTitle",
    40092: "XPComment",
    40093: "XPAuthor",
    42016: "ImageUniqueID",
    42032: "CameraOwnerName",
}


def tags_of(dataset: Any) -> set[int]:
    """Return the suspicious tags of a header, at any depth: tag numbers, and ``PRIVATE``, ``PREAMBLE``, ``OVERLAY``."""
    found: set[int] = set()
    with quiet():
        removed = str(dataset.get("PatientIdentityRemoved") or "").upper() == "YES"
        _look(dataset, found)
        if any(bytes(getattr(dataset, "preamble", None) or b"")):
            found.add(PREAMBLE)
    return found - set(_PSEUDONYM) if removed else found


def _look(dataset: Any, found: set[int]) -> None:
    for tag in list(dataset.keys()):
        number = int(tag)
        if tag.is_private:
            found.add(PRIVATE)
            continue
        if tag.group >> 8 == 0x60:
            found.add(OVERLAY)
            continue
        try:
            element = dataset[tag]
            if element.VR == "SQ":
                for item in element.value or []:
                    _look(item, found)
            elif (number in _IDENTIFYING or element.VR == "PN") and str(element.value or "").strip("^ ="):
                found.add(number)
        except Exception:  # it cannot be decoded; the reader reports it
            found.add(number)


def burned_in(dataset: Any) -> str | None:
    """Return why text may be drawn into the pixels: the file states it, or its modality often has it. None
    otherwise.
    """
    with quiet():
        flag = str(dataset.get("BurnedInAnnotation") or "").upper()
        modality = str(dataset.get("Modality") or "").upper()
        captured = str(dataset.get("SOPClassUID") or "").startswith("1.2.840.10008.5.1.4.1.1.7")
    if flag == "YES":
        return "says that text is burned into its pixels, (0028,0301)"
    if flag != "NO" and (captured or modality in TEXT_LIKELY):
        return "is of a kind that often shows text in the picture, and (0028,0301) does not say NO"
    return None


def name_of_tag(tag: int) -> str:
    """Return ``(0010,0010)``, or the meaning of the special values."""
    special = {PRIVATE: "private elements", PREAMBLE: "the 128-byte preamble", OVERLAY: "overlays (60xx)"}
    return special.get(tag) or f"({tag >> 16:04x},{tag & 0xFFFF:04x})"


def in_nifti(path: Path) -> list[str]:
    """Return header fields of a NIfTI file whose free text looks like a person, and DICOM data in its extensions."""
    try:
        with open(path, "rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            head = (gzip.GzipFile(fileobj=plain) if packed else plain).read(364)
    except (OSError, EOFError):
        return []
    if len(head) < 352 or head[344:347] != b"n+1":
        return []
    fields = {"db_name": head[14:32], "descrip": head[148:228], "aux_file": head[228:252], "intent_name": head[328:344]}
    found = [
        name for name, raw in fields.items() if in_name([raw.split(b"\0")[0].decode("latin-1").strip()]) is not None
    ]
    if head[348:349] not in (b"", b"\0"):
        code = int.from_bytes(head[356:360], "little") if len(head) >= 360 else 0
        found.append("a DICOM extension" if code == 2 else "an extension")
    return found


def in_picture(path: Path) -> list[str]:
    """Return metadata of a picture that may name a person: EXIF tags by name, comments."""
    if path.suffix.lower() not in PICTURES:
        return []
    from PIL import Image

    try:
        with Image.open(path) as picture:
            tags = set(picture.getexif())
            text = [
                key
                for key in picture.info
                if key.lower() in ("comment", "author", "description", "title", "xml:com.adobe.xmp")
            ]
    except Exception:  # the reader reports the problem
        return []
    return sorted({name for tag, name in _EXIF.items() if tag in tags} | {f"text ({key})" for key in text})


def in_sidecar(path: Path, limits: Limits = LIMITS) -> list[str]:
    """Return keys of a BIDS sidecar (JSON) that name a person, a visit or a place."""
    try:
        sidecar = json.loads(read_text(path, limits))
    except (Unreadable, ValueError, RecursionError):
        return []
    return [key for key in _SIDECAR if isinstance(sidecar, dict) and sidecar.get(key)]


def may_show_a_face(volume: Volume, hints: str) -> bool:
    """Return whether a volume may show the face of a head, judged from hints and from where the volume has content.

    Args:
        volume: Volume in any orientation.
        hints: Body part and file name, in any case.

    Returns:
        False if the hints name no head, if the field of view is too small, or if the front lower quarter contains one
        value only (defaced or skull-stripped).
    """
    head = re.search(r"(?i)head|brain|skull|face|t1w|t2w|flair|mprage|neuro", hints) is not None
    if not head or volume.array.ndim != 3 or not volume.measured or min(volume.size) < 8:
        return False
    upright = canonical(volume)
    high, deep, _ = (n * s for n, s in zip(upright.size, upright.spacing_mm, strict=True))
    if high < 120 or deep < 150 or max(upright.spacing_mm) > 8:
        return False
    z, y, x = upright.size
    front = upright.array[: z // 2, int(y * 0.7) :, x // 4 : 3 * x // 4].numpy()
    values, counts = np.unique(front.ravel()[:: max(1, front.size // 20_000)], return_counts=True)
    return bool(len(values) > 1 and counts.max() < 0.98 * counts.sum())
