"""Case files: what is read is what was written, whatever the box; strange files are not read."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from polyclinic.core import serialization
from polyclinic.data.cases import case_file
from polyclinic.data.cases.case_file import FEWEST_LEVELS, LEVELS, MOST_PLACES, as_stored, box_of, places_in, stored_as
from polyclinic.errors import DataError
from tests.data.cases.conftest import Store, volume

BOX = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("axes", [2, 3])
@BOX
@given(data=st.data())
def test_a_box_is_that_of_numpy_with_padding(store: Store, axes: int, data: st.DataObject) -> None:
    """Any box, inside, across a border, or outside: the voxels of the padded array, and 0 beyond."""
    size = data.draw(st.tuples(*[st.integers(1, 9)] * axes))
    channels = data.draw(st.integers(1, 3))
    low = data.draw(st.tuples(*[st.integers(-12, 12)] * axes))
    patch = data.draw(st.tuples(*[st.integers(1, 14)] * axes))
    pixels, mask = volume(size, channels=channels) if np.prod(size) > 2 else (torch.ones(channels, *size), None)
    case = store(pixels, mask)
    wide = 30
    cut = tuple(slice(a + wide, a + wide + n) for a, n in zip(low, patch, strict=True))
    padded = np.pad(pixels.numpy(), [(0, 0), *[(wide, wide)] * axes])
    assert np.array_equal(case.image(low, patch).numpy(), padded[(slice(None), *cut)])
    if mask is not None:
        assert np.array_equal(case.labels_at(low, patch).numpy(), np.pad(mask.numpy(), wide)[cut])
        outside = np.pad(mask.numpy(), wide, constant_values=-1)[cut]
        assert np.array_equal(case.labels_at(low, patch, -1).numpy(), outside)


def test_a_patch_reads_its_own_slices_and_no_others(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """One read per slice, of the rows of the patch: 4 slices of 5 rows of 20 voxels in two bytes."""
    case = store(*volume((30, 10, 20)))
    read = []
    real = os.preadv

    def counted(handle: int, buffers: list[memoryview], at: int) -> int:
        read.append(len(buffers[0]))
        return real(handle, buffers, at)

    monkeypatch.setattr(os, "preadv", counted)
    case.image((7, 3, 2), (4, 5, 6))
    assert read == [5 * 20 * 2] * 4
    read.clear()
    case.image((7, 0, 2), (4, 10, 6))  # complete slices follow each other
    assert read == [4 * 10 * 20 * 2]


def test_whole_numbers_and_bytes_are_kept_exactly() -> None:
    """CT in two bytes, small counts and 8-bit pictures in one, with the same float32 as in memory."""
    ct = torch.tensor([[[-1024.0, 3071.0, 0.0]]])
    stored, divisor, shift = stored_as(ct)
    assert stored.dtype == torch.int16
    assert (divisor, shift) == ((1.0,), (0.0,))
    assert torch.equal(stored.float(), ct)
    assert stored_as(ct.abs() / 1024 // 1)[0].dtype == torch.uint8
    picture = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    stored, divisor, _ = stored_as(picture)
    assert torch.equal(stored, picture)
    assert divisor == (255.0,) * 3
    beyond = torch.tensor([[[0.0, 40_000.0]]])
    assert torch.allclose(as_stored(beyond), beyond, atol=0.4)


@BOX
@given(st.integers(0, 2**31), st.floats(-50, 50), st.floats(0.01, 100))
def test_other_numbers_are_at_most_half_a_step_away_and_0_stays_0(seed: int, middle: float, spread: float) -> None:
    """The bound of the docstring, for each channel by its own range."""
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randn(2, 40, 50, generator=rng) * torch.tensor([spread, 1.0]).view(2, 1, 1) + middle
    pixels[:, :5] = 0
    stored, divisors, shifts = stored_as(pixels)
    assert stored.dtype == torch.int16
    for values, got, divisor, shift in zip(pixels, stored, divisors, shifts, strict=True):
        back = got.float() / divisor + shift
        reach = float(values.abs().max())
        assert float((back - values).abs().max()) <= 0.51 * float(values.max() - values.min()) / LEVELS + reach * 2e-7
        assert not bool(back[:5].any())


def test_rounded_numbers_are_read_as_they_were_stored(store: Store) -> None:
    """Any box of the file holds the values of as_stored, within the bound; also of a picture of bytes."""
    pixels = torch.randn(2, 9, 8, 7) * 3 + 70
    case = store(pixels)
    assert case.pixels.dtype == torch.int16
    expected = as_stored(pixels)
    assert float((expected - pixels).abs().max()) < 3e-4
    assert torch.equal(case.image((0, 0, 0), (9, 8, 7)), expected)
    assert torch.equal(case.image((2, 3, 1), (4, 4, 4)), expected[:, 2:6, 3:7, 1:5])
    assert not bool(case.image((-3, 0, 0), (3, 8, 7)).any())  # 0 outside, and not the shift
    picture = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    assert torch.equal(store(picture).image((0, 0), (4, 5)), picture.float() / 255)


def test_numbers_of_very_unequal_size_are_not_rounded() -> None:
    """One voxel of a million among values around 1 would leave a few steps for the rest: float32 is kept."""
    pixels = torch.rand(1, 20, 20, 20)
    pixels[0, 0, 0, 0] = 1e6
    stored, divisors, _ = stored_as(pixels)
    assert torch.equal(stored, pixels)
    assert divisors == (1.0,)
    assert FEWEST_LEVELS > 2  # of 65,534 steps, the values from 0 to 1 would have none


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """NaN after a step is an error, and never a number."""
    with pytest.raises(DataError, match="NaN or infinite"):
        stored_as(torch.tensor([[[1.0, float("nan")]]]))


def test_places_are_of_their_class_and_spread_over_it() -> None:
    """All positions of a small class; 10,000 of a large one, from every part of it; none twice."""
    mask = torch.zeros(40, 50, 60, dtype=torch.uint8)
    mask[10:30] = 1
    mask[5, 6, 7] = 2
    found = places_in(mask, (0, 1, 2))
    assert found["2"].tolist() == [[5, 6, 7]]
    large = found["1"]
    assert large.shape == (MOST_PLACES, 3)
    assert bool((mask[tuple(large.long().T)] == 1).all())
    assert len(large.unique(dim=0)) == MOST_PLACES
    assert large[:, 0].bincount(minlength=40)[10:30].min() > MOST_PLACES / 20 * 0.95
    assert set(found) == {"1", "2"}


def test_the_box_of_the_foreground() -> None:
    """First and last voxel along each axis; nothing for an empty mask, and without annotation is no foreground."""
    mask = torch.full((6, 7), -1)
    assert box_of(mask) == ()
    mask[2, 5], mask[4, 3] = 1, 2
    assert box_of(mask) == ((2, 4), (3, 5))


def test_other_programs_can_read_the_file(store: Store) -> None:
    """It is a safetensors file, whose largest tensors are the image and the mask."""
    pixels, mask = volume((5, 6, 7))
    case = store(pixels, mask)
    with safe_open(case.path, "pt") as file:
        tensors = [file.get_tensor(name) for name in list(file.keys())]
    assert any(t.shape == pixels.shape and torch.equal(t.float(), pixels) for t in tensors)


@pytest.mark.parametrize("damage", ["cut", "longer", "version", "noise", "empty", "other", "channels"])
def test_a_strange_file_is_not_a_case(store: Store, damage: str) -> None:
    """Truncated, appended to, of a later version, of another program: it is built again, and never read."""
    case = store(*volume((5, 6, 7)))
    data = case.path.read_bytes()
    if damage == "other":
        serialization.save(case.path, {"x": torch.zeros(3)}, {"case": "1"})
    elif damage == "channels":
        content, meta = serialization.decode_with_meta(data)
        serialization.save(case.path, {**content, "divisor": (1.0, 1.0)}, meta)
    else:
        changed = {
            "cut": data[:-1],
            "longer": data + b"0",
            "version": data.replace(b'"case":"1"', b'"case":"2"'),
            "noise": os.urandom(300),
            "empty": b"",
        }[damage]
        assert changed != data
        case.path.write_bytes(changed)
    assert case_file.opened(case.path) is None


def test_a_flipped_bit_is_found_by_the_checksum(store: Store) -> None:
    """The header cannot show it."""
    case = store(*volume((5, 6, 7)))
    assert case.verify()
    data = bytearray(case.path.read_bytes())
    data[-5] ^= 1
    case.path.write_bytes(data)
    assert case_file.opened(case.path) is not None
    assert not case.verify()


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_file_that_disappears_during_a_run_is_an_error_that_says_so(store: Store, damage: str) -> None:
    """No signal ends the process, and no voxel is invented."""
    case = store(*volume((5, 6, 7)))
    if damage == "gone":
        case.path.unlink()
    else:
        os.truncate(case.path, case.pixels.start + 10)
    with pytest.raises(DataError, match=r"cannot be read .*Start the study again"):
        case.image((0, 0, 0), (5, 6, 7))


def test_no_descriptor_stays_open(store: Store) -> None:
    """Thousands of cases need no thousands of open files, and a forked process shares none."""
    case = store(*volume((5, 6, 7)))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    for _ in range(20):
        case.image((0, 0, 0), (3, 3, 3))
    assert (len(os.listdir("/proc/self/fd")) if before else 0) == before
