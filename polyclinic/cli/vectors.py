"""``polyclinic vectors``: fine-tune, sign, hand over, merge, and remove again."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cyclopts import App

from polyclinic.cli.rendering import console
from polyclinic.errors import ConfigError

app = App(name="vectors", help="One-shot merging: each site hands over one signed file, whenever it is ready.")


@app.command
def make(
    base: Path, out: Path, *, study: Path, site: str, key: Path, role: str = "train", tuned: Path | None = None
) -> None:
    """Fine-tune the common model on a site's own data, and write the signed vector.

    Args:
        base: The common model: a run's model.safetensors, or one that `polyclinic export --form safetensors` wrote.
        out: The vector to write, such as ada.safetensors.
        study: A study file whose [data] are the site's and whose [training] says how to fine-tune.
        site: Which of its sites this is.
        key: The site's private key; made where there is none.
        role: On which of the site's data to train.
        tuned: Parameters that were fine-tuned elsewhere, as safetensors, instead of training here.
    """
    from polyclinic.studies.export import vector_exchange
    from polyclinic.studies.export.vector_file import load_key
    from polyclinic.studies.run.run_directory import read_tensors

    own = vector_exchange.examples_of(study, site, role)
    secret = load_key(key)
    card = vector_exchange.make(
        vector_exchange.read_base(base), site, own, secret, out, tuned=None if tuned is None else read_tensors(tuned)
    )
    console.print(f"  [green]✓[/green] {out}: {card.examples} examples, length {card.norm:.3g}", soft_wrap=True)
    console.print(f'  for the keys of whoever merges: {site} = "{card.key}"', soft_wrap=True)


@app.command
def merge(
    base: Path,
    vectors: list[Path],
    *,
    keys: Path,
    out: Path,
    scale: float | None = None,
    ties: float = 0.0,
    by_layer: bool = False,
    tune: int = 0,
    study: Path | None = None,
    site: str = "",
    role: str = "val",
) -> None:
    """Merge signed vectors into one model.

    Args:
        base: The common model that every site began from.
        vectors: The sites' files, or folders of them.
        keys: A TOML file with each site's public key, as the site told it.
        out: The model to write.
        scale: λ; searched for on the restoration set by default, and 1 over the number of sites without one.
        ties: Keep this share of each vector's largest entries and elect their signs (TIES); 0 adds them up.
        by_layer: Make each layer of the sum as long as the sites' are on average.
        tune: Passes over the restoration set at the end, at a tenth of the learning rate.
        study: A study file with the restoration set. `site` and `role` say which of its data.
        site: The site of that study whose data are the restoration set.
        role: Which of that site's data: train, val or test.
    """
    from polyclinic.methods.one_shot.merging import Merging
    from polyclinic.studies.export import vector_exchange
    from polyclinic.studies.export.vector_file import load_keys

    common = vector_exchange.read_base(base)
    found = vector_exchange.accept(common, _files(vectors), load_keys(keys))
    made = vector_exchange.merge(
        common, found, Merging(scale, ties, by_layer, tune), out, _restoration(study, site, role)
    )
    _tell(made, out)


@app.command
def remove(
    model: Path,
    leaving: str,
    base: Path,
    vectors: list[Path],
    *,
    keys: Path,
    out: Path,
    study: Path | None = None,
    site: str = "",
    role: str = "val",
    keep: bool = False,
) -> None:
    """Merge again without one site, as if it had never taken part, and delete its vector.

    Args:
        model: The merged model that the site is to leave. It says how it was made.
        leaving: The site.
        base: The common model that every site began from.
        vectors: The files that were merged, or folders of them.
        keys: A TOML file with each site's public key.
        out: The model to write. It may replace `model`.
        study: The study file with the restoration set that was used, if any.
        site: The site of that study whose data are the restoration set.
        role: Which of that site's data: train, val or test.
        keep: Leave the site's vector where it is.
    """
    from polyclinic.studies.export import vector_exchange
    from polyclinic.studies.export.vector_file import load_keys, read_vector

    given = _files(vectors)
    made = vector_exchange.remove(
        model, leaving, vector_exchange.read_base(base), given, load_keys(keys), out, _restoration(study, site, role)
    )
    _tell(made, out)
    for file in given if not keep else []:
        if read_vector(file)[0].site == leaving:
            file.unlink()
            console.print(f"  {file} deleted", soft_wrap=True)


@app.command
def show(file: Path, *, json_: bool = False) -> None:
    """What a vector says of itself, after checking its signature.

    Args:
        file: A vector.
        json_: Print JSON instead.
    """
    from polyclinic.studies.export.vector_file import read_vector

    card = asdict(read_vector(file)[0])
    if json_:
        print(json.dumps(card, indent=1))
        return
    for name, value in card.items():
        told = ", ".join(value) if isinstance(value, tuple) else f"{value:.4g}" if isinstance(value, float) else value
        console.print(f"  {name:<13} {told}", soft_wrap=True, markup=False)
    console.print("  Whole and signed by the key above. Whether that is the site's, only the site can say.")


def _files(given: list[Path]) -> list[Path]:
    """Files, and those in folders, in name order."""
    found = [f for path in given for f in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])]
    if missing := [str(f) for f in found if not f.is_file()]:
        raise ConfigError(f"there is no {', '.join(missing)}")
    return found


def _restoration(study: Path | None, site: str, role: str) -> Any:
    from polyclinic.studies.export.vector_exchange import examples_of

    return None if study is None else examples_of(study, site, role)


def _tell(made: Any, out: Path) -> None:
    console.print(f"  [green]✓[/green] {out}: {', '.join(made.sites)}; λ = {made.scale:.4g}", soft_wrap=True)
    for scale, loss in made.losses.items():
        console.print(f"    λ = {scale:<8.4g} loss {loss:.4f}")
    if not made.controls:
        console.print(
            "  No restoration set was given: nothing was compared. Batch normalization, if any, kept the base's.",
            soft_wrap=True,
        )
        return
    console.print("  On the restoration set, which also chose λ: too kind to the merged model.")
    for name, scores in made.controls.items():
        told = "  ".join(f"{metric} {value:.3f}" for metric, value in scores.items())
        console.print(f"    {name:<24} {told}", soft_wrap=True)
