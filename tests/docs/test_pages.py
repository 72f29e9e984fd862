"""Every Python example of the README, the tutorials and the guides runs, page by page; every link leads somewhere."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from polyclinic.core.pipeline import send_through
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization import fedavg
from polyclinic.privacy.gaussian import Clip, Gaussian
from polyclinic.secure_aggregation.fixed_point import SecureSum

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = ("reference/methods/", "reference/api/", "reference/config.md", "reference/cli.md")
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]
    if not str(page.relative_to(ROOT)).startswith(tuple(f"docs/{name}" for name in GENERATED))
)
OWN_TESTS = {  # pages whose examples need data or packages; another test runs them
    "explanation/privacy.md": "tests/privacy/test_docs.py",
    "how-to/compression.md": "tests/privacy/test_docs.py",
    "how-to/report.md": "tests/report/test_report.py",
    "explanation/evaluation.md": "tests/report/test_report.py",
    "how-to/deployment.md": "tests/engines/flare/test_guide.py",
}
FRAGMENTS = ("how-to/audits.md",)  # whose examples take a model and data from the reader: only their imports run


def blocks(page: Path) -> list[str]:
    """The Python examples of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


WITH_EXAMPLES = [page for page in PAGES if DOCS in page.parents and blocks(page)]


def test_pages_with_tests_of_their_own_are_there() -> None:
    for page, test in OWN_TESTS.items():
        assert (DOCS / page).is_file()
        assert Path(page).stem in (ROOT / test).read_text(encoding="utf-8")


def test_tutorials_have_examples() -> None:
    assert all(blocks(page) for page in (DOCS / "tutorials").glob("*.md") if page.stem != "index")


@pytest.mark.parametrize(
    "page",
    [page for page in WITH_EXAMPLES if str(page.relative_to(DOCS)) not in (*OWN_TESTS, *FRAGMENTS)],
    ids=lambda page: str(page.relative_to(DOCS)),
)
def test_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": f"example_{page.stem.replace('-', '_')}"}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", FRAGMENTS)
def test_fragments_import_and_call_what_exists(page: str) -> None:
    for block in blocks(DOCS / page):
        tree = ast.parse(block)
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names: dict[str, Any] = {}
        exec(compile(tree, page, "exec"), names)
        for call in calls:
            if isinstance(call.func, ast.Name) and call.func.id in names:
                keywords = {word.arg: None for word in call.keywords if word.arg}
                inspect.signature(names[call.func.id]).bind_partial(*call.args, **keywords)


def without_docstrings(source: str) -> str:
    """The syntax of a class, without docstrings and without methods that the README leaves out."""
    (node,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    for inner in ast.walk(node):
        if isinstance(inner, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(inner):
            inner.body = inner.body[1:]
    return ast.dump(node)


def test_the_readme_shows_the_method_of_the_code() -> None:
    shown = blocks(ROOT / "README.md")[0]
    (node,) = (node for node in ast.parse(shown).body if isinstance(node, ast.ClassDef))
    written = ast.parse(inspect.getsource(fedavg))
    (actual,) = (n for n in written.body if isinstance(n, ast.ClassDef) and n.name == node.name)
    names = {inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)}
    actual.body = [n for n in actual.body if not isinstance(n, ast.FunctionDef) or n.name in names]
    assert without_docstrings(shown) == without_docstrings(ast.unparse(actual))


def test_the_readmes_other_examples_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names = {**vars(fedavg), "send_through": send_through, "Clip": Clip, "Gaussian": Gaussian, "SecureSum": SecureSum}
    task = Classification(Network("cnn", (1, 8, 8), 2, (("width", 2), ("depth", 1))))
    given = {**names, "task": task, "local": LocalTraining()}
    for block in blocks(ROOT / "README.md")[1:]:
        shown = dict(given)
        exec(compile(block, "README.md", "exec"), shown)
    result: Any = shown["result"]  # of the last example, a study with a network, data, loss and metric of one's own
    assert {row["method"] for row in result.compare()} == {"local", "fedavg", "fedper", "fedbn"}
    assert {"auc", "accuracy"} < {row["metric"] for row in result.sites()}
    assert any(row["metric"].startswith("local:accuracy-") for row in result.sites())
    assert "fedper" in Path(str(shown["page"])).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http", "mailto")):
            continue
        to = (page.parent / target).resolve()
        generated = to.is_relative_to(DOCS) and str(to.relative_to(DOCS)).startswith(GENERATED)
        assert generated or to.exists(), f"{page.name}: {target}"
