"""Time and memory of patches from cases on disk: CPU milliseconds per patch, bytes read, and anonymous memory.

    python benchmarks/patches.py [--folder /tmp/patches] [--cases 10] [--draws 100]

Volumes of 256 x 256 x 128 in two bytes per voxel, with a mask, are generated; patches of 96 x 96 x 96 voxels are drawn
from them with their masks, warm (in the page cache) and cold (dropped from it). The last line is one volume of
512 x 512 x 300. One thread. Wanted: at most 5 ms of CPU time for a warm patch of 96³, 20 ms for a cold one of the large
volume, of which at most 20 MiB are read.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch

from polyclinic.data.cases import case_file
from polyclinic.data.cases.case_file import CaseFile, Prepared
from polyclinic.data.cases.cases import Cases
from polyclinic.data.formats.value_ranges import ValueRange
from polyclinic.data.preprocessing.sample import Picture


def made(path: Path, size: tuple[int, ...], seed: int) -> CaseFile:
    """Return a stored volume of whole numbers with two classes."""
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randint(-1024, 3000, (1, *size), generator=rng, dtype=torch.int16).float()
    mask = torch.zeros(size, dtype=torch.int64)
    mask[tuple(slice(n // 3, n // 2) for n in size)] = 1
    mask[tuple(slice(n // 2, n // 2 + 8) for n in size)] = 2
    case_file.write(path, Prepared(Picture(pixels, mask), ValueRange("", False, None, -1024, 3000), (0, 1, 2)))
    case = case_file.opened(path)
    assert case is not None
    return case


def drop(files: list[CaseFile]) -> None:
    """Remove the files from the page cache."""
    for file in files:
        handle = os.open(file.path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_bytes() -> int:
    """Return how many bytes this process has read from the disk."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def measure(cases: Cases, size: tuple[int, ...], draws: int, cold: bool) -> tuple[float, float, float]:
    """Return CPU milliseconds, wall milliseconds and MiB read from the disk, per patch."""
    rng = torch.Generator().manual_seed(0)
    cpu = wall = read = 0.0
    for k in range(draws):
        if cold:
            drop(list(cases.files))
        begin = time.process_time(), time.perf_counter(), read_bytes()
        cases.draw(k % len(cases), rng, k % 3 == 0, size)
        cpu, wall = cpu + time.process_time() - begin[0], wall + time.perf_counter() - begin[1]
        read += read_bytes() - begin[2]
    return 1e3 * cpu / draws, 1e3 * wall / draws, read / draws / 2**20


def main() -> None:
    """Generate, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--draws", type=int, default=100)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for size, count, patches in (
            ((128, 256, 256), given.cases, ((96, 96, 96), (128, 128, 128))),
            ((300, 512, 512), 1, ((96, 160, 160),)),
        ):
            begin = time.process_time()
            files = [made(Path(folder) / f"{size[0]}-{i}.safetensors", size, i) for i in range(count)]
            spent = (time.process_time() - begin) / count
            print(f"{' x '.join(map(str, size))}: {spent:.2f} s of CPU time to generate and store a case")
            for patch in patches:
                names = tuple(map(str, range(count)))
                cases = Cases(tuple(files), patch, 1, names, names)
                measure(cases, patch, 2 * count, False)
                for cold in (False, True):
                    cpu, wall, read = measure(cases, patch, given.draws // (4 if cold else 1), cold)
                    print(
                        f"  {' x '.join(map(str, patch))} {'cold' if cold else 'warm'}: {cpu:.1f} ms CPU, "
                        f"{wall:.1f} ms wall, {read:.1f} MiB read"
                    )
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(f"anonymous memory: {int(status['RssAnon'].split()[0]) / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
