"""Retinal vessels: patches at full resolution against images resized to 256 x 256, on the same splits.

    python benchmarks/retina.py prepare DRIVE_AND_CHASE STARE FOLDER
    python benchmarks/retina.py ceiling FOLDER
    RETINA=FOLDER python benchmarks/retina.py run [--out runs] [--patches retina-patches] [--seeds 201 202 ...]
    python benchmarks/retina.py compare [--out runs] [--patches retina-patches] [--seeds 201 202 ...]

``prepare`` writes the images and masks of three cameras as PNG files, from checkouts of two public repositories:
https://github.com/mipple1986/data (DRIVE and CHASE_DB1) and https://github.com/orobix/retina-unet (STARE, as panels of
image, mask and prediction). ``ceiling`` prints the Dice that remains when the true masks are resized and brought back.
``run`` runs both studies, or continues them. ``compare`` prints Dice on the grid of each file and the difference of the
two studies, as Markdown. The study of patches is retina-patches or retina-common-scale; the seeds are those of its file,
for both studies, unless others are given.
"""

import argparse
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from polyclinic.data.files import read_image
from polyclinic.data.preprocessing.sample import Picture
from polyclinic.data.preprocessing.transforms import Resize
from polyclinic.learning.tasks.segmentation import agreement
from polyclinic.statistics.multiple_tests import holm
from polyclinic.statistics.paired_tests import Difference, corrected_t
from polyclinic.studies.config.study_config import Study, parse
from polyclinic.studies.run.run_directory import read_tensors
from polyclinic.studies.run.scheduler import run

STUDIES = Path(__file__).parent / "studies"
RESIZED, PATCHES = "retina-resized", ("retina-patches", "retina-common-scale")
OVERALL = "mean over sites"
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


def ceiling(folder: Path) -> None:
    """Print the Dice on the grid of the files of the true masks after resizing and back, by site."""
    sizes = (256, 512, 576)
    print("| site | " + " | ".join(f"labels at {size} x {size} | shares at {size} x {size}" for size in sizes) + " |")
    print("|" + "---|" * (1 + 2 * len(sizes)))
    rows = dict[str, np.ndarray]()
    for site in SITES:
        pairs = [(file, folder / site / "masks" / file.name) for file in sorted((folder / site / "images").glob("*"))]
        pictures = (_true(read_image((file,), mask)) for file, mask in pairs)
        rows[site] = np.mean([[d for size in sizes for d in _resized(picture, size)] for picture in pictures], axis=0)
    for site, found in (*rows.items(), (OVERALL, np.mean(list(rows.values()), axis=0))):
        print(f"| {site} | {' | '.join(f'{value:.3f}' for value in found)} |")


def _true(picture: Picture) -> Picture:
    """Return a picture whose mask marks vessels with 1, and whose pixels are the mask."""
    assert picture.mask is not None
    vessels = (picture.mask > 0).long()
    return replace(picture, mask=vessels, pixels=vessels[None].float())


def _resized(picture: Picture, size: int) -> tuple[float, float]:
    """Return the Dice of two predictions on a grid of ``size`` x ``size`` pixels with the mask of the file.

    The first is certain of the resized mask, which a study trains on. The second gives each pixel of the grid its share
    of vessels as probability.
    """
    done = Resize(size)(picture)
    assert picture.mask is not None
    assert done.mask is not None
    assert done.geometry is not None
    shares = done.pixels[0].clamp(1e-4, 1 - 1e-4)
    found = []
    for probability in (done.mask * 0.9998 + 1e-4, shares):
        labels = done.geometry.labels(torch.stack([(1 - probability).log(), probability.log()]))
        found.append(float(agreement(labels[None].long(), picture.mask[None], 2)["dice"]))
    return found[0], found[1]


def dice(out: Path, name: str, seed: int) -> dict[str, np.ndarray]:
    """Return the Dice of each test image, by site."""
    leaves = read_tensors(_predictions(out / name, seed))
    return {
        key.removesuffix("/dice"): leaf[:, 0].double().numpy()
        for key, leaf in sorted(leaves.items())
        if key.endswith("/dice")
    }


def compare(out: Path, patches: str, seeds: list[int]) -> None:
    """Print the Dice of both studies and their difference: over sites, which is primary, and by site."""
    study, _ = _study(patches, seeds)
    assert not isinstance(study.data.split, str)
    train, _, test = study.data.split
    names = (RESIZED, patches)
    finished = [seed for seed in seeds if all(_predictions(out / name, seed).is_file() for name in names)]
    if finished != seeds:
        print(f"Not finished: {len(finished)} of {len(seeds)} splits.\n")
    if len(finished) < 2:
        return
    scores = [[dice(out, name, seed) for seed in finished] for name in names]
    means = {site: (_means(scores[0], site), _means(scores[1], site)) for site in (OVERALL, *SITES)}
    found = {
        site: corrected_t([b - a for a, b in zip(*pair, strict=True)], test, train) for site, pair in means.items()
    }
    adjusted = dict(zip(SITES, holm([_p(found[site]) for site in SITES]), strict=True))
    print("| site | images at 256 x 256 | patches | difference (95 % interval) | p |")
    print("|---|---|---|---|---|")
    for site, (before, after) in means.items():
        d, p = found[site], adjusted.get(site, _p(found[site]))
        cells = f"{np.mean(before):.3f} | {np.mean(after):.3f} | {_interval(d)}"
        print(f"| {site} | {cells} | {p:.4f}{' (Holm)' if site in adjusted else ''} |")
    print("\n| split | " + " | ".join(map(str, finished)) + " |\n" + "|---|" + "---|" * len(finished))
    for title, values in zip(("resized", "patches"), means[OVERALL], strict=True):
        print(f"| {title}, {OVERALL} | " + " | ".join(f"{value:.3f}" for value in values) + " |")


def _p(difference: Difference) -> float:
    return 1.0 if difference.p is None else difference.p


def _interval(d: Difference) -> str:
    return (
        f"not known ({d.why})" if d.low is None or d.high is None else f"{d.value:+.3f} ({d.low:+.3f} to {d.high:+.3f})"
    )


def _study(name: str, seeds: list[int] | None = None) -> tuple[Study, str]:
    """Return a study and its text, which is that of its file with ``seeds``."""
    file = STUDIES / f"{name}.toml"
    text = file.read_text(encoding="utf-8")
    if seeds:
        text = re.sub(r"(?m)^seeds = .*$", f"seeds = {seeds}", text)
    return parse(text, file), text


def _predictions(folder: Path, seed: int) -> Path:
    """Return the file that a run folder has after the test of a seed."""
    return folder / "arms" / f"fedavg-seed{seed}" / "predictions.safetensors"


def run_both(out: Path, patches: str, seeds: list[int]) -> None:
    """Run both studies, or continue them, split by split, so that an interrupted run has both studies of a split."""
    for seed in seeds:
        for name in (RESIZED, patches):
            if _predictions(out / name, seed).is_file():
                continue
            study, text = _study(name, seeds)
            with closing(run(study, text, out / name, resume=(out / name).exists())) as events:
                for event in events:
                    print(name, event.what, event.seed, event.round, dict(event.scores), flush=True)
                    if (event.what, event.seed) == ("tested", seed):
                        break


def _means(seeds: list[dict[str, np.ndarray]], site: str) -> list[float]:
    """Return the mean Dice of a site, or over sites, for each seed."""
    return [
        float(scores[site].mean() if site != OVERALL else np.mean([found.mean() for found in scores.values()]))
        for scores in seeds
    ]


def main() -> None:
    """Prepare the images, run the studies, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("prepare", help="write the images of three cameras")
    for name in ("drive_and_chase", "stare", "folder"):
        making.add_argument(name, type=Path)
    commands.add_parser("ceiling", help="score the resized masks themselves").add_argument("folder", type=Path)
    for name, text in (("run", "run or continue both studies"), ("compare", "print both and their difference")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--out", type=Path, default=Path("runs"), help="folder of the run folders")
        command.add_argument("--patches", choices=PATCHES, default=PATCHES[0], help="the study of patches")
        command.add_argument("--seeds", type=int, nargs="+", help="default: those of the study of patches")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.command == "prepare":
        prepare(given.drive_and_chase, given.stare, given.folder)
    elif given.command == "ceiling":
        ceiling(given.folder)
    else:
        seeds = given.seeds or list(_study(given.patches)[0].seeds)
        (compare if given.command == "compare" else run_both)(given.out, given.patches, seeds)


if __name__ == "__main__":
    main()
