"""Retinal vessels: patches at full resolution, or at 512 x 512, against images resized to 256 x 256, on the same splits.

    python benchmarks/retina.py prepare DRIVE_AND_CHASE STARE FOLDER
    RETINA=FOLDER python benchmarks/retina.py run [--out runs]
    python benchmarks/retina.py compare [--out runs]

``prepare`` writes the images and masks of three cameras as PNG files, from checkouts of two public repositories:
https://github.com/mipple1986/data (DRIVE and CHASE_DB1) and https://github.com/orobix/retina-unet (STARE, as panels of
image, mask and prediction). ``run`` runs both studies, or continues them. ``compare`` prints Dice on the grid of each
file and the difference of the two studies, as Markdown.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from polyclinic.statistics.paired_tests import corrected_t
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.run_directory import read_tensors
from polyclinic.studies.run.scheduler import run

STUDIES = Path(__file__).parent / "studies"
NAMES = ("retina-resized", "retina-patches", "retina-scaled")
SITES = {"chasedb1": 28, "drive": 40, "stare": 20}


def write(folder: Path, site: str, name: str, image: Image.Image, mask: Image.Image) -> None:
    """Write an image and its mask, 0 and 255, under the same name."""
    for kind, picture in (
        ("images", image.convert("RGB")),
        ("masks", mask.convert("L").point(lambda v: 255 * (v > 127))),
    ):
        (folder / site / kind).mkdir(parents=True, exist_ok=True)
        picture.save(folder / site / kind / f"{name}.png")


def prepare(drive_and_chase: Path, stare: Path, folder: Path) -> None:
    """Write the images of the three cameras, named by patient and eye; "0" if the eye is not known."""
    for part, end in (("training", "training"), ("testing", "test")):
        source = drive_and_chase / "DRIVE" / "datasets" / part
        for image in sorted((source / "images").glob(f"*_{end}.tif")):
            number = image.stem[:2]
            mask = source / "1st_manual" / f"{number}_manual1.gif"
            write(folder, "drive", f"{number}-0", Image.open(image), Image.open(mask))
    for image in sorted((drive_and_chase / "CHASEDB1").glob("Image_*.jpg")):
        name = image.stem.removeprefix("Image_")
        mask = image.with_name(f"{image.stem}_1stHO.png")
        write(folder, "chasedb1", f"{name[:-1]}-{name[-1]}", Image.open(image), Image.open(mask))
    for file in sorted((stare / "STARE_results").glob("im*.png")):
        panel = Image.open(file)
        width, height = panel.width, panel.height // 3
        image, mask = (panel.crop((0, k * height, width, (k + 1) * height)) for k in range(2))
        write(folder, "stare", f"{file.stem[2:]}-0", image, mask)
    for site, count in SITES.items():
        found = len(list((folder / site / "masks").glob("*.png")))
        if found != count:
            raise SystemExit(
                f"{folder / site}: {found} images, not {count}; are these checkouts of the two repositories?"
            )


def dice(out: Path, name: str, seed: int) -> dict[str, np.ndarray]:
    """Return the Dice of each test image, by site."""
    leaves = read_tensors(out / name / "arms" / f"fedavg-seed{seed}" / "predictions.safetensors")
    return {
        key.removesuffix("/dice"): leaf[:, 0].double().numpy()
        for key, leaf in sorted(leaves.items())
        if key.endswith("/dice")
    }


def compare(out: Path) -> None:
    """Print the Dice of all studies and the differences from the first, by site."""
    file = STUDIES / f"{NAMES[0]}.toml"
    study = parse(file.read_text(), file)
    assert not isinstance(study.data.split, str)
    train, _, test = study.data.split
    print("| site | images at 256 x 256 | patches at full resolution | patches at 512 x 512 |\n|---|---|---|---|")
    base, *others = ([dice(out, name, seed) for seed in study.seeds] for name in NAMES)
    for site in (*base[0], "mean over sites"):
        before, cells = _means(base, site), list[str]()
        for seeds in others:
            after = _means(seeds, site)
            found = corrected_t([b - a for a, b in zip(before, after, strict=True)], test, train)
            cells.append(f"{np.mean(after):.3f}, {found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})")
        print(f"| {site} | {np.mean(before):.3f} | {' | '.join(cells)} |")


def _means(seeds: list[dict[str, np.ndarray]], site: str) -> list[float]:
    """Return the mean Dice of a site, or over sites, for each seed."""
    return [
        float(scores[site].mean() if site in scores else np.mean([found.mean() for found in scores.values()]))
        for scores in seeds
    ]


def main() -> None:
    """Prepare the images, run the studies, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("prepare", help="write the images of three cameras")
    for name in ("drive_and_chase", "stare", "folder"):
        making.add_argument(name, type=Path)
    for name, text in (("run", "run or continue both studies"), ("compare", "print both and their difference")):
        commands.add_parser(name, help=text).add_argument(
            "--out", type=Path, default=Path("runs"), help="folder of the run folders"
        )
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.command == "prepare":
        prepare(given.drive_and_chase, given.stare, given.folder)
    elif given.command == "compare":
        compare(given.out)
    else:
        for name in NAMES:
            file, path = STUDIES / f"{name}.toml", given.out / name
            for event in run(parse(file.read_text(), file), file.read_text(), path, resume=path.exists()):
                print(event, flush=True)


if __name__ == "__main__":
    main()
