"""Values survive being saved to the bit, any safetensors tool reads them, and hostile bytes are refused by name."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as st_load

from polyclinic.core import serialization
from polyclinic.core.aggregates import ElementwiseMean, PerSite, Reply, WeightedMean
from polyclinic.core.serialization import Corrupt, TagError, savable
from polyclinic.testing import equal

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@savable("tests.Sample", 1)
class Sample(NamedTuple):
    count: int  # type: ignore[assignment]  # it hides tuple.count, as a field may
    inner: object


tensors = st.builds(
    lambda shape, dtype, seed: (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 9 - 4).to(dtype),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
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
def test_every_value_survives(value: object) -> None:
    assert equal(serialization.decode(serialization.encode(value)), value)
    assert serialization.encode(value) == serialization.encode(serialization.decode(serialization.encode(value)))


def test_replies_survive_and_stay_views_where_asked() -> None:
    tree = {"a": torch.randn(3, 2), "b": torch.tensor(1.5)}
    reply = Reply({"m": WeightedMean.of(tree, 3), "l": ElementwiseMean.of(tree, tree), "g": PerSite({"x": tree})})
    buffer = bytearray(serialization.encode(reply))
    shared = serialization.decode(buffer, share=True)
    assert equal(shared, reply)
    before = shared.mean("m").total["a"].clone()
    buffer[-1] ^= 0xFF
    untouched = serialization.decode(bytes(serialization.encode(reply)))
    assert equal(untouched, reply)
    assert equal(before, reply.mean("m").total["a"])


@pytest.mark.parametrize("dtype", serialization._DTYPES.values(), ids=str)
def test_every_type_survives_and_is_found_in_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    leaf = torch.arange(100).reshape(1, 100).to(dtype)
    serialization.save(tmp_path / "file", {"a": leaf})
    read = serialization.load(tmp_path / "file")["a"]
    assert (read.dtype, read.shape) == (dtype, leaf.shape)
    assert torch.equal(read, leaf)
    place = serialization.layout(tmp_path / "file")[0]["a"]
    content = (tmp_path / "file").read_bytes()[place.start :]
    assert torch.equal(torch.frombuffer(bytearray(content), dtype=dtype).reshape(place.shape), leaf)


def test_other_tools_read_our_files() -> None:
    found = st_load(serialization.encode({"a": torch.arange(6).reshape(2, 3), "b": torch.ones(2)}))
    assert {name: t.tolist() for name, t in found.items()} == {"0": [[0, 1, 2], [3, 4, 5]], "1": [1.0, 1.0]}


@pytest.mark.parametrize("value", [object(), {1: 2}, {"f": print}, Path("x"), {1, 2}])
def test_what_cannot_be_saved_is_named(value: object) -> None:
    with pytest.raises(TypeError, match=r"saved"):
        serialization.encode(value)


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
    "tensor twice": _header(
        b'{"__metadata__": %b, "0": %b, "0": %b}' % tuple(json.dumps(t).encode() for t in (META, F32, F32)), bytes(8)
    ),
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
        {"__metadata__": {"value": '{"class":"os.system","version":1,"with":{"c":"true"}}'}}
    ),
    "a class with other fields": _header(
        {"__metadata__": {"value": '{"class":"core.WeightedMean","version":1,"with":{"total":{"map":{}}}}'}}
    ),
    "a class without a version": _header(
        {"__metadata__": {"value": '{"class":"tests.Sample","with":{"count":1,"inner":null}}'}}
    ),
    "a class with a key more": _header(
        {"__metadata__": {"value": '{"class":"tests.Sample","version":1,"with":{"count":1,"inner":null},"more":1}'}}
    ),
    "a bare list": _header({"__metadata__": {"value": "[1]"}}),
    "a table of nothing known": _header({"__metadata__": {"value": '{"eval":"1+1"}'}}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused(name: str) -> None:
    with pytest.raises(Corrupt):
        serialization.decode(HOSTILE[name])


def test_any_changed_byte_is_another_value_or_refused() -> None:
    data, refused = serialization.encode({"a": torch.arange(4.0), "n": 3}), 0
    for position in range(len(data)):
        broken = bytearray(data)
        broken[position] ^= 0x55
        try:
            found = serialization.decode(bytes(broken))
        except Corrupt:
            refused += 1
        else:
            assert serialization.encode(found) != data, position
    assert refused > len(data) // 2


@given(st.binary(max_size=300))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(Corrupt):
        serialization.decode(data)


def test_a_crash_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    serialization.save(path, {"a": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        serialization.save(path, {"a": 2})
    assert serialization.load(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"nonsense")
    with pytest.raises(Corrupt, match="broken"):
        serialization.load(tmp_path / "broken")


def _stored(tag: Any = "tests.Sample", version: Any = 1, names: tuple[str, ...] = ("count", "inner")) -> bytes:
    """A value of one class two levels down, as it is stored."""
    value = {"class": tag, "version": version, "with": dict.fromkeys(names, 7)}
    return _header({"__metadata__": {"value": json.dumps({"map": {"state": {"list": [1, value]}}})}})


def test_files_hold_the_tag_and_the_version_and_no_module() -> None:
    data = serialization.encode(
        Reply({"m": WeightedMean.of({"a": torch.ones(2)}, 1), "s": PerSite({"x": {"a": torch.ones(1)}})})
    )
    value = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["value"])
    assert (value["class"], value["version"]) == ("core.Reply", 1)
    assert value["with"]["parts"]["map"]["m"]["class"] == "core.WeightedMean"
    assert b"polyclinic" not in data
    assert serialization.kind_of(WeightedMean.of({"a": torch.ones(2)}, 1)) == "WeightedMean"


def test_a_stored_tag_is_read_as_its_class() -> None:
    assert serialization.decode(_stored()) == {"state": [1, Sample(7, 7)]}


@pytest.mark.parametrize(
    ("stored", "what"),
    [
        (_stored("tests.Other"), r"no class is registered for the tag 'tests\.Other'\. Install the package"),
        (
            _stored("polyclinic.core.aggregates.WeightedMean"),
            r"no class is registered for the tag 'polyclinic\.core\.aggregates\.WeightedMean'",
        ),
        (
            _stored(version=2),
            r"'tests\.Sample' is stored in version 2, and this installation supports version 1: update",
        ),
        (_stored(version=0), r"version of 'tests\.Sample' must be an integer"),
        (_stored(version=True), r"version of 'tests\.Sample' must be an integer"),
        (_stored(version="1"), r"version of 'tests\.Sample' must be an integer"),
        (_stored(7), r"'7' is not a tag"),
        (_stored("os.system"), r"'os\.system' is not a tag"),
        (_stored("a" * 90 + ".B"), r"is not a tag"),
        (_stored("../x.State"), r"is not a tag"),
        (_stored(names=("count",)), r"'tests\.Sample' version 1 has the fields \['count', 'inner'\]"),
    ],
)
def test_an_unusable_tag_is_named_with_file_field_and_remedy(stored: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(stored)
    with pytest.raises(Corrupt, match=rf"checkpoint\.safetensors: field state\.1: .*{what}"):
        serialization.load(tmp_path / "checkpoint.safetensors")


def test_an_older_version_is_not_read_as_the_present_one() -> None:
    @savable("tests.Newer", 3)
    class Newer(NamedTuple):
        count: int  # type: ignore[assignment]  # it hides tuple.count, as a field may

    with pytest.raises(
        Corrupt, match=r"stored in version 2, and this installation supports version 3: read it with the"
    ):
        serialization.decode(_stored("tests.Newer", 2, ("count",)))


def test_one_tag_for_two_classes_names_both() -> None:
    with pytest.raises(
        TagError, match=r"'tests\.Sample' .* both .*test_serialization\.Sample and .*Other: change one of the tags"
    ):

        @savable("tests.Sample", 1)
        class Other(NamedTuple):
            count: int  # type: ignore[assignment]  # it hides tuple.count, as a field may

    assert serialization.decode(serialization.encode(Sample(1, 2))) == Sample(1, 2)


def test_the_same_definition_may_be_executed_again() -> None:
    made = []
    for fields in ("count: int", "count: int; more: int = 0"):  # as a cell of a notebook that was changed
        space: dict[str, Any] = {"__name__": "notebook", "NamedTuple": NamedTuple, "savable": savable}
        exec(f'@savable("tests.Cell", 1)\nclass Cell(NamedTuple):\n    {fields}\n', space)
        made.append(space["Cell"])
    assert serialization.decode(serialization.encode(made[1](1, 2))) == made[1](1, 2)
    assert type(serialization.decode(serialization.encode(made[1](1, 2)))) is made[1]


@pytest.mark.parametrize(
    "tag",
    [
        "",
        "State",
        "fedavg.state",
        "Fedavg.State",
        ".State",
        "fedavg.",
        "a..B",
        "a b.C",
        "a.B.C",
        "é.State",
        "a" * 80 + ".B",
        "a.B\n",
    ],
)
def test_malformed_tags_are_errors_at_import(tag: str) -> None:
    with pytest.raises(TagError, match=r"malformed"):
        savable(tag, 1)


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None])
def test_malformed_versions_are_errors_at_import(version: Any) -> None:
    with pytest.raises(TagError, match="must be an integer"):
        savable("tests.Version", version)


def test_a_mark_without_a_tag_says_what_to_write() -> None:
    with pytest.raises(TagError, match=r'@savable\("mypackage.State", 1\)'):

        @savable  # type: ignore[arg-type, type-var]
        class Bare(NamedTuple):
            count: int  # type: ignore[assignment]  # it hides tuple.count, as a field may


def test_reading_a_tag_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mypackage.py").write_text(
        "from typing import NamedTuple\nfrom polyclinic.core.serialization import savable\n\n\n"
        '@savable("mypackage.State", 1)\nclass State(NamedTuple):\n    round: int\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    data = _stored("mypackage.State", 1, ("round",))
    with pytest.raises(Corrupt, match="import it before reading"):
        serialization.decode(data)
    assert "mypackage" not in sys.modules
    import mypackage  # type: ignore[import-not-found]

    assert isinstance(mypackage, ModuleType)
    assert serialization.decode(data) == {"state": [1, mypackage.State(7)]}
    assert serialization.decode(serialization.encode(mypackage.State(3))) == mypackage.State(3)


def test_a_subclass_needs_a_tag_of_its_own() -> None:
    class Unmarked(Sample):
        pass

    with pytest.raises(TypeError, match=r"Unmarked cannot be saved"):
        serialization.encode(Unmarked(1, 2))


def test_places_in_messages_are_short_and_printable() -> None:
    inner: Any = {"class": "tests.Other", "version": 1, "with": {}}
    for key in ("k" * 5000, "\x1b[2J", *"abcdefgh"):
        inner = {"map": {key: inner}}
    with pytest.raises(Corrupt) as caught:
        serialization.decode(_header({"__metadata__": {"value": json.dumps(inner)}}))
    assert len(str(caught.value)) < 600
    assert "\x1b" not in str(caught.value)
