"""``polyclinic vectors``: one-shot merging of task vectors: fine-tune, sign, merge, and remove a site again."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cyclopts import App

from polyclinic.cli.rendering import Json, document, done, line
from polyclinic.errors import ConfigError

app = App(name="vectors", help="Merge models once, from one signed file per site.")


@app.command
def make(
    base: Path,
    out: Path,
    *,
    study: Path,
    site: str,
    key: Path,
    role: str = "train",
    tuned: Path | None = None,
    json_: Json = False,
) -> None:
    """Fine-tune the common model on a site's own data, and write the signed vector.

    Args:
        base: The common model: a run's model.safetensors, or one that `polyclinic export --form safetensors` wrote.
        out: The vector to write, such as ada.safetensors.
        study: A study file with the site's [data], and with [training] for fine-tuning.
        site: The name of this site in the study.
        key: The file with the site's private key, created if it is missing.
        role: The part of the site's data to train on: train, val or test.
        tuned: Parameters that another program fine-tuned, as safetensors, instead of training here.
    """
    from polyclinic.studies.export import vector_exchange
    from polyclinic.studies.export.vector_file import load_key
    from polyclinic.studies.run.run_directory import read_tensors

    with document(json_) as emit:
        common = vector_exchange.read_base(_existing(base, "the common model"))
        own = vector_exchange.examples_of(study, site, role)
        secret = load_key(key)
        parameters = None if tuned is None else read_tensors(tuned)
        card = vector_exchange.make(common, site, own, secret, out, tuned=parameters)
        done(f"{out}: {card.examples} examples, norm {card.norm:.3g}")
        line(f'  for the file of keys of the person who merges: {site} = "{card.key}"')
        emit({"vector": out, **asdict(card)})


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
    dare: float = 0.0,
    study: Path | None = None,
    site: str = "",
    role: str = "val",
    json_: Json = False,
) -> None:
    """Merge signed vectors into one model.

    Args:
        base: The common model that every site fine-tuned.
        vectors: The sites' files, or folders of them.
        keys: A TOML file with each site's public key, as the site reported it.
        out: The model to write.
        scale: λ. By default it is searched for on the restoration set, or is 1 divided by the number of sites without
            one.
        ties: Keep this share of each vector's largest entries and elect their signs (TIES); 0 adds the vectors.
        by_layer: Scale each layer of the sum to the mean norm of the sites' layers.
        tune: Passes over the restoration set at the end, at a tenth of the learning rate.
        dare: Drop this share of each vector's entries at random and enlarge the others (DARE).
        study: A study file with the restoration set, which `site` and `role` select.
        site: The site of that study whose data are the restoration set.
        role: The part of that site's data: train, val or test.
    """
    from polyclinic.methods.one_shot.merging import Merging
    from polyclinic.studies.export import vector_exchange
    from polyclinic.studies.export.vector_file import load_keys

    with document(json_) as emit:
        common = vector_exchange.read_base(_existing(base, "the common model"))
        accepted = vector_exchange.accept(common, _files(vectors), load_keys(keys))
        merging = Merging(scale, ties, by_layer, tune, dare)
        made = vector_exchange.merge(common, accepted, merging, out, _restoration(study, site, role))
        _show_merged(made, out)
        emit(_merged_json(made, out))


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
    json_: Json = False,
) -> None:
    """Merge again without one site, as if it had never taken part, and delete its vector.

    Args:
        model: The merged model, which records how it was made.
        leaving: The site to remove.
        base: The common model that every site fine-tuned.
        vectors: The files that were merged, or folders of them.
        keys: A TOML file with each site's public key.
        out: The model to write. It may replace `model`.
        study: The study file with the restoration set that was used, if any.
        site: The site of that study whose data are the restoration set.
        role: The part of that site's data: train, val or test.
        keep: Do not delete the site's vector.
    """
    from polyclinic.studies.export import vector_exchange
    from polyclinic.studies.export.vector_file import load_keys, read_vector

    with document(json_) as emit:
        files = _files(vectors)
        common = vector_exchange.read_base(_existing(base, "the common model"))
        restoration = _restoration(study, site, role)
        made = vector_exchange.remove(
            _existing(model, "the merged model"), leaving, common, files, load_keys(keys), out, restoration
        )
        _show_merged(made, out)
        deleted = [file for file in files if not keep and read_vector(file)[0].site == leaving]
        for file in deleted:
            file.unlink()
            line(f"  {file} deleted")
        emit({**_merged_json(made, out), "deleted": deleted})


@app.command
def show(file: Path, *, json_: Json = False) -> None:
    """Show the facts that a vector states about itself, after checking its signature.

    Args:
        file: A vector.
    """
    from polyclinic.studies.export.vector_file import read_vector

    with document(json_) as emit:
        card = asdict(read_vector(_existing(file, "a vector"))[0])
        emit(card)
        for name, value in card.items():
            text = (
                ", ".join(value) if isinstance(value, tuple) else f"{value:.4g}" if isinstance(value, float) else value
            )
            line(f"  {name:<13} {text}")
        line("  The file is complete and signed by this key. Ask the site whether the key is its own.")


def _existing(file: Path, what: str) -> Path:
    """Return ``file``.

    Raises:
        ConfigError: If it does not exist or is a folder.
    """
    if not file.is_file():
        problem = "is a folder" if file.is_dir() else "does not exist"
        raise ConfigError(f"{file} {problem}: name {what}, a .safetensors file")
    return file


def _files(given: list[Path]) -> list[Path]:
    """Return the given files, and those in given folders, in name order."""
    files = [f for path in given for f in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])]
    if missing := [str(f) for f in files if not f.is_file()]:
        raise ConfigError(f"there is no {', '.join(missing)}")
    return files


def _restoration(study: Path | None, site: str, role: str) -> Any:
    from polyclinic.studies.export.vector_exchange import examples_of

    return None if study is None else examples_of(study, site, role)


def _merged_json(made: Any, out: Path) -> dict[str, Any]:
    return {"model": out, "sites": made.sites, "scale": made.scale, "losses": made.losses, "scores": made.controls}


def _show_merged(made: Any, out: Path) -> None:
    done(f"{out}: {', '.join(made.sites)}; λ = {made.scale:.4g}")
    for scale, loss in made.losses.items():
        line(f"    λ = {scale:<8.4g} loss {loss:.4f}")
    if not made.controls:
        line(
            "  No restoration set was given, so no models were compared. Batch normalization is that of the base model."
        )
        return
    line("  Scores on the restoration set. λ was chosen on the same data, so those of the merged model are optimistic.")
    for name, scores in made.controls.items():
        line(f"    {name:<24} " + "  ".join(f"{metric} {value:.3f}" for metric, value in scores.items()))
