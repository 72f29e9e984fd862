"""A method with its published settings in a new study, with the baselines that it must exceed."""

from polyclinic.core.toml_text import inline
from polyclinic.methods.published_settings import published
from polyclinic.methods.registry import entry, options
from polyclinic.studies.config.study_config import parse

BASELINES = ("local", "pooled", "fedavg")


def method_lines(name: str) -> list[str]:
    """Return the ``[[methods]]`` table of the method called ``name``, as lines of TOML.

    Options without a published value are comments with their defaults.

    Raises:
        UnknownMethod: If no method has this name. The message suggests a similar one.
    """
    of, known = entry(name), published(name)
    head = [f"# {of.summary} ({of.paper}); fidelity: {of.fidelity}"]
    if known is None:
        head += ["# Published settings are not recorded: these are the defaults of the code."]
    else:
        head += [f"# Settings: {known.source}; {known.rounds} rounds there."]
        head += ["# They were chosen for those data: tune them here ([search])."]
    given = {} if known is None else known.options
    lines = [*head, "[[methods]]", f"name = {inline(of.name)}", *(f"{key} = {inline(v)}" for key, v in given.items())]
    for key, parameter in options(of).items():
        if key not in given and isinstance(parameter.default, bool | int | float | str):
            lines.append(f"# {key} = {inline(parameter.default)}")
    if known is not None and known.training:
        lines.append(f"training = {inline(dict(known.training))}")
    return lines


def with_method(text: str, name: str) -> str:
    """Return the study ``text`` with the baselines and one method in place of its methods.

    Raises:
        UnknownMethod: If no method has this name.
        BadStudy: If the method is not for the study's task.
    """
    head = text.partition("[[methods]]")[0].rstrip()
    found, wanted = [head, ""], entry(name).name
    for baseline in BASELINES:
        if baseline != wanted:
            found += ["[[methods]]", f"name = {inline(baseline)}", ""]
    found += [*method_lines(name), ""]
    study = "\n".join(found)
    parse(study, f"a study with {wanted}")
    return study
