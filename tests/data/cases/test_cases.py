"""Views of cases: the draws of nnU-Net, the face of Examples, and what withheld masks may reveal."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyclinic.data.cases.cases import Cases, resized, seen
from polyclinic.data.examples import DataError, concat
from tests.data.cases.conftest import Store, cases_of, volume

BOX = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rng(seed: int) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def cases(store: Store) -> Cases:
    """Three volumes of unequal shapes, seen as patches of 6 x 5 x 4."""
    return cases_of([store(*volume(size, i)) for i, size in enumerate([(7, 9, 5), (4, 12, 8), (10, 5, 4)])], (6, 5, 4))


def test_the_central_view_of_each(cases: Cases) -> None:
    """The middle of a larger image; a smaller one is in the middle, with 0 around it."""
    x, y = cases[torch.tensor([1, 0])]
    assert x.shape == (2, 1, 6, 5, 4)
    assert y.shape == (2, 6, 5, 4)
    pixels, mask = volume((4, 12, 8), 1)
    assert torch.equal(x[0, :, 1:5], pixels[:, :, 3:8, 2:6])
    assert not bool(x[0, :, 0].any() or x[0, :, 5].any())
    assert torch.equal(y[0, 1:5], mask[:, 3:8, 2:6])
    assert cases.shape == (1, 6, 5, 4)


def test_nothing_has_the_shape_of_a_batch(cases: Cases) -> None:
    """A site without training data is empty and keeps its shape."""
    empty = cases.subset(torch.zeros(0, dtype=torch.int64))
    x, y = empty[torch.zeros(0, dtype=torch.int64)]
    assert (x.shape, y.shape, y.dtype) == ((0, 1, 6, 5, 4), (0, 6, 5, 4), torch.int64)


@BOX
@given(st.integers(0, 2**40), st.integers(0, 2), st.booleans())
def test_a_draw_depends_only_on_its_generator(cases: Cases, seed: int, i: int, forced: bool) -> None:
    """The same state, the same bits; PyTorch's own generator is not touched."""
    before = torch.get_rng_state()
    one, two = (cases.draw(i, rng(seed), forced, (8, 5, 4)) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert torch.equal(before, torch.get_rng_state())


@BOX
@given(st.integers(0, 2**40), st.integers(0, 2), st.tuples(st.integers(6, 9), st.integers(5, 9), st.integers(4, 9)))
def test_a_free_draw_covers_the_image_or_overhangs_as_in_nnunet(
    cases: Cases, seed: int, i: int, size: tuple[int, ...]
) -> None:
    """The corner lies between the bounds of nnU-Net's get_bbox, of which this is a second implementation."""
    found: list[tuple[int, ...]] = []
    file = cases.files[i]
    spied = replaced(cases, i, found)
    spied.draw(0, rng(seed), False, size)
    low = found[0]
    for axis, (side, n, patch) in enumerate(zip(file.size, size, cases.patch, strict=True)):
        need = n - patch
        if need + side < n:
            need = n - side
        least, most = -(need // 2), side + need // 2 + need % 2 - n
        assert least <= low[axis] <= most


def replaced(cases: Cases, i: int, found: list[tuple[int, ...]]) -> Cases:
    """Return case ``i`` alone, whose corners are noted."""
    file = cases.files[i]

    class Spy:
        def __getattr__(self, name: str) -> object:
            return getattr(file, name)

        def image(self, low: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
            found.append(tuple(low))
            return file.image(low, size)

    return cases_of([Spy()], cases.patch)  # type: ignore[list-item]


def test_every_corner_is_drawn_equally_often(cases: Cases) -> None:
    """7 x 9 x 5 seen through 6 x 5 x 4: 2 x 5 x 2 corners, 2,000 draws, within five standard deviations."""
    found: list[tuple[int, ...]] = []
    spied, source = replaced(cases, 0, found), rng(0)
    for _ in range(2000):
        spied.draw(0, source, False, (6, 5, 4))
    corners, counts = np.unique(np.array(found), axis=0, return_counts=True)
    assert len(corners) == 20
    assert np.abs(counts - 100).max() < 5 * np.sqrt(100)


def test_a_forced_draw_shows_a_class_drawn_among_those_present(store: Store) -> None:
    """A class of one voxel is drawn as often as one of half the image, and lies in the patch."""
    mask = torch.zeros(20, 20, 20, dtype=torch.int64)
    mask[:10], mask[15, 16, 17] = 1, 2
    one = cases_of([store(torch.rand(1, 20, 20, 20), mask)], (5, 5, 5))
    source = rng(0)
    middles = [int(one.draw(0, source, True, (5, 5, 5))[1][2, 2, 2]) for _ in range(300)]
    rare = sum(label == 2 for label in middles)
    assert 110 < rare < 190  # a share of 1/2, within four standard deviations
    seen = [bool((one.draw(0, source, True, (5, 5, 5))[1] > 0).any()) for _ in range(100)]
    assert all(seen)


def test_a_forced_draw_without_foreground_is_a_free_one(store: Store) -> None:
    """A healthy case is no error."""
    one = cases_of([store(torch.rand(1, 9, 9, 9), torch.zeros(9, 9, 9, dtype=torch.int64))], (5, 5, 5))
    assert torch.equal(one.draw(0, rng(3), True, (5, 5, 5))[0], one.draw(0, rng(3), False, (5, 5, 5))[0])


def test_a_withheld_mask_moves_no_patch(cases: Cases) -> None:
    """What is unlabeled gives no target, and forced draws do not show where the foreground is."""
    hidden = cases.unlabeled()
    for seed in range(5):
        x, y = hidden.draw(0, rng(seed), True, (6, 5, 4))
        assert bool((y == -1).all())
        assert torch.equal(x, cases.draw(0, rng(seed), False, (6, 5, 4))[0])
    assert bool((hidden[torch.tensor([2])][1] == -1).all())
    assert bool((hidden.whole(0)[1] == -1).all())


def test_boxes_instead_of_masks(store: Store) -> None:
    """The same as the box of the complete mask, cut out; the draws know the box only."""
    from polyclinic.data.annotations import boxes

    mask = torch.zeros(12, 11, 10, dtype=torch.int64)
    mask[3, 4, 5], mask[7, 6, 2] = 1, 2
    weak = cases_of([store(torch.rand(1, 12, 11, 10), mask)], (6, 6, 6)).boxed()
    whole = boxes(mask[None])[0]
    assert torch.equal(weak.whole(0)[1], whole)
    padded = torch.nn.functional.pad(whole, [10] * 6)
    for low in [(0, 0, 0), (-3, 2, 5), (5, 5, -4), (9, 9, 9)]:
        cut = padded[tuple(slice(a + 10, a + 16) for a in low)]
        assert torch.equal(weak._view(0, low, (6, 6, 6))[1], cut)
    middles = {tuple(weak.draw(0, rng(s), True, (1, 1, 1))[1].shape) for s in range(3)}
    assert middles == {(1, 1, 1)}
    assert all(int(weak.draw(0, rng(s), True, (1, 1, 1))[1]) == 2 for s in range(20))
    assert len({tuple(weak.draw(0, rng(s), True, (6, 6, 6))[0].flatten().tolist()) for s in range(20)}) > 5


def test_white_masks_are_classes(store: Store) -> None:
    """255 is 1, also in a box."""
    from dataclasses import replace

    mask = torch.zeros(6, 6, dtype=torch.int64)
    mask[2:4, 2:4] = 255
    white = replace(cases_of([store(torch.rand(1, 6, 6), mask)], (6, 6)), white=True)
    assert torch.equal(white.whole(0)[1], (mask > 0).long())
    assert torch.equal(white.boxed().whole(0)[1], (mask > 0).long())
    assert white.highest == 1


def test_parts_join_to_the_whole(cases: Cases) -> None:
    """concat works as for Examples, and views of other shapes are refused."""
    from dataclasses import replace

    joined = concat([cases.subset(torch.tensor([0])), cases.subset(torch.tensor([False, True, True]))])
    assert joined.ids == cases.ids
    assert torch.equal(joined[torch.arange(3)][0], cases[torch.arange(3)][0])
    with pytest.raises(DataError, match="their views or targets differ"):
        concat([cases, replace(cases, patch=(6, 5, 5))])
    with pytest.raises(DataError, match="their views or targets differ"):
        concat([cases, cases.unlabeled()])


def test_equal_images_have_equal_hashes(store: Store) -> None:
    """Whatever their masks; and equal bytes of another shape, or scaled otherwise, are other images."""
    pixels, mask = volume((4, 6, 5))
    files = [store(pixels, mask), store(pixels, mask * 0), store(pixels.reshape(1, 6, 4, 5), mask.reshape(6, 4, 5))]
    one, two, three = cases_of(files, (4, 4, 4)).input_hashes()
    assert one == two != three


def test_threads_draw_the_same_bits(cases: Cases) -> None:
    """Reading shares nothing between threads."""
    jobs = [(i % 3, seed) for seed in range(20) for i in range(3)]
    barrier = threading.Barrier(4)

    def draw(job: tuple[int, int]) -> torch.Tensor:
        return cases.draw(job[0], rng(job[1]), job[1] % 2 == 0, (6, 5, 4))[0]

    def first(_: int) -> None:
        barrier.wait(10)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(first, range(4)))
        together = list(pool.map(draw, jobs))
    assert all(torch.equal(a, draw(job)) for a, job in zip(together, jobs, strict=True))


def test_a_picture_with_a_class_is_resized_to_cover_the_view_and_cropped(store: Store) -> None:
    """Aspect kept: a 20 x 40 picture seen through 10 x 10 is its middle 20 x 20, averaged over 2 x 2."""
    picture = torch.randint(0, 256, (3, 20, 40), dtype=torch.uint8)
    one = cases_of([store(picture)], (10, 10), torch.tensor([1]))
    x, y = one[torch.tensor([0])]
    middle = picture[:, :, 10:30].float().div(255)
    assert torch.allclose(x[0], torch.nn.functional.interpolate(middle[None], (10, 10), mode="bilinear")[0], atol=1e-6)
    assert y.tolist() == [1]
    wider, y = one.draw(0, rng(0), True, (14, 16))
    assert torch.equal(wider[:, 2:12, 3:13], x[0])
    assert not bool(wider[:, :2].any() or wider[:, 12:].any())
    assert bool(wider[:, 2:12, :3].any())
    assert int(y) == 1
    assert torch.equal(one.draw(0, rng(0), False, (4, 4))[0], x[0, :, 3:7, 3:7])


def test_a_new_picture_is_seen_as_those_of_training(store: Store) -> None:
    """The values of a stored image, complete for masks, as a view for classes."""
    pixels = torch.randn(1, 30, 20)
    of_masks = cases_of([store(pixels, torch.zeros(30, 20, dtype=torch.int64))], (8, 8))
    assert torch.equal(seen(pixels, (8, 8), True), of_masks.image(0))
    of_classes = cases_of([store(pixels)], (8, 8), torch.tensor([1]))
    assert torch.equal(seen(pixels, (8, 8), False), of_classes[torch.tensor([0])][0][0])


@pytest.mark.parametrize("size", [(3, 3), (7, 30), (64, 64), (1, 1)])
def test_any_picture_fits_any_view(size: tuple[int, int]) -> None:
    """Also a line of pixels; a constant picture stays constant."""
    for shape in [(1, 1), (1, 50), (200, 3), (31, 33)]:
        out = resized(torch.full((2, *shape), 0.25), size)
        assert out.shape == (2, *size)
        assert torch.allclose(out, torch.tensor(0.25))
