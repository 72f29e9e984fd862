"""From files to tensors: how fast each format is read the first time, from the cache, and in every further epoch.

Files are made for the purpose and thrown away. One JSON object a line: name, value, goal, met.

* ``<format>.cold`` and ``<format>.warm``: images a second, of a source that is new, and of one that finds its images in
  the cache (content hashes included in both). No goal: machines differ.
* ``<format>.decode.over_bare``: the CPU time of reading the files into tensors as a study without steps does (pictures of
  8 bits stay bytes), with all checks, over that of a bare loop with the format's own decoder, measured in alternation.
  Goal: at most 2. Slices and pictures have 512 x 512 pixels, as CT
  has; checks take the same time for files of any size, so smaller ones have higher ratios (``--small``: 256 x 256).
* ``<format>.floats.over_bare``: the same with pictures of 8 bits turned into floats of 0 to 1, as studies with steps need
  them. No goal: the decoder's loop does not make floats.
* ``<format>.cold.over_bare``: the CPU time of the cold reading, with its checks, hashing and the writing of the cache,
  over that of a bare loop with the format's own decoder, measured in alternation. No goal: it is paid once.
* ``<format>.warm.over_read``: the wall time of the warm reading over that of reading and hashing the files and the
  cache with nothing else. No goal: paid once a study.
* ``epoch.<kind>.over_bare``: an epoch of batches from ``Examples`` over indexing bare tensors. Goal: at most 1.1.

    python benchmarks/decoding.py [--quick] [--small] [FORMAT...]
"""

import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from polyclinic.data.examples import Examples
from polyclinic.data.files import read_image
from polyclinic.data.sources.folders import Folders
from polyclinic.data.sources.manifest import Manifest
from polyclinic.data.sources.npz import Npz

torch.set_num_threads(1)
QUICK = "--quick" in sys.argv
SIDE = 256 if "--small" in sys.argv else 512
COUNT, REPEATS = (40, 3) if QUICK else (200, 5)
DICE = np.random.default_rng(0)


def said(name: str, value: float, goal: float | None = None) -> None:
    """One line; ``goal`` is the most that the value may be."""
    met = None if goal is None else bool(value <= goal)
    print(json.dumps({"name": name, "value": round(value, 3), "goal": goal, "met": met}), flush=True)


def smooth(*shape: int) -> Any:
    """A picture that compresses as medical images do: smooth, with a little noise."""
    axes = np.meshgrid(*(np.linspace(0, 6, n) for n in shape), indexing="ij")
    image = np.sum([np.sin(a + DICE.uniform(0, 6)) for a in axes], axis=0)
    return image / len(shape) * 100 + 128 + DICE.normal(0, 3, shape)


def pictures(root: Path, ending: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Square gray pictures in class folders: our source, and Pillow in a loop."""
    for i in range(COUNT):
        path = root / "ab"[i % 2] / f"{i:04d}{ending}"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(smooth(SIDE, SIDE).clip(0, 255).astype(np.uint8)).save(path)
    return lambda: Folders(str(root)), lambda: [np.asarray(Image.open(p)) for p in sorted(root.rglob(f"*{ending}"))]


def listed(root: Path, ending: str) -> Callable[[], Any]:
    """A manifest of the files with this ending."""
    rows = [f"{p.name},{i % 2},p{i}" for i, p in enumerate(sorted(root.glob(f"*{ending}")))]
    (root / "list.csv").write_text("\n".join(["path,label,patient", *rows]))
    return lambda: Manifest(str(root / "list.csv"))


def nifti(root: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """64 x 64 x 32 gzipped volumes of int16: our source, and nibabel in a loop."""
    import nibabel

    for i in range(COUNT):
        nibabel.save(nibabel.Nifti1Image(smooth(64, 64, 32).astype(np.int16), np.eye(4)), root / f"{i:04d}.nii.gz")

    def bare() -> list[np.ndarray]:
        return [np.asarray(nibabel.load(p).dataobj) for p in sorted(root.glob("*.nii.gz"))]

    return listed(root, ".nii.gz"), bare


def dicom(root: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Square CT slices, not compressed: our source, and pydicom in a loop."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    for i in range(COUNT):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = generate_uid(), ExplicitVRLittleEndian
        one = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        one.SOPClassUID, one.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        one.PatientID, one.SeriesInstanceUID, one.Modality = f"p{i}", generate_uid(), "CT"
        one.Rows = one.Columns = SIDE
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.RescaleSlope, one.RescaleIntercept, one.PixelSpacing = 1, -1024, [0.7, 0.7]
        one.ImagePositionPatient, one.ImageOrientationPatient = [0, 0, i], [1, 0, 0, 0, 1, 0]
        one.PixelData = smooth(SIDE, SIDE).astype(np.int16).tobytes()
        one.save_as(root / f"{i:04d}.dcm", enforce_file_format=True)
    return listed(root, ".dcm"), lambda: [pydicom.dcmread(p).pixel_array for p in sorted(root.glob("*.dcm"))]


def archive(root: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """28 x 28 images in a compressed archive: our source, and NumPy."""
    images = np.stack([smooth(28, 28).clip(0, 255).astype(np.uint8) for _ in range(COUNT * 10)])
    np.savez_compressed(root / "x.npz", images=images, labels=np.arange(len(images)) % 2)

    def bare() -> Any:
        with np.load(root / "x.npz") as found:
            return found["images"], found["labels"]

    return lambda: Npz(str(root / "x.npz")), bare


FORMATS: dict[str, Callable[[Path], tuple[Callable[[], Any], Callable[[], Any]]]] = {
    "png": lambda root: pictures(root, ".png"),
    "jpeg": lambda root: pictures(root, ".jpg"),
    "tiff": lambda root: pictures(root, ".tif"),
    "nifti": nifti,
    "dicom": dicom,
    "npz": archive,
}


def all_of(source: Any) -> Examples:
    """Every example of a source."""
    examples: Examples = source.examples(source.table().ids)
    return examples


def clocked(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """How long one call takes."""
    before = clock()
    call()
    return clock() - before


def read_and_hashed(*folders: Path) -> None:
    """Reads every file, and hashes it."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                hashlib.sha256(path.read_bytes()).digest()


def one_format(name: str, make: Callable[[Path], tuple[Callable[[], Any], Callable[[], Any]]]) -> None:
    """Cold and warm times, each with its lower limit."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "files"
        root.mkdir()
        ours, bare = make(root)
        files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix not in (".csv", ".npz"))
        decode, floats, cold, over_bare, warm, over_read = [], [], [], [], [], []
        for k in range(REPEATS):
            cache = Path(place) / f"cache{k}"
            os.environ["POLYCLINIC_CACHE"] = str(cache)
            floor = clocked(bare, time.process_time)
            if files:
                took = clocked(lambda: [read_image([path], as_bytes=True).pixels for path in files], time.process_time)
                decode.append(took / floor)
                took = clocked(lambda: [read_image([path]).pixels for path in files], time.process_time)
                floats.append(took / floor)
            wall, cpu = time.perf_counter(), time.process_time()
            n = len(all_of(ours()))
            cold.append(n / (time.perf_counter() - wall))
            over_bare.append((time.process_time() - cpu) / floor)
            folders = [root, cache] if cache.is_dir() else [root]
            floor = clocked(lambda folders=folders: read_and_hashed(*folders))  # type: ignore[misc]
            took = clocked(lambda: all_of(ours()).inputs.sum())
            warm.append(n / took)
            over_read.append(took / floor)
    said(f"{name}.cold", statistics.median(cold))
    said(f"{name}.warm", statistics.median(warm))
    if decode:
        said(f"{name}.decode.over_bare", statistics.median(decode), 2)
        said(f"{name}.floats.over_bare", statistics.median(floats))
    said(f"{name}.cold.over_bare", statistics.median(over_bare))
    if name != "npz":  # an archive is decoded anew each time: it is faster than a cache would be
        said(f"{name}.warm.over_read", statistics.median(over_read))


def epochs() -> None:
    """Batches of 32 in random order, as training asks for them."""
    n = COUNT * 20
    for kind, inputs in (
        ("bytes", torch.randint(0, 256, (n, 1, 64, 64), dtype=torch.uint8)),
        ("floats", torch.rand(n, 1, 64, 64)),
    ):
        names = tuple(map(str, range(n)))
        targets = torch.zeros(n, dtype=torch.int64)
        examples = Examples(inputs, targets, names, names)
        order = torch.randperm(n).split(32)

        def plain(index: torch.Tensor, inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> Any:
            x = inputs[index]
            return x.float().div_(255) if x.dtype == torch.uint8 else x, targets[index]

        def bare(order: Any = order, one: Any = plain) -> None:
            for index in order:
                _x, _y = one(index)

        def ours(examples: Examples = examples, order: Any = order) -> None:
            for index in order:
                _x, _y = examples[index]

        for _ in range(3):
            bare(), ours()
        ratios = [clocked(ours) / clocked(bare) for _ in range(REPEATS * 10)]
        said(f"epoch.{kind}.over_bare", statistics.median(ratios), 1.1)


if __name__ == "__main__":
    chosen = [a for a in sys.argv[1:] if not a.startswith("-")]
    for name, make in FORMATS.items():
        if not chosen or name in chosen:
            one_format(name, make)
    if not chosen or "epoch" in chosen:
        epochs()
