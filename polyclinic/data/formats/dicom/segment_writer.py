"""Writer of masks as DICOM segmentations (SEG), for display and storage next to the images that they belong to.

Standard: DICOM PS3.3, A.51 and C.8.20. Frames take their position, orientation and pixel size from the frames of the
image, as these state them, and refer to them. highdicom (https://highdicom.readthedocs.io) builds the objects.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from polyclinic.data.formats.dicom.file import open_dicom, quiet, states
from polyclinic.data.formats.dicom.geometry import frame_planes, plane_of, stack
from polyclinic.data.formats.dicom.series import Series, chosen_series, header_of
from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable, refusing
from polyclinic.errors import MissingDependency

_TYPE_2 = (
    "AccessionNumber",
    "PatientBirthDate",
    "PatientID",
    "PatientName",
    "PatientSex",
    "ReferringPhysicianName",
    "StudyDate",
    "StudyID",
    "StudyTime",
)
"""Elements that a segmentation repeats from its image, and that the standard allows to be empty."""
LONGEST_NAME = 64
SERIES_NUMBER = 1000


@dataclass(frozen=True)
class Maker:
    """What made a segmentation, as its header states it.

    Attributes:
        model: Name of the model.
        version: Version of the program.
        identity: Hash that identifies the model.
    """

    model: str
    version: str
    identity: str


def require_writer() -> None:
    """Check that highdicom is installed.

    Raises:
        MissingDependency: If it is not.
    """
    try:
        import highdicom  # noqa: F401
    except ImportError:
        raise MissingDependency("dicom-seg", "writing DICOM segmentations needs highdicom") from None


def segmentation_of(
    path: Path,
    labels: "np.ndarray[Any, Any]",
    names: Sequence[str],
    maker: Maker,
    wanted: Mapping[str, str] = MappingProxyType({}),
    limits: Limits = LIMITS,
    tolerance_mm: float | None = None,
) -> Any:
    """Return the segmentation of an image, as a pydicom data set to be saved.

    Args:
        path: The DICOM file of the image, or the folder of its series.
        labels: The label of each voxel on the grid of the reader: whole numbers [Z, Y, X], 0 for the background.
        names: The names of labels 1, 2, ..., each of which is a segment, also if no voxel has it.
        maker: What made the labels.
        wanted: The values by which the series is selected, as for ``read_dicom``.
        limits: Limits on each file.
        tolerance_mm: Largest deviation of a slice from its place in an even stack; None for the default.

    Raises:
        MissingDependency: If highdicom is not installed.
        Unreadable: If the image is refused, has another grid, or lacks what a segmentation must repeat.
    """
    require_writer()
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    sources, order = _sources(path, wanted, limits, tolerance_mm)
    size = (len(order), int(sources[0].Rows), int(sources[0].Columns))
    if labels.shape != size:
        raise Unreadable(path, f"has {_sides(size)} voxels, and its mask {_sides(labels.shape)}")
    masks = np.empty(size, np.uint16 if len(names) > 255 else np.uint8)
    masks[order] = labels
    algorithm = AlgorithmIdentificationSequence(
        maker.model[:LONGEST_NAME], codes.DCM.ArtificialIntelligence, maker.version, source="Polyclinic"
    )
    segments = [
        SegmentDescription(
            number,
            name[:LONGEST_NAME],
            codes.SCT.AnatomicalStructure,  # a study names its classes and has no codes for them
            codes.SCT.AnatomicalStructure,
            SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm,
        )
        for number, name in enumerate(names, 1)
    ]
    unique = [str(sources[0].SOPInstanceUID), maker.identity]
    with quiet(), refusing(path, "its header is not one of which a segmentation can be made"):
        return Segmentation(
            sources,
            masks,
            SegmentationTypeValues.BINARY,
            segments,
            series_instance_uid=generate_uid(entropy_srcs=[*unique, "series"]),
            series_number=SERIES_NUMBER,
            sop_instance_uid=generate_uid(entropy_srcs=[*unique, "instance"]),
            instance_number=1,
            manufacturer="Polyclinic",
            manufacturer_model_name=maker.model[:LONGEST_NAME],
            software_versions=maker.version,
            device_serial_number=maker.identity[:16],
            series_description="Predicted masks",
            omit_empty_frames=bool(masks.any()),
        )


def _sources(
    path: Path, wanted: Mapping[str, str], limits: Limits, tolerance_mm: float | None
) -> tuple[list[Any], list[int]]:
    """Return the image's data sets without pixels, and for each slice of the volume the index of its frame."""
    series = chosen_series(path, limits, wanted) if path.is_dir() else Series((path,), "", "")
    datasets = [open_dicom(file, pixels=False, limits=limits) for file in series.paths]
    for file, dataset in zip(series.paths, datasets, strict=True):
        for name in _TYPE_2:
            if name not in dataset:
                setattr(dataset, name, "")
        if missing := [name for name in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID") if name not in dataset]:
            raise Unreadable(file, f"has no {missing[0]}, which a segmentation must repeat")
    first, frames = datasets[0], int(datasets[0].get("NumberOfFrames") or 1)
    header = header_of(series.paths[0], first, limits, grouping=False)
    if header is None:
        raise Unreadable(series.paths[0], "contains no image")
    with quiet(), refusing(series.paths[0], "its functional groups are damaged"):
        if len(datasets) == 1:
            planes = frame_planes(series.paths[0], first, frames, header.plane)
        else:
            found = [plane_of(file, dataset) for file, dataset in zip(series.paths, datasets, strict=True)]
            planes = [plane for plane in found if plane is not None]
    if planes is None:
        return datasets, list(range(frames))
    if not states(first, "FrameOfReferenceUID"):
        raise Unreadable(
            series.paths[0], "states positions and no FrameOfReferenceUID, which a segmentation must repeat"
        )
    order, _, _ = stack(series.paths[0], planes, tolerance_mm)
    if len(datasets) == 1:
        return datasets, order
    return [datasets[i] for i in order], list(range(len(datasets)))


def _sides(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
