"""The report page: its content, that it is one self-contained file, and unfinished and damaged runs."""

import csv
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from polyclinic.core import atomic
from polyclinic.errors import ConfigError
from polyclinic.evaluation.records.run_reader import NotARun, read_run
from polyclinic.evaluation.run_comparison import NotComparable, compare, panel
from polyclinic.evaluation.run_evaluation import Options, evaluate
from polyclinic.learning.training.dp_sgd import Spend
from polyclinic.privacy.guarantee import guarantee
from polyclinic.report import build_report
from polyclinic.report.report_builder import ReportNotWritten
from polyclinic.studies.records.time_profile import NOT_SPLIT, PHASES
from tests.support.known import known
from tests.support.synthetic_run import METHODS, SITES, write_maps, write_run

FEW = Options()
LITTLE = {"ada": ("training", 40, 0.5, 0.0, 0.0), "bo": ("training", 30, 0.4, 0.2, 0.1)}
VOID = {"meta", "link", "br", "hr", "img", "input", "path", "use"}


class Page(HTMLParser):
    """Tags, ids, headings and text of a page; a tag that closes another than the last opened is an error."""

    def __init__(self, html: Any) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: Any, attrs: Any) -> None:
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs[k] for k in ("href", "src", "xlink:href") if k in attrs]
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: Any, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: Any) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: Any) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> Any:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_run(tmp_path_factory.mktemp("runs") / "made-7f3c2a91", seeds=(0, 1))


@pytest.fixture(scope="module")
def page(run: Any) -> Any:
    return Page(build_report(run, options=FEW).read_text(encoding="utf-8"))


def built(path: Any, **how: Any) -> Any:
    return Page(build_report(write_run(path, **how), options=FEW).read_text(encoding="utf-8"))


def test_it_says_what_was_found(page: Any) -> None:
    assert "FedBN was trained at 4 sites" in page.text
    assert "At osaka, which did not take part in training (90 patients), AUC was" in page.text
    assert "Simulated split" in page.text
    assert "nairobi is" in page.text
    titles = [
        "Summary",
        "Warnings and limitations",
        "1. Comparison of methods",
        "2. Results at every site",
        "3. Benefit over local training",
        "4. Learning curves",
        "5. Discrimination",
        "6. Calibration",
        "7. Communication",
        "8. Privacy",
        "9. Data card",
        "10. Methods paragraph",
        "11. Checklists",
        "12. Reproduce this study",
    ]
    places = [page.text.index(t) for t in titles]
    assert places == sorted(places)


def test_the_report_of_a_measured_run_shows_where_the_time_went(tmp_path: Path) -> None:
    run, seconds = tmp_path / "run", dict.fromkeys(PHASES, 1.5)
    write_run(run)

    def shown() -> str:
        text = unescape(build_report(run, options=FEW).read_text(encoding="utf-8"))
        return re.sub("[\u2009\u202f]", " ", text)

    assert "Where the time went" not in shown()
    one = {"method": "fedavg", "seed": 3, "engine": "ray", "phases": seconds, "sites": {"a": 90.0, "b": 30.5}}
    outside = {"seconds": 90.0, "cluster": 75.0, "reading": 0.3, "baselines": 0.0, "report": 2.0, "workers": []}
    (run / "profile.json").write_text(json.dumps({**outside, "method_runs": [one, {**one, "fold": 2}]}))
    text = shown()
    assert "Where the time went." in text
    assert "FedAvg, seed 3, fold 2" in text
    assert "2 min 0 s" in text
    assert "Outside of method runs: connecting to the cluster 1 min 15 s, reading the data 0.3 s." in text
    assert NOT_SPLIT in text
    table = (run / "report" / "tables" / "times.csv").read_text().splitlines()
    assert table[1].endswith(",120.5")
    (run / "profile.json").write_text("{")
    assert "Where the time went" not in shown()


def test_it_is_self_contained(page: Any) -> None:
    assert not [link for link in page.links if not link.startswith(("#", "data:,"))]
    assert not [t for t, _ in page.tags if t in ("script", "iframe", "img", "object")]
    assert not any(k.startswith("on") for _, attrs in page.tags for k in attrs)


def test_it_is_built_for_everybody(page: Any) -> None:
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(page.headings, page.headings[1:], strict=False))
    assert ("html", {"lang": "en"}) in page.tags
    drawings = [a for t, a in page.tags if t == "svg"]
    assert len(drawings) >= 6
    assert all(a.get("role") == "img" and len(a.get("aria-label", "")) > 20 for a in drawings)
    tables, captions = ([t for t, _ in page.tags].count(k) for k in ("table", "caption"))
    assert tables == captions > 10
    assert all("scope" in a for t, a in page.tags if t == "th")
    targets = [link[1:] for link in page.links if link.startswith("#")]
    assert set(targets) <= set(page.ids)


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(run: Any, tmp_path: Path) -> None:
    first, again = (build_report(run, tmp_path / k, FEW).parent for k in "ab")
    names = sorted(str(f.relative_to(first)) for f in first.rglob("*") if f.is_file())
    assert {"report.html", "report.json", "model_card.md", "tables/methods.csv"} <= set(names)
    assert all((first / n).read_bytes() == (again / n).read_bytes() for n in names)


def test_the_page_the_json_and_the_csv_agree(run: Any, page: Any, tmp_path: Path) -> None:
    folder = build_report(run, tmp_path, FEW).parent
    values = json.loads((folder / "report.json").read_text())
    with open(folder / "tables" / "sites.csv", newline="") as file:
        rows = {r["site"]: r for r in csv.DictReader(file)}
    assert set(rows) == set(SITES)
    headline = values["evaluation"]["headline"]
    (method,) = [m for m in values["evaluation"]["methods"] if m["label"] == headline]
    for site, row in rows.items():
        value = method["sites"][site]["auc"]["value"]
        assert float(row["primary"]) == pytest.approx(value)
        assert f"{value:.3f}" in page.text


@pytest.mark.parametrize("chosen", ["fedavg", "fedprox"])
def test_test_data_choose_nothing(chosen: str, tmp_path: Path) -> None:
    """The method spoken of first is the best on validation, though the other one is better on test, and by far."""
    other = {"fedavg": "fedprox", "fedprox": "fedavg"}[chosen]
    path = write_run(tmp_path / "r", sites=LITTLE, seeds=(0,), methods=("local", "fedavg", "fedprox"))
    lines = [json.loads(x) for x in (path / "records.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "scores":
            line["metrics"]["auc"] = 0.9 if line["method"] == chosen else 0.6
    (path / "records.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    file = path / "arms" / f"{chosen}-seed0" / "predictions.safetensors"
    tensors = load_file(file)
    save_file({k: np.ascontiguousarray(v[:, ::-1]) if k.endswith("/score") else v for k, v in tensors.items()}, file)
    result = evaluate(read_run(path), FEW)
    assert known(result.of(chosen).macro.value) < 0.5 < known(result.of(other).macro.value)
    assert result.headline == chosen
    assert "validation" in result.chosen_by


def test_sites_that_lose_are_named(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", sites=LITTLE, seeds=(0,), methods=("local", "fedavg"))
    file = path / "arms" / "fedavg-seed0" / "predictions.safetensors"
    tensors = load_file(file)
    tensors["bo/score"] = np.ascontiguousarray(tensors["bo/score"][:, ::-1])
    save_file(tensors, file)
    page = Page(build_report(path, options=FEW).read_text())
    assert re.search(
        r"Negative transfer at bo: −0\.\d+ \(.*?\) AUC compared with local training \(significant\)", page.text
    )
    assert re.search("bo is below local training ?; significant for bo.", page.text)


def test_equal_methods_are_not_ranked(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", seeds=(0,), methods=("local", "fedavg", "fedprox"))
    for m in ("local", "fedprox"):
        (path / "arms" / f"{m}-seed0" / "predictions.safetensors").write_bytes(
            (path / "arms" / "fedavg-seed0" / "predictions.safetensors").read_bytes()
        )
    result = evaluate(read_run(path), FEW)
    assert {d.verdict() for d in result.comparisons.values()} == {"no difference shown"}
    assert all(d.value == 0 for d in result.of("fedavg").gains.values())


def test_a_site_with_one_class_has_no_auc_and_the_page_says_why(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", sites=LITTLE, seeds=(0, 1), methods=("local", "fedavg"))
    for file in path.glob("arms/*/predictions.safetensors"):
        tensors = load_file(file)
        tensors["bo/target"][:] = 1
        save_file(tensors, file)
    page = Page(build_report(path, options=FEW).read_text())
    assert "The mean over sites is without bo, where AUC is undefined: all 30 cases are of one class" in page.text
    assert "nan" not in re.findall("[a-z]+", page.text.lower())
    json.loads((path / "report" / "report.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("task", ["segmentation", "regression", "survival", "multilabel", "reconstruction"])
def test_other_tasks(tmp_path: Path, task: str) -> None:
    page = built(tmp_path / "r", task=task, seeds=(0, 1), methods=("local", "pooled", "fedavg", "fedprox"))
    words = {
        "segmentation": "Empty predictions for non-empty targets",
        "regression": "Bland and Altman",
        "survival": "Kaplan-Meier",
        "multilabel": "Over all labels",
        "reconstruction": "NMSE",
    }
    assert words[task] in page.text


def test_lower_is_better_turns_every_sign(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", task="regression", seeds=(0,), methods=("local", "pooled", "fedavg"))
    result = evaluate(read_run(path), FEW)
    alone, here = (known(result.of(k).macro.value) for k in ("local", "fedavg"))
    assert here < alone
    local, fedavg = (result.of(k).sites for k in ("local", "fedavg"))
    for site, gain in result.of("fedavg").gains.items():
        assert gain.value == pytest.approx(known(local[site]["mae"].value) - known(fedavg[site]["mae"].value)), site
    assert known(result.of("fedavg").worst)[1] == max(
        known(e["mae"].value) for s, e in result.of("fedavg").sites.items() if s != "osaka"
    )


@pytest.mark.parametrize(
    "how",
    [
        {"sites": {"ada": LITTLE["ada"]}, "seeds": (0,), "methods": ("fedavg",)},
        {"sites": LITTLE, "seeds": (0,), "methods": ("local",)},
        {"sites": LITTLE, "seeds": (3, 4), "methods": ("pooled", "fedbn"), "simulated": None, "privacy": False},
        {
            "sites": {"ada": ("training", 3, 0.4, 0, 0), "bo": ("external", 2, 0.5, 0, 0)},
            "methods": ("local", "fedavg"),
        },
        {"sites": LITTLE, "images": 4},
    ],
)
def test_small_and_odd_studies(tmp_path: Path, how: Any) -> None:
    page = built(tmp_path / "r", **how)
    assert page.open == []
    assert not re.search("None(?! of the)", page.text)


def test_several_images_a_patient_are_one_case(tmp_path: Path) -> None:
    page = built(tmp_path / "r", sites=LITTLE, images=4, seeds=(0,))
    assert "the scores of a patient’s images are averaged, and a patient is positive if any image is" in page.text
    result = evaluate(read_run(tmp_path / "r"), FEW)
    assert result.patients == {"ada": 40, "bo": 30}
    assert result.images == {"ada": 160, "bo": 120}
    images = evaluate(read_run(tmp_path / "r"), Options(unit="image"))
    wide, narrow = (e.of("fedavg").sites["ada"]["auc"] for e in (result, images))
    assert narrow.how == "DeLong, clustered by patient"
    assert wide.n == narrow.n == 40


def test_small_cohorts_can_be_hidden(tmp_path: Path) -> None:
    write_run(tmp_path / "r", seeds=(0,))
    result = evaluate(read_run(tmp_path / "r"), Options(min_cell=50))
    assert result.of("fedbn").sites["nairobi"]["auc"].value is None
    assert "fewer than 50" in result.of("fedbn").sites["nairobi"]["auc"].why
    assert "nairobi" not in result.of("fedbn").gains
    assert known(result.of("fedbn").worst)[0] != "nairobi"
    whole = evaluate(read_run(tmp_path / "r")).of("fedbn").sites
    shown = [known(whole[s]["auc"].value) for s in ("utrecht", "lyon", "boston")]
    assert result.of("fedbn").macro.value == pytest.approx(np.mean(shown))  # its difference to them reveals nothing


# Seeds


def test_seeds_with_splits_of_their_own_are_noticed(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", sites=LITTLE, seeds=(0, 1), methods=("local", "fedavg"))
    assert evaluate(read_run(path), FEW).shared
    for file in path.glob("arms/*-seed1/predictions.safetensors"):
        tensors = load_file(file)
        keep = np.arange(len(tensors["ada/patient"])) != 3
        tensors |= {k: np.ascontiguousarray(v[keep]) for k, v in tensors.items() if k.startswith("ada/")}
        tensors["ada/patient"] = np.arange(keep.sum())
        save_file(tensors, file)
    result = evaluate(read_run(path), FEW)
    assert not result.shared
    assert "mean of the seeds’ limits" in result.of("fedavg").sites["ada"]["auc"].how


def test_one_seed_twice_is_that_seed(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", sites=LITTLE, seeds=(0,), methods=("local", "fedavg"))
    once = evaluate(read_run(path), FEW)
    info = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(info | {"seeds": [0, 1]}))
    for m in ("local", "fedavg"):
        (path / "arms" / f"{m}-seed1").mkdir()
        data = (path / "arms" / f"{m}-seed0" / "predictions.safetensors").read_bytes()
        (path / "arms" / f"{m}-seed1" / "predictions.safetensors").write_bytes(data)
    twice = evaluate(read_run(path), FEW)
    for k in ("local", "fedavg"):
        a, b = once.of(k).sites["ada"]["auc"], twice.of(k).sites["ada"]["auc"]
        assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high))
        assert twice.of(k).seed_sd == 0


# In a browser


def in_chromium(file: Any, tmp_path: Path, *flags: Any) -> Any:
    """What Debian's Chromium prints, without a network and without its own errands."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    off = ["background-networking", "component-update", "sync", "gpu", "quic", "default-apps"]
    command = [chromium, "--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{k}" for k in off), *flags]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"file://{file}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_sticks_out_and_nothing_is_fetched(run: Any, tmp_path: Path, width: int) -> None:
    """Headless Chromium cannot be narrower than 500 pixels, so the page is shown in a frame."""
    page = build_report(run, tmp_path, FEW)
    html = page.read_text().replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    script = """<script>const violated = [];
      addEventListener("securitypolicyviolation", e => violated.push(e.blockedURI));
      addEventListener("error", e => violated.push(e.message)); addEventListener("load", () => { const out = [];
      for (const e of document.querySelectorAll("main *")) { const r = e.getBoundingClientRect();
        if (r.right > innerWidth + 1 && !e.closest(".scroll, pre")) out.push(e.tagName + " " + e.className); }
      parent.postMessage({wide: document.documentElement.scrollWidth, out, violated,
        fetched: performance.getEntriesByType("resource").map(e => e.name)}, "*"); });</script></body>"""
    page.with_name("inner.html").write_text(html.replace("</body>", script))
    page.with_name("outer.html").write_text(
        f"<iframe src=inner.html width={width} height=900></iframe><p id=found></p><script>addEventListener('message', "
        "e => document.getElementById('found').textContent = JSON.stringify(e.data))</script>"
    )
    flags = ("--dump-dom", "--window-size=1600,1000", "--virtual-time-budget=4000")
    done = in_chromium(page.with_name("outer.html"), tmp_path, *flags)
    said = json.loads(unescape(known(re.search("id=.found.>(.*?)</p>", done.stdout))[1]))
    assert said["out"] == said["violated"] == said["fetched"] == []
    assert said["wide"] <= width


@pytest.mark.slow
def test_it_prints(run: Any, tmp_path: Path) -> None:
    page = build_report(run, tmp_path, FEW)
    in_chromium(page, tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")
    data = (tmp_path / "page.pdf").read_bytes()
    assert data.startswith(b"%PDF")
    assert 4 <= len(re.findall(rb"/Type ?/Page\b(?!s)", data)) <= 30


# Runs that are not as they should be


@pytest.mark.slow
def test_the_summary_fits_on_a_printed_page(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", seeds=(0, 1))
    info = json.loads((path / "run.json").read_text())
    declared = {"method": "fedprox", "reference": "fedavg", "kind": "non-inferiority", "margin": 0.02}
    (path / "run.json").write_text(json.dumps({**info, "compare": [declared]}))
    file = build_report(path, options=FEW).with_name("summary.html")
    page = Page(file.read_text(encoding="utf-8"))
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert not [tag for tag, _ in page.tags if tag == "nav"]
    assert page.text.index("Data: Invented patients; sites are simulated.") < page.text.index("FedBN was trained")
    assert "Comparisons that the study file declared before the run." in page.text
    in_chromium(file, tmp_path, f"--print-to-pdf={tmp_path / 'out.pdf'}", "--no-pdf-header-footer")
    pages = re.findall(rb"/Type ?/Page\b(?!s)", (tmp_path / "out.pdf").read_bytes())
    assert len(pages) == 1


def test_an_unfinished_run_reads_as_far_as_it_got(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", finished=False)
    with open(path / "records.jsonl", "a") as file:
        file.write('{"kind": "round", "meth')
    page = Page(build_report(path, options=FEW).read_text())
    assert "Not finished" in page.text
    assert "no test predictions yet of fedbn (seed 2)" in page.text
    assert "was cut off while it was written" in page.text


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r")
    for file in path.glob("arms/*/*.safetensors"):
        file.unlink()
    (path / "records.jsonl").unlink()
    page = Page(build_report(path, options=FEW).read_text())
    assert "No method has test predictions yet" in page.text


def test_broken_lines_are_named_all_at_once(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", sites=LITTLE, seeds=(0,))
    lines = (path / "records.jsonl").read_text().splitlines()
    lines[2], lines[4] = "{oops", '{"kind": "round", "method": "fedavg", "seed": "x", "round": 1}'
    lines[6] = "[1, 2]"
    (path / "records.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(NotARun) as told:
        build_report(path)
    assert [f"records.jsonl:{n}:" in str(told.value) for n in (3, 5, 7)] == [True] * 3
    assert "seed: must be a whole number" in str(told.value)
    assert "3 problems" in str(told.value)
    assert not (path / "report").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("ada/target"), "ada/target is missing"),
        (lambda t: t.update({"ada/score": t["ada/score"][:-1]}), "ada/score has 39 rows, but ada/patient has 40"),
        (lambda t: t.update({"ada/score": t["ada/score"] * np.nan}), "80 values that are not finite"),
        (lambda t: t.update({"ada/score": t["ada/score"] * 3}), "probabilities between 0 and 1"),
        (lambda t: t.update({"ada/target": t["ada/target"] + 1}), "class numbers from 0 to 1"),
        (lambda t: t.update({"eve/patient": t["ada/patient"]}), "site 'eve' is not among the run's sites"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    path = write_run(tmp_path / "r", sites=LITTLE, seeds=(0,), methods=("fedavg",))
    file = path / "arms" / "fedavg-seed0" / "predictions.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, file)
    with pytest.raises(NotARun, match=re.escape(words)):
        build_report(path)


def test_a_damaged_predictions_file(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", sites=LITTLE, seeds=(0,), methods=("fedavg",))
    file = path / "arms" / "fedavg-seed0" / "predictions.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(NotARun, match="not a safetensors file"):
        build_report(path)


def test_what_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(NotARun, match="no such folder"):
        build_report(tmp_path / "nowhere")
    with pytest.raises(NotARun, match=r"no run\.json"):
        build_report(tmp_path)
    (tmp_path / "run.json").write_text('{"name": "x", "task": "clasification"}')
    with pytest.raises(NotARun) as told:
        build_report(tmp_path)
    assert all(word in str(told.value) for word in ("task", "metric", "sites", "methods"))


def test_a_metric_of_another_task_is_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", sites=LITTLE, seeds=(0,))
    info = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(info | {"metric": "dice"}))
    with pytest.raises(ValueError, match="'dice' is not one of auc, accuracy"):
        build_report(path)


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", sites=LITTLE, seeds=(0,))
    info = json.loads((path / "run.json").read_text())
    evil = "</title><script>alert(1)</script><img src=x onerror=alert(1)>"
    info["title"], info["data"]["title"], info["data"]["notes"] = evil, evil, [evil]
    info["methods"][0]["leaves"] = evil
    (path / "run.json").write_text(json.dumps(info))
    (path / "study.toml").write_text(evil)
    page = Page(build_report(path, options=FEW).read_text())
    assert not [t for t, _ in page.tags if t in ("script", "img")]
    assert evil in page.text


def test_a_test_set_opened_twice_is_said_first(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", sites=LITTLE, seeds=(0,), methods=("local", "fedavg"))
    text = (path / "records.jsonl").read_text()
    (path / "records.jsonl").write_text(text.replace('"opened": 1', '"opened": 2'))
    page = Page(build_report(path, options=FEW).read_text())
    assert "The sealed test set was opened more than once: Local (seed 0): 2 times" in page.text
    assert "Test patients were not accessed" not in page.text


def test_a_broken_journal_is_said_first(tmp_path: Path) -> None:
    from polyclinic.core.audit_log import Journal

    path = write_run(tmp_path / "r", sites=LITTLE, seeds=(0,))
    journal = Journal(path / "journal.jsonl")
    for k in range(4):
        journal.write("round", {"round": k})
    journal.close()
    good = Page(build_report(path, options=FEW).read_text())
    assert f"4 entries, hash chain valid, latest hash {journal.head}" in good.text
    text = (path / "journal.jsonl").read_text()
    (path / "journal.jsonl").write_text(text.replace('"round":1', '"round":9'))
    bad = Page(build_report(path, options=FEW).read_text())
    assert "The hash chain of the journal is broken" in bad.text


def test_only_figures_with_images_need_matplotlib(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing it takes longer than all other figures of a report."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert build_report(run, tmp_path / "out", FEW).exists()
    write_maps(run)
    try:
        with pytest.raises(ConfigError, match="pip install matplotlib"):
            build_report(run, tmp_path / "other", FEW)
        assert not (tmp_path / "other").exists()
    finally:
        for path in run.glob("arms/*/explanations.safetensors"):
            path.unlink()


def test_privacy_spent_is_that_at_the_end_of_the_dearest_seed(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", sites=LITTLE, seeds=(0, 1), methods=("local", "fedavg"), privacy=False)
    with open(path / "records.jsonl", "a") as file:
        for seed, round_, epsilon, by in (
            (0, 1, 3.0, "rdp"),
            (0, 2, 2.5, "pld"),
            (1, 1, 2.9, "rdp"),
            (1, 2, 2.6, "pld"),
        ):
            line = {"kind": "privacy", "method": "fedavg", "seed": seed, "round": round_, "site": "ada", "by": by}
            said = {"epsilon": epsilon, "delta": 1e-5, **guarantee([Spend(2.0, share=3)], "patient").facts()}
            file.write(json.dumps(line | said) + "\n")
    (spent,) = read_run(path).spent("fedavg")
    assert (spent.epsilon, spent.seed, spent.round) == (2.6, 1, 2)
    page = Page(build_report(path, options=FEW).read_text())
    assert "tight" in page.text
    whom = "(adjacency: replace, add or remove one patient inside a site that takes part)"
    assert f"FedAvg was differentially private: ε = 2.60 at δ = 1e-05 for every patient {whom}." in page.text
    assert (
        f"ε is for every patient {whom}. Assumed: the number of patients counts as public; each sum holds" in page.text
    )
    assert page.text.count("scores of validation and test patients that a site sends are not covered") >= 2
    (card,) = [file.read_text() for file in path.rglob("*.md")]
    assert f"ε = 2.60 at δ = 1e-05 for every patient {whom}" in card
    assert "No noise was added" not in page.text


# Several runs


def test_runs_are_compared_on_the_same_patients(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", sites=LITTLE, seeds=(0,), methods=("local", "fedavg"))
    b = write_run(tmp_path / "b", sites=LITTLE, seeds=(0,), methods=("fedavg", "fedprox"))
    rows = {(r.run, r.method): r for r in compare([a, b], options=FEW)}
    assert rows["a", "fedavg"].verdict == "reference"
    assert known(rows["b", "fedavg"].difference).value == 0
    assert rows["b", "fedavg"].verdict == "no difference shown"
    other = known(rows["a", "local"].difference)
    assert known(other.adjusted) >= known(other.p)
    with pytest.raises(NotComparable, match="no method 'a/fedbn'"):
        compare([a, b], reference="a/fedbn", options=FEW)


def test_declared_comparisons_stand_in_the_report_the_card_and_the_comparison_of_runs(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, sites=LITTLE, methods=("fedavg", "fedprox"), seeds=(0,)) for name in "ab"]
    info = json.loads((paths[0] / "run.json").read_text())
    declared = {"method": "fedprox", "reference": "fedavg", "kind": "non-inferiority", "margin": 0.2}
    (paths[0] / "run.json").write_text(json.dumps({**info, "compare": [declared]}))
    file = build_report(paths[0], options=FEW)
    text = Page(file.read_text(encoding="utf-8")).text
    words = (
        "Declared before the run: FedProx compared with FedAvg by AUC, question non-inferiority and the margin 0.200"
    )
    assert f"{words}: non-inferior , difference" in text
    assert "Comparisons that the study file declared before the run." in text
    assert "These comparisons were not declared before the run" in text
    for undeclared in ("differ significantly from FedAvg", "than FedAvg", "could not be tested against FedAvg"):
        assert undeclared not in text  # the declared pair has a test of its own
    assert words in (file.parent / "model_card.md").read_text(encoding="utf-8")
    assert json.loads((file.parent / "report.json").read_text())["verdicts"]["declared"] == ["non-inferior"]
    rows = compare(paths, options=FEW)
    assert [row.declared for row in rows] == [False] * 4 + [True]
    last = rows[-1]
    assert (last.run, last.method, last.reference, last.verdict) == ("a", "fedprox", "a/fedavg", "non-inferior")


def test_runs_with_other_patients_are_not_compared(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", sites=LITTLE, seeds=(0,))
    b = write_run(tmp_path / "b", sites={"ada": ("training", 44, 0.5, 0, 0), "bo": LITTLE["bo"]}, seeds=(0,))
    with pytest.raises(NotComparable, match=r"test patients at ada \(seed 0\) differ between a and b"):
        compare([a, b], options=FEW)
    with pytest.raises(NotComparable, match="at least two"):
        compare([a], options=FEW)
    c = write_run(tmp_path / "c", task="regression", sites=LITTLE, seeds=(0,))
    with pytest.raises(NotComparable, match="task: a has 'classification', c has 'regression'"):
        compare([a, c], options=FEW)


def test_a_panel_ranks_methods_over_data_sets(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / t, task=t, seeds=(0,)) for t in ("classification", "regression", "segmentation")]
    found = panel(runs, FEW)
    assert found.methods == tuple(METHODS)
    assert known(found.ranking).methods[-1] == "local"
    assert found.gains["pooled"][0] > found.gains["pooled"][1]


@pytest.mark.parametrize("name", ["how-to/report", "explanation/evaluation"])
def test_examples_of_the_pages_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "runs" / "demo-5570cd3a", sites=LITTLE, seeds=(0,), methods=("fedavg",))
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), {})


def test_a_full_disk_leaves_the_earlier_report_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_run(tmp_path / "run")
    (path / "report").mkdir()
    (path / "report" / "report.html").write_text("earlier")
    real, written = atomic.write, []

    def write(file: Any, content: Any, **options: Any) -> None:
        written.append(file)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        real(file, content, **options)

    monkeypatch.setattr(atomic, "write", write)
    with pytest.raises(ReportNotWritten, match=f"No space left on device.*: polyclinic report {path}$"):
        build_report(path, options=Options())
    assert [f.name for f in (path / "report").iterdir()] == ["report.html"]
    assert (path / "report" / "report.html").read_text() == "earlier"
