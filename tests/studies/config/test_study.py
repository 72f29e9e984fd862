"""A study file: every mistake found in one pass, with its line, and nothing run."""

import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from polyclinic.core.config_problems import line_of
from polyclinic.core.toml_text import dumps
from polyclinic.data.source import slug
from polyclinic.data.sources.lung_nodules import PROTOCOLS
from polyclinic.errors import ConfigError
from polyclinic.evaluation.metric_functions import LOG_LOSS, metrics_for
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification, MultiLabel
from polyclinic.learning.tasks.mr_reconstruction import Reconstruction
from polyclinic.learning.tasks.regression import Regression
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.tasks.survival import Survival
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.schema import METRICS
from polyclinic.studies.config.study_config import parse, read, with_values
from polyclinic.studies.records.run_description import method_facts

GOOD = """\
name = "small"            # line 1
rounds = 3
seeds = [0, 1]

[data]
use = "lidc-nodules"

[task]
network = "cnn"

[training]
lr = 0.1

[[methods]]
name = "fedavg"

[[methods]]
name = "fedprox"
mu = 0.1
uplink = [{ name = "clip", bound = 1.0 }]
"""
COMPARE = """
[[evaluation.compare]]
method = "fedprox"
reference = "fedavg"
kind = "non-inferiority"
margin = 0.02
"""


def problems(text: str) -> str:
    with pytest.raises(BadStudy) as caught:
        parse(text, "study.toml")
    return str(caught.value)


def test_a_good_study_is_read() -> None:
    study = parse(GOOD)
    assert [method.called for method in study.methods] == ["fedavg", "fedprox"]
    assert study.methods[1].options == {"mu": 0.1}
    assert study.metric == "auc"
    assert study.training_of(study.methods[0])["lr"] == 0.1


def test_every_mistake_is_told_at_once_with_its_line() -> None:
    text = (
        GOOD.replace('name = "fedprox"', 'name = "fedproxx"')
        .replace("rounds = 3", "rounds = 0")
        .replace("lr = 0.1", 'lr = "fast"\nbatchsize = 4')
        .replace('name = "fedavg"', 'name = "fedavg"\nserver_lr = 1.0')
        .replace('network = "cnn"', 'network = "ccnn"')
        .replace("seeds = [0, 1]", "seeds = []\nsedes = 1")
    )
    said = problems(text)
    lines = said.splitlines()
    assert lines[-1] == "8 problems, nothing was run."
    for line, key, words in (
        (2, "rounds = 0", "must be at least 1"),
        (3, "seeds", "needs at least 1"),
        (4, "sedes = 1", 'unknown key. Did you mean "seeds"?'),
        (9, "task", 'Did you mean "cnn"?'),
        (13, 'training.lr = "fast"', 'must be a number, not the text "fast"'),
        (14, "training.batchsize = 4", 'Did you mean "batch_size"?'),
        (18, "methods[1].server_lr = 1.0", "unknown key"),
        (21, 'methods[2].name = "fedproxx"', 'Did you mean "fedprox"?'),
    ):
        assert any(row.startswith(f"study.toml:{line} ") and key in row and words in row for row in lines), (line, said)


WRONG = {
    "not TOML": ("name = ", "this is not TOML"),
    "no methods": (GOOD.split("[[methods]]")[0], "is missing"),
    "no data": (GOOD.replace('[data]\nuse = "lidc-nodules"\n', ""), "is missing"),
    "unknown data": (GOOD.replace("lidc-nodules", "lidc-nodule"), "lidc-nodules"),
    "a share above 1": (GOOD.replace("lr = 0.1", "lr_decay = 1.5"), "must be at most 1"),
    "infinite": (GOOD.replace("lr = 0.1", "lr = inf"), "number"),
    "negative": (GOOD.replace("lr = 0.1", "lr = -0.1"), "must be more than 0"),
    "a fraction of an epoch": (GOOD.replace("lr = 0.1", "epochs = 1.5"), "must be a whole number, not 1.5"),
    "text for a number": (GOOD.replace("mu = 0.1", 'mu = "0.1"'), 'must be a number, not the text "0.1"'),
    "a boolean for a number": (GOOD.replace("mu = 0.1", "mu = true"), "must be a number, not true"),
    "a table for a number": (GOOD.replace("mu = 0.1", "mu = {}"), "must be a number, not a table"),
    "a choice": (GOOD.replace("lr = 0.1", 'optimizer = "adm"'), 'Did you mean "adam"?'),
    "a name with a slash": (
        GOOD.replace('name = "small"', 'name = "../small"'),
        "must consist of lowercase letters, digits and hyphens",
    ),
    "two methods of one name": (
        GOOD.replace('name = "fedprox"\nmu = 0.1', 'name = "fedavg"'),
        "give one of them a label",
    ),
    "a seed twice": (GOOD.replace("[0, 1]", "[1, 1]"), "the same seed twice"),
    "unknown transform": (GOOD.replace('"clip"', '"clipp"'), 'Did you mean "clip"?'),
    "a transform without what it needs": (GOOD.replace(", bound = 1.0", ""), "is missing"),
    "a transform's unknown option": (GOOD.replace("bound = 1.0", "bound = 1.0, bond = 2"), 'Did you mean "bound"?'),
    "an option of another task": (
        GOOD.replace('network = "cnn"', 'network = "cnn"\nspacing_mm = [1.0, 1.0]'),
        "not for",
    ),
    "a comparison with nobody": (
        GOOD + '[[evaluation.compare]]\nmethod = "fedprox"\nreference = "fedavgg"\n',
        'no method of this study is called "fedavgg". There are fedavg, fedprox',
    ),
    "a question that needs a margin": (
        GOOD + '[[evaluation.compare]]\nmethod = "fedprox"\nreference = "fedavg"\nkind = "equivalence"\n',
        "equivalence needs a margin, such as margin = 0.02",
    ),
    "a margin in points": (
        GOOD + COMPARE.replace("0.02", "2.0"),
        "auc lies between 0 and 1, so a margin is a fraction, such as 0.02 for two points",
    ),
    "a negative margin": (GOOD + COMPARE.replace("0.02", "-0.02"), "must be more than 0"),
    "a margin for a difference": (
        GOOD + COMPARE.replace("non-inferiority", "difference"),
        'a margin is for kind = "non-inferiority" or "equivalence"',
    ),
    "a comparison twice": (GOOD + 2 * COMPARE, "the same comparison twice would be corrected for twice"),
    "a metric of another task": (
        GOOD + '[evaluation]\nmetric = "dice"\n',
        "There are auc, accuracy, balanced_accuracy, loss",
    ),
    "a metric of grades": (GOOD + '[evaluation]\nmetric = "grade_error"\n', "is not a metric of this task"),
    "the loss of a mask": (
        GOOD.replace('network = "cnn"', 'network = "unet"\nkind = "segmentation"') + '[evaluation]\nmetric = "loss"\n',
        "There are dice\n",
    ),
    "a Brier score of Cox's model": (
        GOOD.replace('network = "cnn"', 'network = "cnn"\nkind = "survival"\ncuts = [1, 2]\nhazards = "proportional"')
        + '[evaluation]\nmetric = "ibs"\n',
        "There are c_index, uno_c\n",
    ),
    "a method's own training": (GOOD.replace("mu = 0.1", "training = { lrr = 1.0 }"), 'Did you mean "lr"?'),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_told_in_words(name: str) -> None:
    text, words = WRONG[name]
    said = problems(text)
    assert words in said
    assert "pydantic" not in said
    assert "http" not in said


@pytest.mark.parametrize("kind", METRICS)
def test_metrics_that_select_the_round_are_those_of_validation_and_of_the_report(kind: str) -> None:
    """A metric that only one of them has would select no round, or leave a finished run without a report."""
    score = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6]])
    several, one = Network("cnn", (1, 8, 8), 2), Network("cnn", (1, 8, 8), 1)
    target = torch.tensor([0, 1, 0, 1])
    task, outputs = {
        "classification": (Classification(several, ordered=True), {"score": score, "target": target}),
        "multilabel": (MultiLabel(several), {"score": score, "target": score.round()}),
        "segmentation": (Segmentation(several), {"dice": score, "empty": score > 1, "absent": score > 1}),
        "regression": (Regression(one), {"score": score[:, :1], "target": score[:, 1:]}),
        "survival": (
            Survival(several, cuts=(1.0, 2.0)),
            {"score": score, "target": torch.tensor([[0.5, 1.0], [1.5, 0.0], [1.2, 1.0], [3.0, 0.0]])},
        ),
        "reconstruction": (Reconstruction(one), {name: torch.ones(2) for name in ("psnr", "ssim", "nmse")}),
    }[kind]
    assert set(METRICS[kind]) <= set(task.summary(outputs))
    assert set(METRICS[kind]) - {LOG_LOSS.name} <= set(metrics_for(kind, 2, ordered=True))


def test_log_loss_is_the_loss_of_validation() -> None:
    score = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
    score[0] = torch.tensor([0.0, 0.0, 1.0])
    target = torch.arange(20) % 3
    found = Classification(Network("cnn", (1, 8, 8), 3)).summary({"score": score, "target": target})["loss"]
    assert LOG_LOSS.of(score.numpy(), target.numpy()) == pytest.approx(found, rel=1e-5)


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="polyclinic new"):
        read(tmp_path / "none.toml")


def test_the_hash_follows_what_a_result_depends_on() -> None:
    study = parse(GOOD)
    assert parse(GOOD + "# a comment").hash == study.hash
    assert parse(GOOD + '[engine]\nkind = "in-process"').hash == study.hash
    assert parse(GOOD.replace("mu = 0.1", "mu = 0.2")).hash != study.hash
    assert parse(GOOD, changes={"methods.1.mu": 0.2}).hash == parse(GOOD.replace("mu = 0.1", "mu = 0.2")).hash


def test_declared_comparisons_and_subgroups_are_part_of_the_hash_if_there_are_any() -> None:
    study = parse(GOOD)
    assert study.hash == parse(GOOD + "[evaluation]\ncompare = []\nsubgroups = []").hash
    declared = parse(GOOD + COMPARE)
    assert len({study.hash, declared.hash, parse(GOOD + COMPARE.replace("0.02", "0.03")).hash}) == 3
    assert parse(GOOD + '[evaluation]\nsubgroups = ["ward"]').hash != study.hash
    found = declared.evaluation.compare[0]
    assert (found.method, found.reference, found.kind, found.margin) == ("fedprox", "fedavg", "non-inferiority", 0.02)


def test_a_study_survives_being_written() -> None:
    study = parse(GOOD)
    text = dumps(study.model_dump(mode="json", exclude_none=True, exclude_defaults=True))
    assert parse(text) == study
    assert parse(text).hash == study.hash


def test_what_belongs_to_a_method_is_sent_unless_a_study_says_otherwise() -> None:
    """FedMIC and FedKD send the student in low rank: https://arxiv.org/abs/2407.02261, https://arxiv.org/abs/2108.13323."""
    text = GOOD[: GOOD.index("[[methods]]")] + '[[methods]]\nname = "fedmic"\n'
    usual, whole, named = (parse(text + more) for more in ("", "uplink = []\n", 'uplink = [{ name = "low-rank" }]\n'))
    assert usual.methods[0].uplink == named.methods[0].uplink == ({"name": "low-rank"},)
    assert whole.methods[0].uplink == ()
    assert usual.hash == named.hash != whole.hash
    assert with_values(whole.methods[0], {"temperature": 2.0}).uplink == ()
    assert method_facts(usual.methods[0])["options"] == {"uplink": ["low-rank"]}


def test_lines_are_found_where_people_look() -> None:
    text = 'a = 1\n[b]\n"c d" = 2\nb.e = 3\n[[f]]\nx = 1\n[[f]]\nx = """\ny = 3\n"""\n[f.g]\nz = 1\n'
    assert line_of(text, ("a",)) == 1
    assert line_of(text, ("b", "c d")) == 3
    assert line_of(text, ("b", "b", "e")) == 4
    assert line_of(text, ("f", 0, "x")) == 6
    assert line_of(text, ("f", 1, "x")) == 8
    assert line_of(text, ("f", 1, "g", "z")) == 12
    assert line_of(text, ("f", 1, "unknown")) == 7
    assert line_of(text, ("nowhere",)) == 1


@pytest.mark.parametrize("name", ["demo", "demo-nodules", "study"])
def test_the_templates_are_studies(name: str) -> None:
    from polyclinic.cli.run import template

    assert parse(template(name), name).methods


def test_the_template_names_sites_that_exist() -> None:
    text = files("polyclinic.studies").joinpath("templates/study.toml").read_text(encoding="utf-8")
    named = re.findall(r'^# external = \["([^"]+)"\]', text, re.M) + re.findall(r"machines\.sites\.([^\]]+)\]", text)
    assert len(named) == 2
    assert set(named) <= {slug(name) for _, name in PROTOCOLS}
