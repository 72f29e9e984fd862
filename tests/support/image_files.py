"""DICOM, NIfTI and NRRD files that the tests make: small, and known to the voxel."""

import gzip
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="needs the dicom extra")
from pydicom.dataset import Dataset as Dataset  # noqa: E402
from pydicom.dataset import FileMetaDataset  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian  # noqa: E402
from pydicom.uid import generate_uid as generate_uid  # noqa: E402

Items = pydicom.Sequence
CT = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
ULTRASOUND = "1.2.840.10008.5.1.4.1.1.6.1"
ULTRASOUND_LOOP = "1.2.840.10008.5.1.4.1.1.3.1"
RADIOGRAPH = "1.2.840.10008.5.1.4.1.1.1.1"


def image(pixels: np.ndarray, modality: str = "CT", sop_class: str = CT, **values: Any) -> Dataset:
    """A data set that shows ``pixels`` ([Y, X], [F, Y, X] or [Y, X, 3]), ready to be saved."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = sop_class
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.Modality, dataset.PatientID, dataset.PatientName = modality, "P1", ""
    color = pixels.ndim == 3 and pixels.shape[-1] == 3 and pixels.dtype == np.uint8
    if pixels.ndim == 3 and not color:
        dataset.NumberOfFrames = pixels.shape[0]
    dataset.Rows, dataset.Columns = pixels.shape[:2] if color else pixels.shape[-2:]
    dataset.SamplesPerPixel = 3 if color else 1
    if color:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = "RGB" if color else "MONOCHROME2"
    bits = pixels.dtype.itemsize * 8
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    data = np.ascontiguousarray(pixels).tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    for name, value in values.items():
        setattr(dataset, name, value)
    return dataset


def series(
    folder: Path,
    volume: np.ndarray,
    step_mm: Sequence[float] = (2.5, 0.5, 0.75),
    turn: np.ndarray | None = None,
    origin: Sequence[float] | np.ndarray = (10.0, -20.0, 30.0),
    **values: Any,
) -> list[Path]:
    """Saves ``volume`` [Z, Y, X], one file a slice, shuffled; ``turn``: the x, y, z directions as columns."""
    turn = np.eye(3) if turn is None else turn
    uid, study, frame = generate_uid(), generate_uid(), generate_uid()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for place, number in enumerate(np.random.default_rng(0).permutation(len(volume))):
        dataset = image(volume[number], SeriesInstanceUID=uid, StudyInstanceUID=study, FrameOfReferenceUID=frame)
        dataset.ImageOrientationPatient = [float(f"{v:.9g}") for v in (*turn[:, 0], *turn[:, 1])]
        position = np.array(origin) + turn[:, 2] * step_mm[0] * number
        dataset.ImagePositionPatient = [float(f"{v:.9g}") for v in position]
        dataset.PixelSpacing, dataset.SliceThickness = [step_mm[1], step_mm[2]], step_mm[0]
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
        for name, value in values.items():
            setattr(dataset, name, value)
        paths.append(folder / f"IM{place:04d}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def oblique(degrees: Sequence[float] = (20.0, -15.0, 35.0)) -> np.ndarray:
    """A rotation matrix away from every axis."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        turn = np.eye(3)
        a, b = [i for i in range(3) if i != axis]
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def enhanced(volume: np.ndarray, heights: Sequence[float], slopes: Sequence[float] | None = None) -> Dataset:
    """An enhanced multi-frame CT: frame k lies at ``heights[k]`` mm."""
    dataset = image(volume, sop_class=ENHANCED_CT)
    shared, measures, turn = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [0.5, 0.75], 1.0
    turn.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Items([measures]), Items([turn])
    dataset.SharedFunctionalGroupsSequence = Items([shared])
    frames = []
    for k, height in enumerate(heights):
        item, place, value = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = [0, 0, float(height)]
        item.PlanePositionSequence = Items([place])
        value.RescaleSlope, value.RescaleIntercept, value.RescaleType = (slopes or [1] * len(heights))[k], -10, "HU"
        item.PixelValueTransformationSequence = Items([value])
        frames.append(item)
    dataset.PerFrameFunctionalGroupsSequence = Items(frames)
    return dataset


def save(dataset: Dataset, path: Path) -> Path:
    """Writes a data set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def nifti_bytes(dims: Sequence[int] = (4, 5, 6), code: int = 4, bits: int = 16, **fields: Any) -> bytes:
    """A NIfTI-1 header and (where the dimensions are sane) voxels that count up, packed by hand from nifti1.h."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, len(dims), *dims, *[1] * (7 - len(dims)))
    struct.pack_into("<2h", header, 70, code, bits)
    struct.pack_into("<8f", header, 76, 1.0, 1.5, 2.0, 2.5, 1, 1, 1, 1)
    struct.pack_into(
        "<3f", header, 108, fields.get("offset", 352.0), fields.get("slope", 1.0), fields.get("inter", 0.0)
    )
    header[123] = fields.get("units", 2)
    struct.pack_into("<2h", header, 252, 0, 1)
    rows = fields.get("affine", ((1.5, 0, 0, -7), (0, 2.0, 0, 8), (0, 0, 2.5, 9)))
    struct.pack_into("<12f", header, 280, *(v for row in rows for v in row))
    header[344:348] = b"n+1\0"
    if "voxels" in fields:
        return bytes(header) + fields["voxels"]
    count = int(np.prod([int(d) for d in dims])) if all(0 < d < 1000 for d in dims) else 0
    return bytes(header) + np.arange(count, dtype="<i2").tobytes()


def nrrd_bytes(volume: np.ndarray, encoding: str = "raw", **fields: str) -> bytes:
    """An NRRD file of ``volume`` [Z, Y, X], little endian, LPS."""
    lines = {
        "type": {"int16": "short", "uint8": "uchar", "float32": "float", "float64": "double"}[str(volume.dtype)],
        "dimension": str(volume.ndim),
        "space": "left-posterior-superior",
        "sizes": " ".join(str(n) for n in reversed(volume.shape)),
        "space directions": "(0.5,0,0) (0,0.75,0) (0,0,2)",
        "space origin": "(1,2,3)",
        "endian": "little",
        "encoding": encoding,
    }
    lines.update({name.replace("_", " "): value for name, value in fields.items()})
    head = "NRRD0004\n" + "".join(f"{name}: {value}\n" for name, value in lines.items() if value) + "\n"
    data = np.ascontiguousarray(volume).tobytes()
    return head.encode() + (gzip.compress(data) if encoding == "gzip" else data)
