"""``polyclinic weights``: start weights of pretrained networks."""

import os
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from polyclinic.cli.rendering import Json, confirmed, document, done, hint, line
from polyclinic.engines.flare.protocol.paths import WEIGHTS, SiteFolder
from polyclinic.errors import ConfigError

app = App(name="weights", help="Add, list and check start weights of pretrained networks.")
site_app = App(name="weights", help="Add and list the start weights that studies may use at this site.")
Home = Annotated[Path, Parameter(help="The site's folder; $POLYCLINIC_HOME or the current folder by default.")]
HERE = Path(os.environ.get("POLYCLINIC_HOME", "."))


@app.command
def add(
    source: Path,
    *,
    name: str = "",
    license: str = "",
    origin: str = "",
    trained_on: str = "",
    citation: str = "",
    no_redistribution: bool = False,
    key: str = "",
    json_: Json = False,
) -> None:
    """Add weights to the store, as safetensors, and print the lines for a study file.

    No code of the file is executed: whatever is not a tensor is refused.

    Args:
        source: A file (safetensors, torch.save, TorchScript, checkpoints of timm or nnU-Net) or a folder (MONAI bundle,
            Hugging Face snapshot).
        name: The name in the store; by default that of the file.
        license: The license of the weights, such as Apache-2.0. Needed unless a folder states it.
        origin: Their origin, such as an address.
        trained_on: The data they were trained on. Test images among them would make a test worthless.
        citation: The publication to cite.
        no_redistribution: State that the license forbids to pass them on; whole models are then not exported.
        key: The entry of a file that holds the tensors, such as teacher.
    """
    from polyclinic.learning.weights import importer
    from polyclinic.learning.weights.store import Card

    with document(json_) as emit:
        license = license or (importer.stated_license(source) if source.is_dir() else "")
        if not license:
            raise ConfigError(f"{source}: give the license of the weights, such as --license Apache-2.0")
        called = name or source.stem.lower().replace(" ", "-")
        card = Card(called, license, origin, trained_on, "", citation, not no_redistribution)
        found = importer.add(source, card, key)
        stored = found.stored
        line(f"added    {called}: {found.tensors} tensors, {found.numbers} numbers, {stored.card.original_format}")
        for note in stored.card.notes:
            line(f"         {note}")
        done(f'[task.weights]\nfile = "{called}"\nsha256 = "{stored.sha256}"')
        emit({**_facts(stored), "tensors": found.tensors, "numbers": found.numbers})
        hint("next     polyclinic weights check STUDY.toml, which accounts for every tensor")


@app.command(name="list")
def list_(*, json_: Json = False) -> None:
    """List the weights in the store."""
    from polyclinic.learning.weights import store

    with document(json_) as emit:
        known = store.stored()
        emit([_facts(item) for item in known])
        for item in known:
            line(f"  {item.card.name:<24} {item.sha256[:12]}  {item.size / 1e6:8.1f} MB  {item.card.license}")
        if not known:
            line(f"no weights in {store.root()}")


@app.command
def show(name: str, *, tensors: bool = False, json_: Json = False) -> None:
    """Show the card of weights, and their tensors.

    Args:
        name: The name or hash of weights in the store.
        tensors: List the tensors with their shapes.
    """
    from polyclinic.learning.weights import store

    with document(json_) as emit:
        item = store.find(name)
        leaves = {key: list(leaf.shape) for key, leaf in store.tensors(item.sha256).items()}
        emit({**_facts(item), "tensors": leaves})
        for key, value in _facts(item).items():
            line(f"  {key:<16} {'; '.join(value) if isinstance(value, list) else value}")
        for key, shape in leaves.items() if tensors else ():
            line(f"  {key:<60} {'x'.join(map(str, shape))}")
        if not tensors:
            line(f"  {'tensors':<16} {len(leaves)}; --tensors lists them")


@app.command
def check(study: Path, *, json_: Json = False) -> None:
    """Account for every tensor of a study's start weights and network, and say what would be trained.

    Args:
        study: The study file.
    """
    from polyclinic.learning.networks.fine_tuning import FineTuned
    from polyclinic.learning.networks.model_tree import frozen
    from polyclinic.studies.config.study_config import read
    from polyclinic.studies.run.resolved_study import resolve

    with document(json_) as emit:
        found = read(study)
        network: Any = resolve(found, study.read_text(encoding="utf-8")).task.network
        if not isinstance(network, FineTuned) or (account := network.account()) is None:
            raise ConfigError(f"{study}: sets no start weights: [task.weights] file = ...")
        model = network()
        constant, state = frozen(model), {n: t for n, t in model.state_dict().items() if t.is_floating_point()}
        trained = {name: leaf.numel() for name, leaf in state.items() if name not in constant}
        total = sum(leaf.numel() for leaf in state.values())
        line(account.summary)
        for key, how in account.adapted.items():
            line(f"  adapted  {key}: {how}")
        share = 100 * sum(trained.values()) / total
        done(f"trained: {len(trained)} tensors, {sum(trained.values())} of {total} numbers ({share:.2f} %)")
        emit(
            {
                "loaded": account.loaded,
                "new": account.new,
                "adapted": dict(account.adapted),
                "unused": account.unused,
                "trained": trained,
                "numbers": total,
            }
        )


@app.command
def remove(name: str, *, yes: bool = False, json_: Json = False) -> None:
    """Delete weights from the store. Runs that start from them cannot be repeated without adding them again.

    Args:
        name: The name or hash of weights in the store.
        yes: Do not ask.
    """
    from polyclinic.learning.weights import store

    with document(json_) as emit:
        item = store.find(name)
        if not yes and not confirmed(f"Delete {item.card.name} ({item.sha256[:12]}, {item.size / 1e6:.1f} MB)?"):
            raise ConfigError("not deleted")
        store.remove(item)
        done(f"deleted {item.card.name}")
        emit({"name": item.card.name, "sha256": item.sha256})


@site_app.command(name="add")
def add_at_site(
    source: Path,
    *,
    name: str = "",
    license: str = "",
    origin: str = "",
    key: str = "",
    home: Home = HERE,
    json_: Json = False,
) -> None:
    """Add weights to this site's own store. A study names them by their hash, which is the same at every site.

    Args:
        source: The file or folder, as for `polyclinic weights add`.
        name: The name in the store; by default that of the file.
        license: The license of the weights. Needed unless a folder states it.
        origin: Their origin, such as an address.
        key: The entry of a file that holds the tensors.
    """
    use_site(home)
    add(source, name=name, license=license, origin=origin, key=key, json_=json_)


@site_app.command(name="list")
def list_at_site(*, home: Home = HERE, json_: Json = False) -> None:
    """List the weights in this site's store."""
    use_site(home)
    list_(json_=json_)


def use_site(home: Path) -> None:
    """Use the store of the site in the folder ``home`` in this process."""
    os.environ[WEIGHTS] = str(SiteFolder(home.resolve()).weights)


def _facts(item: Any) -> dict[str, Any]:
    from dataclasses import asdict

    card = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(item.card).items()}
    return {"sha256": item.sha256, "bytes": item.size, **{key: value for key, value in card.items() if value != ""}}
