"""Vectors as files: what belongs together is merged, anything else is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.cli import vectors as cli
from polyclinic.core import tree
from polyclinic.engines.plan import Plan
from polyclinic.learning.networks.model_tree import inspect
from polyclinic.methods.one_shot.merging import Merging
from polyclinic.studies.export import vector_exchange
from polyclinic.studies.export.vector_file import (
    FORMAT,
    VectorRefused,
    canonical,
    digest,
    load_key,
    load_keys,
    read_vector,
)
from polyclinic.studies.run.run_directory import read_tensors, write_tensors
from tests.support.small_runs import npz, study

PLAN = Plan("classification", "cnn", (1, 8, 8), 2, "fedavg", ("a", "b"), 3, network_options={"width": 4, "depth": 2})
SITES = ("a", "b", "c")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a study, and the vectors of three sites with their keys."""
    folder = tmp_path_factory.mktemp("vectors")
    npz(folder)
    (folder / "study.toml").write_text(study(folder).split("[[methods]]")[0] + '[[methods]]\nname = "fedavg"\n')
    write_tensors(folder / "base.safetensors", PLAN.build_task().first(0), {"plan": PLAN.to_json()})
    base, keys = vector_exchange.read_base(folder / "base.safetensors"), []
    (folder / "v").mkdir()
    for site in SITES:
        own = vector_exchange.examples_of(folder / "study.toml", site, "train")
        card = vector_exchange.make(
            base, site, own, load_key(folder / f"{site}.key"), folder / "v" / f"{site}.safetensors"
        )
        keys.append(f'{site} = "{card.key}"\n')
    (folder / "keys.toml").write_text("".join(keys))
    return folder


@pytest.fixture
def base(made: Path) -> Any:
    return vector_exchange.read_base(made / "base.safetensors")


@pytest.fixture
def keys(made: Path) -> Any:
    return load_keys(made / "keys.toml")


def files(made: Any, *sites: Any) -> Any:
    return [made / "v" / f"{site}.safetensors" for site in sites or SITES]


def header(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.metadata()


def changed(
    made: Any, tmp_path: Path, card: Any = None, tensors: Any = None, signature: Any = None, site: Any = "a"
) -> Path:
    """A vector with another card, tensors or signature."""
    source = made / "v" / f"{site}.safetensors"
    meta = header(source)
    meta["vector"] = canonical({**json.loads(meta["vector"]), **(card or {})})
    out = tmp_path / f"{site}.safetensors"
    write_tensors(
        out, {**read_tensors(source), **(tensors or {})}, {**meta, "signature": signature or meta["signature"]}
    )
    return out


def resigned(made: Any, tmp_path: Path, key: Any = None, **fields: Any) -> Path:
    """A vector of site a that says something else, signed again: by a itself, or by ``key``."""
    file = made / "v" / "a.safetensors"
    card, vector = read_vector(file)
    out, key = tmp_path / "other.safetensors", key or load_key(made / "a.key")
    from polyclinic.studies.export.vector_file import write_vector

    given = {
        "base": card.base,
        "architecture": card.architecture,
        "site": card.site,
        "classes": card.classes,
        "vector": vector,
        **fields,
    }
    write_vector(out, examples=card.examples, key=key, **given)
    return out


def test_a_vector_says_what_it_is(made: Path, base: Any) -> None:
    card, vector = read_vector(made / "v" / "b.safetensors")
    assert (card.site, card.base, card.architecture) == ("b", base.digest, base.architecture)
    assert card.classes == ("class 0", "class 1")
    assert card.examples == len(vector_exchange.examples_of(made / "study.toml", "b", "train").data)
    assert card.norm == tree.norm(vector) > 0
    running = inspect(PLAN.build_task().model()).running
    assert vector.keys() == base.params.keys() - running


def test_anyone_can_read_the_file(made: Path) -> None:
    """With the standard library alone: eight bytes, JSON, numbers."""
    data = (made / "v" / "a.safetensors").read_bytes()
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(head["__metadata__"]["vector"])["site"] == "a"
    assert head["head.weight"]["dtype"] == "F32"


def test_a_key_is_its_owners_alone(made: Path) -> None:
    assert (made / "a.key").stat().st_mode & 0o077 == 0
    assert load_key(made / "a.key").private_bytes_raw() == load_key(made / "a.key").private_bytes_raw()


def test_removal_gives_the_file_of_the_merge_without_the_site(made: Path, base: Any, keys: Any, tmp_path: Path) -> None:
    for how, restored in ((Merging(), True), (Merging(ties=0.4, tune=1), True), (Merging(by_layer=True), False)):
        on = vector_exchange.examples_of(made / "study.toml", "c", "val") if restored else None
        all_, without, removed = (tmp_path / f"{name}.safetensors" for name in ("all", "without", "removed"))
        vector_exchange.merge(base, vector_exchange.accept(base, files(made), keys), how, all_, on)
        vector_exchange.merge(base, vector_exchange.accept(base, files(made, "a", "c"), keys), how, without, on)
        vector_exchange.remove(all_, "b", base, files(made), keys, removed, on)
        assert removed.read_bytes() == without.read_bytes() != all_.read_bytes()


def test_the_order_of_files_changes_nothing(made: Path, base: Any, keys: Any, tmp_path: Path) -> None:
    for i, order in enumerate((SITES, SITES[::-1])):
        vector_exchange.merge(
            base, vector_exchange.accept(base, files(made, *order), keys), Merging(), tmp_path / f"{i}.safetensors"
        )
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()


def test_without_restoration_it_is_the_base_and_the_mean_of_vectors(
    made: Path, base: Any, keys: Any, tmp_path: Path
) -> None:
    found = vector_exchange.accept(base, files(made), keys)
    params = vector_exchange.merge(base, found, Merging(), tmp_path / "m.safetensors").params
    for name, leaf in params.items():
        mean = sum(vector[name] for _, vector in found.values()) / 3 if name in base.form else 0.0
        torch.testing.assert_close(leaf, base.params[name] + mean)


def test_controls_stand_beside_the_merge(made: Path, base: Any, keys: Any, tmp_path: Path) -> None:
    on = vector_exchange.examples_of(made / "study.toml", "c", "train")
    got = vector_exchange.merge(
        base, vector_exchange.accept(base, files(made), keys), Merging(), tmp_path / "m.safetensors", on
    )
    assert list(got.controls) == ["merged", "base", "random", "a alone", "b alone", "c alone"]
    assert got.controls["merged"]["loss"] == pytest.approx(min(got.losses.values()), rel=1e-5)
    assert got.controls["merged"]["loss"] < got.controls["random"]["loss"]
    assert got.controls["merged"]["loss"] < got.controls["base"]["loss"]


def test_a_forged_or_altered_vector_is_refused(made: Path, base: Any, keys: Any, tmp_path: Path) -> None:
    forged = "its signature is forged, or the file was changed"
    for given, says in (
        ({"card": {"examples": 10**6}}, forged),
        ({"signature": "00" * 64}, forged),
        ({"signature": "no"}, "a.safetensors"),
        ({"tensors": {"head.bias": torch.ones(2)}}, "its tensors are not those that a signed"),
        ({"card": {"site": "../../etc/passwd"}}, "a site's name is of"),
        ({"card": {"more": 1}}, "has the fields"),
        ({"card": {"norm": "long"}}, "a.safetensors"),
    ):
        with pytest.raises(VectorRefused, match=says):
            vector_exchange.accept(base, [changed(made, tmp_path, **given)], keys)


def test_another_sites_key_does_not_vouch(made: Path, base: Any, keys: Any, tmp_path: Path) -> None:
    impostor = resigned(made, tmp_path, key=load_key(made / "b.key"))
    with pytest.raises(VectorRefused, match="signed with another key than that of a"):
        vector_exchange.accept(base, [impostor], keys)
    with pytest.raises(VectorRefused, match="no key is known of 'b'"):
        vector_exchange.accept(base, files(made, "b"), {"a": keys["a"]})


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("base", "0" * 64, "a began from other parameters"),
        ("architecture", "0" * 64, "a fine-tuned another architecture"),
        ("vector", {"head.bias": torch.ones(2)}, "tensors are not those of a vector for the base"),
    ],
)
def test_what_was_made_from_something_else_is_refused(
    made: Path, base: Any, keys: Any, tmp_path: Path, field: str, value: Any, says: str
) -> None:
    with pytest.raises(VectorRefused, match=says):
        vector_exchange.accept(base, [resigned(made, tmp_path, **{field: value})], keys)


def test_another_order_of_classes_is_refused_with_both(made: Path, base: Any, keys: Any, tmp_path: Path) -> None:
    other = resigned(made, tmp_path, classes=("class 1", "class 0"))
    with pytest.raises(VectorRefused, match="a: class 1, class 0; b: class 0, class 1"):
        vector_exchange.accept(base, [other, *files(made, "b")], keys)


def test_nan_two_of_one_site_none_and_junk_are_refused_at_once(
    made: Path, base: Any, keys: Any, tmp_path: Path
) -> None:
    _, vector = read_vector(made / "v" / "a.safetensors")
    spoiled = resigned(made, tmp_path, vector={**vector, "head.bias": torch.full((2,), float("nan"))})
    nan = {"head.bias": torch.full((2,), float("nan"))}
    unsigned = {"norm": 1.0, "tensors": digest({**vector, **nan})}
    text = canonical({**json.loads(header(made / "v" / "a.safetensors")["vector"]), **unsigned})
    signature = load_key(made / "a.key").sign(f"{FORMAT}\n{text}".encode()).hex()
    lying = changed(made, tmp_path, unsigned, nan, signature)
    (junk := tmp_path / "junk.safetensors").write_bytes(b"\x80\x04" + b"x" * 100)
    (huge := tmp_path / "huge.safetensors").write_bytes(b"\0" * (2**21))
    with pytest.raises(VectorRefused) as error:
        vector_exchange.accept(base, [spoiled, lying, *files(made, "a"), junk, huge], keys)
    for says in (
        "norm a finite number",
        "NaN",
        "a second vector of a",
        "not a safetensors file",
        "takes at most",
        "Nothing was merged",
    ):
        assert says in str(error.value)
    with pytest.raises(VectorRefused, match="no vectors"):
        vector_exchange.accept(base, [], keys)


def test_a_removal_that_would_not_be_exact_is_refused(made: Path, base: Any, keys: Any, tmp_path: Path) -> None:
    on = vector_exchange.examples_of(made / "study.toml", "c", "val")
    model = tmp_path / "m.safetensors"
    vector_exchange.merge(base, vector_exchange.accept(base, files(made), keys), Merging(), model, on)
    for site, given, data, says in (
        ("b", SITES, None, "was restored on the role .val. of c; name the study, the site and the role"),
        ("b", ("a", "b"), on, "holds the vectors of a, b, c, here are a, b"),
        ("x", SITES, on, "x is not in it"),
    ):
        with pytest.raises(VectorRefused, match=says):
            vector_exchange.remove(model, site, base, files(made, *given), keys, tmp_path / "out.safetensors", data)
        assert not (tmp_path / "out.safetensors").exists()
    with pytest.raises(VectorRefused, match="was not merged from data vectors"):
        vector_exchange.remove(made / "base.safetensors", "a", base, files(made), keys, model)


def test_the_hash_is_of_numbers_and_not_of_files(base: Any) -> None:
    flipped = dict(reversed(base.params.items()))
    assert digest(flipped) == base.digest
    assert digest({**flipped, "head.bias": flipped["head.bias"] + 1e-6}) != base.digest


def test_data_that_do_not_fit_are_refused(made: Path, base: Any, tmp_path: Path) -> None:
    with pytest.raises(VectorRefused, match="no site is called 'x'; there are a, b, c, d"):
        vector_exchange.examples_of(made / "study.toml", "x", "train")
    with pytest.raises(VectorRefused, match="d has no train data"):
        vector_exchange.examples_of(made / "study.toml", "d", "train")
    (tmp_path / "keys.toml").write_text('a = "short"\n')
    with pytest.raises(VectorRefused, match="64 hexadecimal digits"):
        load_keys(tmp_path / "keys.toml")
    with pytest.raises(VectorRefused, match="not a model to begin from"):
        vector_exchange.read_base(made / "v" / "a.safetensors")


def test_the_commands_from_key_to_removal(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for site in SITES:
        args: dict[str, Any] = {"study": made / "study.toml", "site": site, "key": made / f"{site}.key"}
        cli.make(made / "base.safetensors", tmp_path / f"{site}.safetensors", **args)
        assert (tmp_path / f"{site}.safetensors").read_bytes() == (made / "v" / f"{site}.safetensors").read_bytes()
    common: dict[str, Any] = {"keys": made / "keys.toml", "study": made / "study.toml", "site": "c"}
    model = tmp_path / "out" / "m.safetensors"
    model.parent.mkdir()
    cli.merge(made / "base.safetensors", [tmp_path], out=model, **common)
    cli.remove(model, "b", made / "base.safetensors", [tmp_path], out=model, **common)
    assert sorted(f.name for f in tmp_path.glob("*.safetensors")) == ["a.safetensors", "c.safetensors"]
    cli.show(tmp_path / "a.safetensors")
    text = capsys.readouterr().out
    assert "a, c; λ =" in text
    assert "random" in text
    assert "b.safetensors deleted" in text


def test_the_commands_print_json(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def document(command: Any, *args: Any, **options: Any) -> Any:
        capsys.readouterr()
        command(*args, **options, json_=True)
        return json.loads(capsys.readouterr().out)

    for site in SITES:
        args: dict[str, Any] = {"study": made / "study.toml", "site": site, "key": made / f"{site}.key"}
        card = document(cli.make, made / "base.safetensors", tmp_path / f"{site}.safetensors", **args)
        assert card["site"] == site
    model, keys = tmp_path / "m" / "m.safetensors", made / "keys.toml"
    model.parent.mkdir()
    merged = document(cli.merge, made / "base.safetensors", [tmp_path], out=model, keys=keys)
    assert (merged["sites"], merged["scores"]) == (list(SITES), {})
    removed = document(cli.remove, model, "b", made / "base.safetensors", [tmp_path], out=model, keys=keys)
    assert removed["deleted"] == [str(tmp_path / "b.safetensors")]
    assert document(cli.show, tmp_path / "a.safetensors")["site"] == "a"
