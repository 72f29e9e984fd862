"""De-identification rules: the action for each DICOM element.

Based on the Basic Application Level Confidentiality Profile, DICOM PS3.15, table E.1-1 (2026c), as tabulated by the
package dicom-anonymizer (Kitware Medical, https://github.com/KitwareMedical/dicom-anonymizer), with the option "Retain
Longitudinal Temporal Information with Modified Dates". Departures, all of which remove more:

* The rules apply at every depth of nested sequences, not only at the top.
* Text that the table does not list is also removed, unless it is on a short list of technical fields; so is everything
  unlisted in the patient's group (0010), and every private, overlay, curve and unknown element.
* Codes of a scheme that is not public (a hospital's own) are removed with their sequence item.
* Binary data that are neither pixels nor a lookup table are removed.
"""

import functools
from typing import Any, Literal

from polyclinic.errors import MissingDependency

Action = Literal["keep", "remove", "empty", "uid", "date", "pseudonym", "inside", "characteristic"]

_TEXT = {"PN", "LO", "SH", "ST", "LT", "UT", "UC", "UR", "AE"}
_BINARY = {"OB", "OW", "OF", "OD", "OL", "OV", "UN"}
PATIENT_ID, PATIENT_NAME, BIRTH_DATE = 0x00100020, 0x00100010, 0x00100030
CHARACTERISTICS = {0x00100040, 0x00101010, 0x00101020, 0x00101030}  # sex, age, size, weight
TECHNICAL = {  # text that describes the machine and the image, not the person or the place
    0x00080005,  # SpecificCharacterSet
    0x00080070,  # Manufacturer
    0x00081090,  # ManufacturerModelName
    0x00181020,  # SoftwareVersions
    0x00180024,  # SequenceName
    0x00181210,  # ConvolutionKernel
    0x00181160,  # FilterType
    0x00181250,  # ReceiveCoilName
    0x00181251,  # TransmitCoilName
    0x00281054,  # RescaleType
    0x00283003,  # LUTExplanation
    0x00281055,  # WindowCenterWidthExplanation
    0x00080100,  # CodeValue
    0x00080102,  # CodingSchemeDesignator
    0x00080103,  # CodingSchemeVersion
    0x00080104,  # CodeMeaning
    0x00080119,  # LongCodeValue
    0x00201040,  # PositionReferenceIndicator
}
PUBLIC_SCHEMES = (
    "DCM",
    "SCT",
    "SRT",
    "SNM3",
    "UCUM",
    "LN",
    "RADLEX",
    "FMA",
    "UMLS",
    "NCIt",
    "ACR",
    "ICD10",
    "BI",
    "MA",
)
_TABLES = {0x00281201, 0x00281202, 0x00281203, 0x00281221, 0x00281222, 0x00281223, 0x00283006}  # lookup tables
_CLASSES = {  # UIDs that name a class of objects, not an object
    0x00020010,
    0x00080016,
    0x00081150,
    0x0008010D,
    0x00080117,
    0x00080118,
    0x0008010C,
}
_DATES = ("DA", "DT")


@functools.cache
def _table() -> tuple[dict[tuple[int, int], str], tuple[tuple[int, int, int, int], ...]]:
    """Return PS3.15's action by tag, and the masked tags (curves, overlays)."""
    try:
        from dicomanonymizer.dicomfields_selector import dicom_anonymization_database_selector
    except ImportError:
        raise MissingDependency("dicom", "de-identification needs dicom-anonymizer") from None
    groups: dict[str, Any] = dicom_anonymization_database_selector("dicomfields_2026c")
    rules: dict[tuple[int, int], str] = {}
    masked: list[tuple[int, int, int, int]] = []
    for name in ("U", "X_Z_U_STAR", "Z", "Z_D", "D", "X_Z", "X_Z_D", "X_D", "X"):
        for tag in groups[f"{name}_TAGS"]:
            if len(tag) == 4:
                masked.append((tag[0], tag[1], tag[2], tag[3]))
            else:
                rules[tag[0], tag[1]] = name
    return rules, tuple(masked)


def action(tag: int, vr: str, keep_characteristics: bool = False) -> Action:
    """Return the action for an element, given its tag as one number and its value representation.

    ``inside`` keeps a sequence and applies the rules to its items; ``characteristic`` marks sex, age, size and weight,
    which are kept only on request.
    """
    group, element = tag >> 16, tag & 0xFFFF
    if tag in (PATIENT_ID, PATIENT_NAME):
        return "pseudonym"
    if tag in CHARACTERISTICS and keep_characteristics:
        return "characteristic"
    if group % 2 or group >> 8 in (0x50, 0x60) or vr == "UN" or group == 0x0002:
        return "remove"
    if group == 0x0010 and tag != BIRTH_DATE:
        return "remove"
    rules, masked = _table()
    if any(group & m[2] == m[0] & m[2] and element & m[3] == m[1] & m[3] for m in masked):
        return "remove"
    rule = rules.get((group, element))
    if vr == "UI":
        return "remove" if rule == "X" else "keep" if tag in _CLASSES else "uid"
    if vr == "SQ":
        return "inside" if rule in (None, "X_Z_U_STAR") else "remove"
    if rule in ("X",):
        return "remove"
    if tag == BIRTH_DATE:
        return "empty"
    if vr in _DATES:
        return "date"  # shifted, which preserves order and intervals
    if vr == "TM":
        return "keep"  # the shift is in whole days
    if rule is not None:
        return "empty" if rule in ("Z", "Z_D", "X_Z", "X_Z_D") else "remove"
    if vr in _TEXT:
        return "keep" if tag in TECHNICAL else "remove"
    if vr in _BINARY:
        return "keep" if tag in _TABLES else "remove"
    return "keep"


def covered() -> int:
    """Return the number of tags that the base table covers."""
    rules, masked = _table()
    return len(rules) + len(masked)
