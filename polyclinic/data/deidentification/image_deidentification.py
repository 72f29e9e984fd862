"""De-identification of one image: pseudonyms, shifted dates, retained elements, and pixels re-encoded without extra
data.

Pseudonyms are HMAC-SHA256 (Krawczyk et al., RFC 2104, 1997) of the original under the site's secret: a patient gets the
same pseudonym in every run at this site, and a guess cannot be tested without the secret. UIDs become ``2.25.<128
bits>`` (PS3.5, B.2) in the same way, so that references between files remain valid. Dates move into the past by 1 to
``shift_days`` days, equally for all dates of one patient, which preserves order, intervals and times of day.

The output is written uncompressed from the retained elements only, so that no preamble, trailing bytes, comments in
compressed frames or overlays in unused bits are copied.
"""

import datetime
import hashlib
import hmac
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from polyclinic.data.deidentification.element_rules import CHARACTERISTICS, PATIENT_ID, PUBLIC_SCHEMES, action
from polyclinic.data.deidentification.residual_scan import Identifiers, collect
from polyclinic.data.formats.dicom.file import PIXELS, quiet, require_pydicom, stored_pixels
from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, refusing
from polyclinic.errors import ConfigError

METHOD = "Polyclinic: PS3.15 Basic, keyed pseudonyms, shifted dates"
BURNED_IN = "burned-in"
_TEXT_LIKELY = ("US", "IVUS", "XA", "RF", "OT", "ES", "XC", "GM", "SC", "DOC", "DG", "OPT", "")
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_CODES = {
    "113100": "Basic Application Confidentiality Profile",
    "113107": "Retain Longitudinal Temporal Information Modified Dates Option",
    "113108": "Retain Patient Characteristics Option",
}
_ESSENTIAL = {
    0x00080060,
    0x00280004,
    PATIENT_ID,
    0x00100010,
    0x00200032,
    0x00200037,
}  # then the file is refused instead
_SEARCHED = ("CS", "LO", "SH", "UC", "ST", "LT", "UT", "IS", "DS", "TM")


@dataclass(frozen=True)
class Deidentification:
    """Decisions of a site about its de-identification.

    Attributes:
        approve: Modalities (``"US"``, ``"XA"``, ...) whose pixels a person has inspected, and ``"burned-in"`` for files
            that state that text is burned in. Such files are refused without approval.
        keep_characteristics: Whether to keep sex, size, weight, and age up to 89 years.
        shift_days: Dates move into the past by 1 to this many days.
    """

    approve: tuple[str, ...] = ()
    keep_characteristics: bool = False
    shift_days: int = 3650

    def __post_init__(self) -> None:
        if not 1 <= self.shift_days <= 36_500:
            raise ConfigError(f"shift_days must be 1 to 36500, not {self.shift_days}")


def letters(data: bytes) -> str:
    """Return two letters from A to P for each byte."""
    return data.hex().translate(str.maketrans("0123456789abcdef", "ABCDEFGHIJKLMNOP"))


@dataclass(frozen=True)
class Pseudonyms:
    """Pseudonyms derived from a site's secret."""

    secret: bytes = field(repr=False)

    def _mac(self, kind: str, text: str) -> bytes:
        return hmac.new(self.secret, f"polyclinic/{kind}/{text}".encode(), hashlib.sha256).digest()

    def patient(self, identifier: str) -> str:
        """Return ``P`` and 16 letters from A to P (64 bits), without digits that could be taken for a record number."""
        return "P" + letters(self._mac("patient", identifier)[:8])

    def folder(self, series: str) -> str:
        """Return ``S`` and 12 letters for a series."""
        return "S" + letters(self._mac("series", series)[:6])

    def uid(self, uid: str) -> str:
        """Return a UID under 2.25 with 128 bits of the code."""
        return f"2.25.{int.from_bytes(self._mac('uid', uid)[:16], 'big')}"

    def days(self, identifier: str, most: int) -> int:
        """Return the number of days, 1 to ``most``, by which this patient's dates move into the past."""
        return 1 + int.from_bytes(self._mac("days", identifier)[:8], "big") % most


@dataclass(frozen=True)
class Cleaned:
    """Image ready for the final scan: the data set, its patient, and the removed elements (tag numbers only)."""

    dataset: Any = field(repr=False)
    pseudonym: str
    patient: str = field(repr=False)
    identifiers: Identifiers
    removed: Counter[int]


def gate(path: Path, dataset: Any, options: Deidentification) -> None:
    """Refuse objects that are not images, and images that may contain text in their pixels unless a person approved
    them.
    """
    if not any(keyword in dataset for keyword in PIXELS):
        raise Unreadable(path, "is not an image (a report, plan or waveform): its text cannot be cleaned")
    modality = str(dataset.get("Modality") or "").upper()
    if modality == "SEG" or "PixelData" not in dataset:
        raise Unreadable(path, "is a segmentation or a floating point map, which is not supported")
    if str(dataset.get("BurnedInAnnotation") or "").upper() == "YES" and BURNED_IN not in options.approve:
        raise Unreadable(path, f"says that text is burned into its pixels; inspect it, then approve {BURNED_IN!r}")
    captured = str(dataset.get("SOPClassUID") or "").startswith(_SECONDARY_CAPTURE) or "ConversionType" in dataset
    kind = "SC" if captured and modality not in options.approve else modality
    if kind in _TEXT_LIKELY and kind not in options.approve:
        named = f"modality {kind}" if re.fullmatch("[A-Z]{2,4}", kind) else "an image of no stated modality"
        raise Unreadable(path, f"is {named}, which often shows names in the picture; inspect it, then approve {kind!r}")


def clean(
    path: Path, dataset: Any, pseudonyms: Pseudonyms, options: Deidentification, limits: Limits = LIMITS
) -> Cleaned:
    """Return a new data set with the permitted parts of ``dataset`` (from ``open_dicom``, with pixels).

    Raises:
        Unreadable: If ``gate`` refuses the file, or its pixels cannot be decoded.
    """
    pydicom = require_pydicom()
    with quiet(), refusing(path, "it could not be de-identified"):
        gate(path, dataset, options)
        pixels = stored_pixels(path, dataset, limits)
        patient = _identity(dataset)
        removed: Counter[int] = Counter()
        walk = _Walk(pseudonyms, options, patient, removed)
        out = walk.dataset(dataset)
        preamble = bytes(getattr(dataset, "preamble", None) or b"").decode("latin-1")
        name = "" if re.fullmatch(r"[0-9.]+", path.stem) else path.stem
        identifiers = collect(dataset, removed, (preamble, name))
        _drop_leftovers(out, identifiers, removed)
        _pixels(path, out, dataset, pixels)
        meta = pydicom.dataset.FileMetaDataset()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = out.SOPClassUID, out.SOPInstanceUID
        out.PatientID = out.PatientName = walk.pseudonym
        out.file_meta, out.preamble = meta, b"\0" * 128
        _say_so(out, options)
    return Cleaned(out, walk.pseudonym, patient, identifiers, removed)


def _identity(dataset: Any) -> str:
    """Return what identifies the patient at this site: the identifier, else name and birth date, else the study."""
    for keywords in (("PatientID",), ("PatientName", "PatientBirthDate"), ("StudyInstanceUID",)):
        text = "/".join(str(dataset.get(keyword) or "").strip() for keyword in keywords)
        if text.strip("/^ "):
            return text
    return "nobody"


class _Walk:
    """Application of the rules to a data set and its nested sequences."""

    def __init__(self, pseudonyms: Pseudonyms, options: Deidentification, patient: str, removed: Counter[int]) -> None:
        self.pseudonyms, self.options, self.removed = pseudonyms, options, removed
        self.pseudonym = pseudonyms.patient(patient)
        self.shift = datetime.timedelta(days=pseudonyms.days(patient, options.shift_days))

    def dataset(self, source: Any) -> Any:
        """Return the permitted elements of one level, without codes that are not from a public coding scheme."""
        pydicom = require_pydicom()
        out = pydicom.Dataset()
        for tag in list(source.keys()):
            if int(tag) in (0x7FE00008, 0x7FE00009, 0x7FE00010):
                continue
            try:
                element = source[tag]
                kept = self._value(element)
            except Exception:  # it cannot be decoded, so it cannot be checked
                kept = None
            if kept is None:
                self.removed[int(tag)] += 1
            else:
                out.add(pydicom.DataElement(tag, element.VR, kept))
        return out

    def _public(self, item: Any) -> bool:
        """Return whether an item is no code, or one of a public scheme: a local code may be a record number."""
        codes = [tag for tag in (0x00080100, 0x00080119, 0x00080120) if tag in item]
        if not codes or str(item.get("CodingSchemeDesignator") or "").strip() in PUBLIC_SCHEMES:
            return True
        self.removed.update(codes)
        return False

    def _value(self, element: Any) -> Any:
        """Return the retained value; None removes the element."""
        what = action(int(element.tag), element.VR, self.options.keep_characteristics)
        value = element.value
        if what == "inside":
            return [self.dataset(item) for item in value or [] if self._public(item)]
        if what == "pseudonym":
            self.removed[int(element.tag)] += 1
            return self.pseudonym
        if what == "characteristic":
            return _characteristic(int(element.tag), value)
        if what == "uid":
            self.removed[int(element.tag)] += 1
            return _each(value, lambda v: v if v.startswith("1.2.840.10008.") else self.pseudonyms.uid(v))
        if what == "date":
            self.removed[int(element.tag)] += 1
            return _each(value, self._moved)
        if what == "empty":
            self.removed[int(element.tag)] += 1
            return ""
        return value if what == "keep" else None

    def _moved(self, text: str) -> str:
        """Return a DA or DT value (PS3.5, 6.2), shifted. A value without a full date becomes empty."""
        match = re.fullmatch(r"(\d{4})\.?(\d{2})\.?(\d{2})(\d{2,6}(\.\d{1,6})?)?([+-]\d{4})?", text)
        if not match:
            return ""
        day = datetime.date(int(match[1]), int(match[2]), int(match[3])) - self.shift
        return f"{day:%Y%m%d}".rjust(8, "0") + (match[4] or "") + (match[6] or "")


def _each(value: Any, change: Any) -> Any:
    if value is None or value == "":
        return ""
    if isinstance(value, str):
        return change(value.strip()) if value.strip() else ""
    return [change(str(v).strip()) for v in value]


def _characteristic(tag: int, value: Any) -> Any:
    """Return sex, size and weight unchanged; ages of 90 and more become 090Y (HIPAA 164.514(b)(2)(i)(C))."""
    if tag not in CHARACTERISTICS or value in (None, ""):
        return None
    if tag != 0x00101010:
        return value
    found = re.fullmatch(r"(\d{3})([DWMY])", str(value))
    return None if not found else "090Y" if found[2] == "Y" and int(found[1]) > 89 else str(value)


def _drop_leftovers(out: Any, identifiers: Identifiers, removed: Counter[int]) -> None:
    """Remove retained text that contains an identifier, at any depth."""
    for tag in list(out.keys()):
        element = out[tag]
        if element.VR == "SQ":
            for item in element.value:
                _drop_leftovers(item, identifiers, removed)
        elif element.VR in _SEARCHED and int(tag) not in _ESSENTIAL and int(tag) >> 16 != 0x0028:
            hit = identifiers.in_text(str(element.value))
            if hit:
                removed[int(tag)] += 1
                del out[tag]


def _pixels(path: Path, out: Any, source: Any, pixels: np.ndarray[Any, Any]) -> None:
    """Write the decoded pixels and the elements that describe them, with unused bits cleared."""
    color, bits = pixels.ndim == 4, pixels.dtype.itemsize * 8
    stored = bits if color else int(source.get("BitsStored") or bits)
    if pixels.dtype.kind == "f" or int(source.get("BitsAllocated") or 0) == 1:
        raise Unreadable(path, "has 1-bit or floating point pixels, which are not supported")
    if not color and int(source.get("HighBit", stored - 1)) != stored - 1:
        raise Unreadable(path, "stores its pixels in the upper bits (an old format), which is not supported")
    if not color and stored < bits:  # the unused bits may contain an overlay
        spare = pixels.dtype.type(bits - stored)
        pixels = np.right_shift(np.left_shift(pixels, spare), spare)  # signed numbers keep their sign
    little = np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder("<"), copy=False))
    out.Rows, out.Columns = pixels.shape[1:3]
    out.SamplesPerPixel = 3 if color else 1
    out.BitsAllocated, out.BitsStored, out.HighBit = bits, stored, stored - 1
    out.PixelRepresentation = int(pixels.dtype.kind == "i")
    if color:
        out.PhotometricInterpretation, out.PlanarConfiguration = "RGB", 0
        for tag in [t for t in out.keys() if int(t) >> 16 == 0x0028 and 0x1101 <= int(t) & 0xFFFF <= 0x1223]:  # noqa: SIM118
            del out[tag]  # palettes are applied
    data = little.tobytes()
    out.add_new(0x7FE00010, "OW" if bits > 8 else "OB", data + b"\0" * (len(data) % 2))


def _say_so(out: Any, options: Deidentification) -> None:
    """Set (0012,0062) to (0012,0064) and (0028,0303)."""
    pydicom = require_pydicom()
    out.PatientIdentityRemoved, out.DeidentificationMethod = "YES", METHOD
    out.LongitudinalTemporalInformationModified = "MODIFIED"
    items = []
    for code, meaning in _CODES.items():
        if code != "113108" or options.keep_characteristics:
            item = pydicom.Dataset()
            item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code, "DCM", meaning[:64]
            items.append(item)
    out.DeidentificationMethodCodeSequence = items
