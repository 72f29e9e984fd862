"""Augmentation of single samples: laws of each change, PyTorch's resampling, and batchgeneratorsv2's distributions."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polyclinic.errors import ConfigError
from polyclinic.learning.training import image_transforms as transforms
from polyclinic.learning.training.image_augmentation import (
    INTENSITIES,
    RECIPES,
    ImageAugmentation,
    Placement,
    augmentation_of,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image(side: int) -> tuple[Tensor, Tensor]:
    """Two channels of waves with mean 0 and deviation 1, and two nested ellipsoids; no random numbers."""
    z = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, side)] * 3, indexing="ij"))
    a = torch.sin(3 * z[0] + z[1]) * torch.cos(4 * z[2]) + 0.3 * torch.sin(25 * z[0] * z[1] + 9 * z[2])
    b = torch.exp(-3 * (z**2).sum(0)) + 0.2 * torch.cos(17 * z[1] + 11 * z[0])
    outer = (z[0] / 0.6) ** 2 + (z[1] / 0.35) ** 2 + (z[2] / 0.45) ** 2 < 1
    inner = (z[0] / 0.3) ** 2 + ((z[1] - 0.1) / 0.2) ** 2 + (z[2] / 0.25) ** 2 < 1
    x = torch.stack([a, b])
    return (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True), outer.long() + inner.long()


def by_pytorch(x: Tensor, matrix: Tensor, shift: Tensor, size: tuple[int, ...], border: bool) -> Tensor:
    """``resample`` by PyTorch's functions, in double precision."""
    source, result = torch.tensor(x.shape[1:]), torch.tensor(size)
    theta = torch.cat([matrix * result / source[:, None], (2 * shift / source)[:, None]], 1)
    theta = torch.cat([theta[:, :-1].flip(0, 1), theta[:, -1:].flip(0)], 1)
    grid = F.affine_grid(theta[None], [1, 1, *size], align_corners=False)
    mode = "border" if border else "zeros"
    return F.grid_sample(x[None].double(), grid, padding_mode=mode, align_corners=False)[0]


@pytest.mark.parametrize("border", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("d", [2, 3])
def test_resampling_is_pytorchs(d: int, diagonal: bool, border: bool) -> None:
    """Images to 1e-5, and masks wherever the largest share is not tied."""
    g, source, size = rng(d), (9, 13, 11)[:d], (12, 8, 10)[:d]
    for _ in range(3):
        x, shift = torch.randn(2, *source, generator=g), torch.randn(d, generator=g, dtype=torch.float64)
        matrix = 0.8 * torch.randn(d, d, generator=g, dtype=torch.float64)
        if diagonal:
            matrix = (matrix.diag().abs() + 0.1).diag()
        ours = transforms.resample(x.clone(), matrix, shift, size, border)
        assert torch.allclose(ours.double(), by_pytorch(x, matrix, shift, size, border), atol=1e-5)
        y = torch.randint(-1, 4, source, generator=g)
        shares = by_pytorch(torch.stack([y == k for k in range(-1, 4)]).float(), matrix, shift, size, border)
        if not border:
            shares[1] += 1 - shares.sum(0)
        first, second = shares.sort(0).values[-1], shares.sort(0).values[-2]
        mask = transforms.resample_mask(y, matrix, shift, size, border)
        clear = first - second > 1e-4
        assert clear.float().mean() > 0.5
        assert torch.equal((shares.argmax(0) - 1)[clear], mask[clear])


def test_a_mask_of_one_label_and_thin_images_are_resampled() -> None:
    nowhere, half = torch.zeros(3, dtype=torch.float64), 2 * torch.eye(3, dtype=torch.float64)
    ones = torch.ones(4, 4, 4, dtype=torch.long)
    assert transforms.resample_mask(ones, half, nowhere, (4, 4, 4), True).eq(1).all()
    assert transforms.resample_mask(ones, half, nowhere, (4, 4, 4), False).sum() == 8  # the outer half is 0
    turn = transforms.turn_matrix((1, 8, 8), None, rng())
    thin = transforms.resample(torch.ones(1, 1, 8, 8), turn, nowhere, (1, 8, 8), True)
    assert torch.allclose(thin, torch.ones(1, 1, 8, 8))


@pytest.mark.parametrize("name", ["light", "nnunet", "picture"])
@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 12, 9), (2, 10, 8, 12), (1, 4, 16, 16)])
def test_a_sample_follows_from_its_generator_alone(name: str, shape: tuple[int, ...]) -> None:
    recipe, size = RECIPES[name], shape[1:]
    x, y = torch.randn(shape, generator=rng()), torch.randint(0, 3, size, generator=rng())
    kept = x.clone()
    views = list[tuple[torch.Tensor, torch.Tensor]]()
    for seed in (*range(12), *range(12)):
        torch.manual_seed(len(views))  # the global generator must not matter
        g = rng(seed)
        place = recipe.place(size, g, margin=False)
        views.append(recipe(x.clone(), y, place, size, g))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(views, views[12:], strict=False))
    assert all(v[0].shape == shape and v[1].shape == size and v[0].isfinite().all() for v in views)
    assert len({v[0].sum().item() for v in views[:12]}) > 3
    assert torch.equal(x, kept)
    assert all(set(v[1].unique().tolist()) <= {0, 1, 2} for v in views)


def test_masks_move_with_their_images() -> None:
    without: dict[str, Any] = dict.fromkeys(INTENSITIES)
    recipe = replace(RECIPES["nnunet"], **without)
    recipe = replace(recipe, rotation=transforms.Rotation(1.0), scaling=transforms.Scaling(1.0))
    _, mask = image(48)
    agreements = []
    for seed in range(8):
        g, size = rng(seed), (24, 24, 24)
        place = recipe.place(size, g)
        part = transforms.center_crop(mask, place.source)
        assert part.shape == place.source
        x, y = recipe(part[None].float(), part, place, size, g)
        agreements.append(float((x[0].round() == y).float().mean()))
        assert x.shape[1:] == size == y.shape
    assert min(agreements) > 0.97


def test_what_is_read_is_what_is_needed_and_keeps_the_center() -> None:
    recipe, size = RECIPES["nnunet"], (40, 56, 40)
    bound = transforms.enlarged(size, recipe.rotation, True)
    assert bound == [74, 81, 74]  # 40 cos 30° + 56 sin 30° = 62.6, 56 cos 30° + 40 sin 30° = 68.5, over 0.85
    sizes = [recipe.place(size, rng(seed)).source for seed in range(400)]
    assert 0.28 < sum(s != size for s in sizes) / 400 < 0.44  # 1 - 0.8 * 0.8 = 0.36
    for source in sizes:
        assert all(n <= s <= b + 1 and (s - n) % 2 == 0 for s, n, b in zip(source, size, bound, strict=True))
    assert recipe.place(size, rng(1), margin=False).source == size


@pytest.mark.parametrize(
    ("size", "degrees", "planes"),
    [
        ((64, 64), 180, 1),
        ((64, 128), 15, 1),
        ((40, 56, 40), 30, 3),
        ((16, 64, 64), 180, 1),
    ],
)
def test_angles_are_nnunets(size: tuple[int, ...], degrees: float, planes: int) -> None:
    most, pairs = transforms.planes(size, None)
    assert (most, len(pairs)) == (degrees, planes)
    for seed in range(20):
        matrix = transforms.turn_matrix(size, None, rng(seed))
        assert torch.allclose(matrix @ matrix.T, torch.eye(len(size), dtype=torch.float64))
        if planes == 1 and len(size) == 3:
            assert torch.equal(matrix[0], torch.tensor([1.0, 0, 0], dtype=torch.float64))


# Mean and standard deviation over 1,000 draws of batchgeneratorsv2 0.3.6 on ``image(20)`` with nnU-Net's settings, of:
# the mean, the standard deviation, the mean absolute change, its difference between channels, the first channel's
# largest value. Of the spatial ones, 1,500 draws on ``image(30)`` to 20^3: Dice of both labels with the untouched
# masks, mean, standard deviation, foreground, mean absolute change.
THEIRS = {
    "noise": ([0.0, 1.0016, 0.0396, -0.0, 2.3476], [0.0005, 0.0016, 0.0232, 0.0006, 0.055]),
    "blur": ([0.0013, 0.9144, 0.1675, -0.0713, 2.0763], [0.0013, 0.0635, 0.1193, 0.2496, 0.2076]),
    "brightness": ([0.0, 1.0004, 0.099, 0.0096, 2.2847], [0.0, 0.101, 0.0409, 0.081, 0.3298]),
    "contrast": ([0.0018, 0.9965, 0.0972, 0.0077, 2.1386], [0.0029, 0.0984, 0.0386, 0.0795, 0.1833]),
    "low_resolution": ([-0.0046, 0.9362, 0.158, -0.0747, 2.2037], [0.0109, 0.0502, 0.12, 0.239, 0.0958]),
    "gamma_inverted": ([0.0, 1.0, 0.0367, 0.0132, 2.2896], [0.0, 0.0, 0.0161, 0.0333, 0.3956]),
    "gamma": ([0.0, 1.0, 0.0577, -0.0273, 2.3262], [0.0, 0.0, 0.0262, 0.0553, 0.1984]),
}
SPATIAL = {
    "rotation": ([0.8322, 0.8538, 0.426, 1.0945, 0.149, 0.6529], [0.0531, 0.0521, 0.0034, 0.0119, 0.001, 0.1039]),
    "scaling": ([0.6749, 0.7672, 0.4139, 1.1051, 0.1659, 0.4848], [0.2041, 0.1743, 0.2552, 0.0828, 0.0992, 0.2362]),
}


def compared(rows: list[list[float]], theirs: tuple[list[float], list[float]]) -> None:
    """Compare means within 4 standard errors of both samples, and deviations within a fifth."""
    found = torch.tensor(rows, dtype=torch.float64)
    mean, std = torch.tensor(theirs[0]).double(), torch.tensor(theirs[1]).double()
    error = ((std**2 / 1000) + found.std(0) ** 2 / len(found)).sqrt()
    assert ((found.mean(0) - mean).abs() <= 4 * error + 2e-4).all(), (found.mean(0), mean, error)
    assert ((found.std(0) - std).abs() <= 0.2 * std + 5e-4).all(), (found.std(0), std)


@pytest.mark.parametrize("name", THEIRS)
def test_intensities_are_distributed_as_in_batchgenerators(name: str) -> None:
    x, _ = image(20)
    rows = []
    for seed in range(300):
        y = getattr(RECIPES["nnunet"], name)(x.clone(), rng(seed))
        d = (y - x).abs()
        rows.append([float(v) for v in (y.mean(), y.std(), d.mean(), d[0].mean() - d[1].mean(), y[0].max())])
    compared(rows, THEIRS[name])


@pytest.mark.parametrize("name", SPATIAL)
def test_geometry_is_distributed_as_in_batchgenerators(name: str) -> None:
    (x, mask), size = image(30), (20, 20, 20)
    rotation, scaling = transforms.Rotation(float(name == "rotation")), transforms.Scaling(float(name == "scaling"))
    augmentation = ImageAugmentation(rotation=rotation, scaling=scaling)
    rows, before, labels = [], x[:, 5:25, 5:25, 5:25], mask[5:25, 5:25, 5:25]
    for seed in range(300):
        g = rng(seed)
        place = augmentation.place(size, g)
        pad = [(s - 30) // 2 for s in reversed(place.source) for _ in range(2)]  # negative: cut
        y, m = augmentation(F.pad(x, pad), F.pad(mask, pad), place, size, g)
        both = [2 * ((m == k) & (labels == k)).sum() / ((m == k).sum() + (labels == k).sum()) for k in (1, 2)]
        rows.append([*map(float, (*both, y.mean(), y.std(), (m > 0).float().mean(), (y - before).abs().mean()))])
    compared(rows, SPATIAL[name])


def test_gamma_restores_mean_and_deviation_and_contrast_the_range() -> None:
    x, _ = image(16)
    for seed in range(5):
        y = transforms.Gamma(1.0)(x.clone(), rng(seed))
        assert torch.allclose(y.mean((1, 2, 3)), x.mean((1, 2, 3)), atol=1e-4)
        assert torch.allclose(y.std((1, 2, 3)), x.std((1, 2, 3)), atol=1e-3)
        z = transforms.Contrast(1.0)(x.clone(), rng(seed))
        assert bool((z.amin((1, 2, 3)) >= x.amin((1, 2, 3))).all() and (z.amax((1, 2, 3)) <= x.amax((1, 2, 3))).all())


@pytest.mark.parametrize("name", INTENSITIES)
@pytest.mark.parametrize("fill", [0.0, 3.0])
def test_constant_and_single_voxel_images_stay_finite(name: str, fill: float) -> None:
    recipe = RECIPES["picture" if name == "color" else "nnunet"]
    for shape in ((3, 5, 5), (3, 1, 1), (3, 1, 1, 1)):
        assert getattr(recipe, name)(torch.full(shape, fill), rng()).isfinite().all()


def test_color_keeps_gray_and_brightness() -> None:
    x = torch.rand(3, 8, 8, generator=rng())
    y = transforms.Color(1.0, 0.5, 40.0)(x.clone(), rng(1))
    assert torch.allclose(y.mean(0), x.mean(0), atol=1e-6)
    assert not torch.allclose(y, x, atol=1e-3)
    gray = torch.rand(1, 8, 8, generator=rng()).expand(3, 8, 8).clone()
    assert torch.allclose(transforms.Color(1.0)(gray.clone(), rng(2)), gray, atol=1e-6)
    single = torch.rand(1, 8, 8, generator=rng())
    assert torch.equal(transforms.Color(1.0)(single.clone(), rng(2)), single)


def test_mirrors_and_quarter_turns_are_exact() -> None:
    x, y = torch.randn(1, 6, 6, generator=rng()), torch.randint(0, 2, (6, 6), generator=rng())
    still = Placement((6, 6), None, torch.zeros(2))
    every = [x.rot90(k, (1, 2)) for k in range(4)]
    turns = ImageAugmentation(quarter_turns=transforms.QuarterTurns(1.0))
    seen = [turns(x.clone(), y, still, (6, 6), rng(seed)) for seed in range(40)]
    which = [next(k for k in range(4) if torch.equal(v, every[k])) for v, _ in seen]
    assert set(which) == {0, 1, 2, 3}
    assert all(torch.equal(m, y.rot90(k, (0, 1))) for k, (_, m) in zip(which, seen, strict=True))
    mirror = ImageAugmentation(mirror=transforms.Mirror(0.5, (1,)))
    views = [mirror(x.clone(), y, still, (6, 6), rng(seed)) for seed in range(40)]
    assert all(torch.equal(v, x) or torch.equal(v, x.flip(2)) for v, _ in views)
    assert 8 < sum(torch.equal(v, x) for v, _ in views) < 32
    assert mirror.mirror_axes(2) == (1,)
    with pytest.raises(ConfigError, match="no spatial axis 1; there are 0 to 0"):
        mirror.mirror_axes(1)


def test_recipes_are_read_from_their_tables_and_changed_one_by_one() -> None:
    for name, recipe in RECIPES.items():
        assert augmentation_of({"recipe": name}) == recipe
        assert augmentation_of(recipe.to_table()) == recipe
    changed = augmentation_of({"recipe": "nnunet", "mirror": {"axes": [0, 1]}, "noise": {"probability": 0}})
    assert changed.mirror == transforms.Mirror(0.5, (0, 1))
    assert changed.noise is None
    assert changed.gamma == RECIPES["nnunet"].gamma


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"recipe": "strong"}, "no recipe is called"),
        ({"elastic": {}}, "there is no elastic"),
        ({"noise": {"variance": 1, "probability": 1}}, "noise has no variance"),
        ({"noise": {"std": 1.0}}, "noise needs a probability"),
        ({"recipe": "nnunet", "scaling": {"low": 2.0}}, "low = 2 is above high = 1.4"),
        ({"gamma": {"probability": 1.0, "inverted": True}}, "gamma has no inverted"),
    ],
)
def test_wrong_tables_are_refused(table: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        augmentation_of(table)


def test_inputs_without_two_or_three_axes_are_refused() -> None:
    recipe: Callable[..., Placement] = RECIPES["nnunet"].place
    with pytest.raises(ConfigError, match="not for inputs with 1 spatial axes"):
        recipe((7,), rng())
