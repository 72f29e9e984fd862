"""Values survive being saved to the bit, any safetensors tool reads them, and hostile bytes are refused by name."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as st_load

from polyclinic.core import state
from polyclinic.core.state import Corrupt, savable
from polyclinic.core.stats import Gather, LeafMean, Mean, Reply
from polyclinic.testing import equal

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8,
          torch.uint8, torch.bool]  # fmt: skip


@savable
class Sample(NamedTuple):
    count: int
    inner: object


tensors = st.builds(
    lambda shape, dtype, seed: (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 9 - 4).to(dtype),
    st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES), st.integers(0, 99),
)  # fmt: skip
plain = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=8)
values = st.recursive(
    plain | tensors,
    lambda inner: (
        st.dictionaries(st.text(max_size=6), inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.builds(Sample, st.integers(0, 9), inner)
    ),
    max_leaves=10,
)


@given(values)
def test_every_value_survives(value) -> None:
    assert equal(state.decode(state.encode(value)), value)
    assert state.encode(value) == state.encode(state.decode(state.encode(value)))


def test_replies_survive_and_stay_views_where_asked() -> None:
    tree = {"a": torch.randn(3, 2), "b": torch.tensor(1.5)}
    reply = Reply({"m": Mean.of(tree, 3), "l": LeafMean.of(tree, tree), "g": Gather({"x": tree})})
    buffer = bytearray(state.encode(reply))
    shared = state.decode(buffer, share=True)
    assert equal(shared, reply)
    before = shared.mean("m").total["a"].clone()
    buffer[-1] ^= 0xFF
    untouched = state.decode(bytes(state.encode(reply)))
    assert equal(untouched, reply)
    assert equal(before, reply.mean("m").total["a"])


def test_other_tools_read_our_files() -> None:
    found = st_load(state.encode({"a": torch.arange(6).reshape(2, 3), "b": torch.ones(2)}))
    assert {name: t.tolist() for name, t in found.items()} == {"0": [[0, 1, 2], [3, 4, 5]], "1": [1.0, 1.0]}


@pytest.mark.parametrize("value", [object(), {1: 2}, {"f": print}, Path("x"), {1, 2}])
def test_what_cannot_be_saved_is_named(value) -> None:
    with pytest.raises(TypeError, match=r"saved"):
        state.encode(value)


def _header(table: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


META = {"value": '{"tensor":"0"}'}
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "empty": b"",
    "short": b"\x01\x02",
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtin\x94.",
    "header beyond the limit": _header({}, length=2**40),
    "header past the end": _header({}, length=500),
    "header not JSON": _header(b"{nonsense"),
    "header not UTF-8": _header(b'{"\xff\xfe": 1}'),
    "header a list": _header([1, 2]),
    "deep JSON": _header(b"[" * 100_000),
    "no metadata": _header({"0": F32}, bytes(8)),
    "name twice": _header(b'{"__metadata__": {"value": "1"}, "0": 1, "0": 2}'),
    "offset past the end": _header({"__metadata__": META, "0": {**F32, "data_offsets": [0, 800]}}, bytes(8)),
    "offset before the start": _header({"__metadata__": META, "0": {**F32, "data_offsets": [-8, 0]}}, bytes(8)),
    "overlap": _header({"__metadata__": META, "0": F32, "1": {**F32, "data_offsets": [4, 12]}}, bytes(12)),
    "a gap": _header({"__metadata__": META, "0": {**F32, "data_offsets": [8, 16]}}, bytes(16)),
    "trailing bytes": _header({"__metadata__": META, "0": F32}, bytes(9)),
    "shape not its bytes": _header({"__metadata__": META, "0": {**F32, "shape": [3]}}, bytes(8)),
    "shape overflowing": _header({"__metadata__": META, "0": {**F32, "shape": [2**62, 2**62]}}, bytes(8)),
    "shape negative": _header({"__metadata__": META, "0": {**F32, "shape": [-1, -2]}}, bytes(8)),
    "shape of booleans": _header({"__metadata__": META, "0": {**F32, "shape": [True, 2]}}, bytes(8)),
    "shape of many sides": _header({"__metadata__": META, "0": {**F32, "shape": [1] * 4000 + [2]}}, bytes(8)),
    "unknown type": _header({"__metadata__": META, "0": {**F32, "dtype": "OBJ"}}, bytes(8)),
    "tensor a number": _header({"__metadata__": META, "0": 7}),
    "more fields": _header({"__metadata__": META, "0": {**F32, "code": "x"}}, bytes(8)),
    "a tensor that is not there": _header({"__metadata__": {"value": '{"tensor":"7"}'}}),
    "a class of the standard library": _header(
        {"__metadata__": {"value": '{"class":"os.system","with":{"c":"true"}}'}}
    ),
    "a class with other fields": _header(
        {"__metadata__": {"value": '{"class":"polyclinic.core.stats.Mean","with":{"total":{"map":{}}}}'}}
    ),
    "a bare list": _header({"__metadata__": {"value": "[1]"}}),
    "a table of nothing known": _header({"__metadata__": {"value": '{"eval":"1+1"}'}}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused(name: str) -> None:
    with pytest.raises(Corrupt):
        state.decode(HOSTILE[name])


def test_any_changed_byte_is_another_value_or_refused() -> None:
    data, refused = state.encode({"a": torch.arange(4.0), "n": 3}), 0
    for position in range(len(data)):
        broken = bytearray(data)
        broken[position] ^= 0x55
        try:
            found = state.decode(bytes(broken))
        except Corrupt:
            refused += 1
        else:
            assert state.encode(found) != data, position
    assert refused > len(data) // 2


@given(st.binary(max_size=300))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(Corrupt):
        state.decode(data)


def test_a_crash_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    state.save(path, {"a": 1})
    monkeypatch.setattr(state.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        state.save(path, {"a": 2})
    assert state.load(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"nonsense")
    with pytest.raises(Corrupt, match="broken"):
        state.load(tmp_path / "broken")
