"""Files of predicted masks and maps, on the grid of their image."""

import gzip
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from polyclinic.core import atomic
from polyclinic.data.files import ImageOptions
from polyclinic.data.formats.dicom.segment_writer import Maker, segmentation_of
from polyclinic.data.formats.nifti import header_of
from polyclinic.data.geometry import Geometry
from polyclinic.studies.inference.reading import Case

NIFTI = (".nii", ".nii.gz")


def is_picture(case: Case, geometry: Geometry) -> bool:
    """Return whether a case is a picture without a position in a patient, so that its mask is a PNG file."""
    volume = geometry.original_mm is not None or len(geometry.axes) > 2
    return not volume and not case.files[0].name.lower().endswith(NIFTI)


def mask_name(case: Case, geometry: Geometry) -> str:
    """Return the name of the file of a case's mask."""
    return f"{case.id}.png" if is_picture(case, geometry) else f"{case.id}.nii.gz"


def write_mask(folder: Path, case: Case, labels: Tensor, geometry: Geometry) -> str:
    """Write the label of each voxel; return the name of the file.

    Args:
        folder: The folder.
        case: The image.
        labels: The labels on its original grid, uint8 or int16. Shape [*original].
        geometry: The geometry of the image.
    """
    name = mask_name(case, geometry)
    if is_picture(case, geometry):
        atomic.write(
            folder / name,
            _png(labels.numpy().astype(np.uint8 if int(labels.numpy().max(initial=0)) < 256 else np.uint16)),
            durable=False,
        )
    else:
        atomic.write(folder / name, _nifti(geometry.in_file(labels).numpy(), case, geometry), durable=False)
    return name


def write_segments(
    folder: Path,
    case: Case,
    labels: Tensor,
    geometry: Geometry,
    names: Sequence[str],
    maker: Maker,
    options: ImageOptions,
) -> str:
    """Write the labels of a DICOM image as a DICOM segmentation; return the name of the file.

    Args:
        folder: The folder.
        case: The image.
        labels: The labels on its original grid, uint8 or int16. Shape [*original].
        geometry: The geometry of the image.
        names: The names of labels 1, 2, ...
        maker: What made the labels.
        options: How the image was read.

    Raises:
        Unreadable: If no segmentation can be made of the image.
    """
    full, how = geometry.in_file(labels).numpy(), (options.series, options.limits, options.geometry_tolerance_mm)
    dataset, buffer = segmentation_of(case.files[0], full, names, maker, *how), io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    atomic.write(folder / f"{case.id}.dcm", buffer.getvalue(), durable=False)
    return f"{case.id}.dcm"


def write_map(folder: Path, case: Case, what: str, values: Tensor, geometry: Geometry) -> str:
    """Write numbers for each voxel, float32; return the name of the file: NIfTI, or ``.npy`` for pictures.

    Args:
        folder: The folder.
        case: The image.
        what: What the numbers are, such as ``"entropy"``, the end of the file's name; empty for the image itself.
        values: Shape [*original], or [C, *original] for the probabilities of classes.
        geometry: The geometry of the image.
    """
    classes, name = values.ndim > len(geometry.original), f"{case.id}-{what}" if what else case.id
    if is_picture(case, geometry):
        buffer = io.BytesIO()
        np.save(buffer, values.float().numpy(), allow_pickle=False)
        atomic.write(folder / f"{name}.npy", buffer.getvalue(), durable=False)
        return f"{name}.npy"
    parts = [geometry.in_file(part).float().numpy() for part in (values if classes else values[None])]
    content = _nifti(np.stack(parts) if classes else parts[0], case, geometry)
    atomic.write(folder / f"{name}.nii.gz", content, durable=False)
    return f"{name}.nii.gz"


def write_picture(folder: Path, case: Case, pixels: "np.ndarray[Any, Any]") -> str:
    """Write a PNG file of [y, x, C], C = 1 or 3, uint8, or uint16 with C = 1; return its name."""
    atomic.write(folder / f"{case.id}.png", _png(pixels[..., 0] if pixels.shape[-1] == 1 else pixels), durable=False)
    return f"{case.id}.png"


def _nifti(array: "np.ndarray[Any, Any]", case: Case, geometry: Geometry) -> bytes:
    """Return a compressed NIfTI file of [(C,) z, y, x], with the header's geometry of the image if it is NIfTI."""
    import nibabel

    data = np.moveaxis(array, 0, -1) if array.ndim > 3 else array
    data = data.transpose(2, 1, 0, *range(3, data.ndim))
    file = case.files[0]
    if file.name.lower().endswith(NIFTI):
        header = header_of(file)
        kind: Any = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
        header.set_data_dtype(data.dtype)
        header["scl_slope"], header["scl_inter"] = 1.0, 0.0
        header["cal_max"] = header["cal_min"] = 0.0
        header["descrip"] = b""
        image = kind(data, header.get_best_affine(), header)
    else:
        image = nibabel.Nifti1Image(data, geometry.matrix.numpy())
        image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)


def _png(pixels: "np.ndarray[Any, Any]") -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
