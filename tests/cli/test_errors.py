"""Errors as a person meets them: in words, with an exit code, and a saved traceback for bugs alone."""

import json
import logging
import os
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cyclopts import App

from polyclinic import errors
from polyclinic.cli import app, rendering
from polyclinic.data.formats.safe_reading import Unreadable
from polyclinic.engines.flare.protocol.shared_journals import SharedJournal
from polyclinic.studies.config import preflight as checks
from polyclinic.studies.config.study_config import parse
from tests.support.small_runs import npz, study

ROOT = Path(__file__).parents[2]


def ended(args: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["polyclinic", *args])
    try:
        app.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_every_error_has_one_root_and_survives_a_process_boundary() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) == 8
    assert all(issubclass(kind, errors.PolyclinicError) for kind in kinds)
    missing = pickle.loads(pickle.dumps(errors.MissingDependency("dicom", "reading DICOM needs pydicom")))
    assert str(missing) == 'reading DICOM needs pydicom, which is not installed: pip install "polyclinic[dicom]"'
    unreadable = pickle.loads(pickle.dumps(Unreadable("/a/b.nii", "truncated")))
    assert str(unreadable) == "b.nii: truncated"
    assert unreadable.problems == ["b.nii: truncated"]


def study_of(text: bytes, tmp_path: Path) -> str:
    (tmp_path / "s.toml").write_bytes(text)
    return str(tmp_path / "s.toml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = 'ü'".encode("utf-16")[:-1], "is not UTF-16"),
        (b"name = \xe9", "is not UTF-8"),
        (b"\xef\xbb\xbfrounds = 1\n", "is missing"),  # a byte order mark is no mistake
        (b"a = [", "this is not TOML"),
        (b"", "is missing"),
    ],
)
def test_study_files_that_cannot_be_read(
    text: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(["run", study_of(text, tmp_path)], monkeypatch) == 2
    says = capsys.readouterr().err
    assert words in says
    assert "Traceback" not in says


@pytest.mark.parametrize(
    "args",
    [
        ["run", "."],
        ["run", "nowhere/s.toml"],
        ["report", "file"],
        ["status", "file"],
        ["outliers", "file"],
        ["compare", "file", "file"],
        ["panel", "file"],
        ["export", ".", "out"],
        ["explain", "file"],
        ["audit", "file"],
        ["track", "file", "--to", "mlflow"],
        ["privacy", "ledger", "file"],
        ["journal", "verify", "file"],
        ["vectors", "show", "file"],
        ["data", "show", "nothing"],
        ["data", "check", "nowhere"],
        ["new", "no/such/s.toml"],
        ["new", "file/s.toml", "--force"],
        ["methods", "show", "nothing"],
        ["stop", "nowhere"],
        ["run", "--what"],
        ["server", "status", "--home", "file"],
        ["site", "status", "--home", "file"],
        ["demo", "--out", "file"],
    ],
)
def test_wrong_paths_and_names_end_in_words(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no run and no journal")
    monkeypatch.chdir(tmp_path)
    code = ended(args, monkeypatch)
    said = capsys.readouterr()
    assert code in (1, 2), (code, said)
    assert (said.out + said.err).strip()
    assert "bug" not in said.err


def test_a_bug_is_told_in_two_lines_with_a_saved_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    from polyclinic.methods import method_page

    def fails(name: str) -> None:
        raise ZeroDivisionError("a bug made for this test")

    monkeypatch.setattr(method_page, "page", fails)
    assert ended(["methods", "show", "fedavg"], monkeypatch) == 70
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    (saved,) = tmp_path.glob("polyclinic-traceback-*.txt")
    assert str(saved) in lines[1]
    assert "ZeroDivisionError: a bug made for this test" in saved.read_text()
    assert "polyclinic methods show fedavg" in saved.read_text()


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    from polyclinic.methods import method_page

    monkeypatch.setattr(method_page, "page", interrupted)
    assert ended(["methods", "show", "fedavg"], monkeypatch) == 130


def test_a_full_disk_is_no_bug() -> None:
    assert app.explained(OSError(28, "No space left on device", "runs/x")) == (
        "runs/x: No space left on device. Free some disk space; polyclinic run --resume continues a run"
    )
    assert app.explained(ZeroDivisionError()) is None


def test_a_missing_package_is_one_line() -> None:
    error = ImportError("cannot import the command")
    error.__cause__ = ModuleNotFoundError("no module", name="dp_accounting.rdp")
    assert str(app.explained(error)).endswith('pip install "polyclinic[privacy]"')
    assert app.explained(ModuleNotFoundError("no module", name="polyclinc")) is None


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_output_in_other_encodings(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "polyclinic", "methods", "show", "fedprox"],
        capture_output=True,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, "PYTHONIOENCODING": encoding, "LANG": "C"},
    )
    assert done.returncode == 0, done.stderr
    assert b"fedprox" in done.stdout
    done.stdout.decode(encoding)


@pytest.mark.slow
def test_a_run_whose_output_is_ascii_writes_its_report(tmp_path: Path) -> None:
    npz(tmp_path)
    text = study(tmp_path).split("[[methods]]")[0] + '[[methods]]\nname = "fedavg"\n'
    (tmp_path / "s.toml").write_text(re.sub("rounds = .*", "rounds = 1", text))
    done = subprocess.run(
        [sys.executable, "-m", "polyclinic", "run", "s.toml", "--set", "seeds=[0]"],
        capture_output=True,
        cwd=tmp_path,
        timeout=600,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "LANG": "C", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert b"  ok fedavg" in done.stdout
    assert len(list(tmp_path.rglob("report.html"))) == 1


def test_a_reader_that_closes_the_pipe() -> None:
    line = f"{shlex.quote(sys.executable)} -m polyclinic methods | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.strip() == "141", done
    assert done.stderr == ""


def test_levels_and_log_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(["methods", "--log-file", str(tmp_path / "log")], monkeypatch) == 0
    assert "DEBUG polyclinic.cli.app: polyclinic" in (tmp_path / "log").read_text()
    assert "DEBUG" not in capsys.readouterr().err
    assert ended(["--verbose", "methods"], monkeypatch) == 0
    assert "DEBUG" in capsys.readouterr().err
    assert ended(["methods", "--quiet", "--verbose"], monkeypatch) == 2
    assert ended(["methods", "--log-file", str(tmp_path / "no" / "log")], monkeypatch) == 2
    assert "writable" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert ended(["new", "--quiet"], monkeypatch) == 0
    assert capsys.readouterr().out == "wrote study.toml\n"


def test_a_log_of_json_lines_holds_levels_and_no_text_of_an_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text of an exception may quote a value of a data file: here the name of a patient."""
    file = tmp_path / "log.jsonl"
    rendering.set_up_logging(False, False, file, "json", "info")
    log = logging.getLogger("polyclinic.test")
    log.debug("not in the file")
    log.warning("100 %% of %s", "rows")
    log.warning("reading %s: %s", "a.csv", ValueError("'Anna Martin'"))
    log.warning("%(what)s", {"what": "a mapping"})
    try:
        raise KeyError("Anna Martin")
    except KeyError:
        log.exception("failed\nhere")
    SharedJournal(tmp_path / "journal.jsonl").write("site started", {"pid": 7})
    rendering.set_up_logging(False, False, None)
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    facts = [(e["level"], e["logger"].rpartition(".")[2], e["message"]) for e in entries]
    assert facts == [
        ("warning", "test", "100 % of rows"),
        ("warning", "test", "reading a.csv: ValueError"),
        ("warning", "test", "a mapping"),
        ("error", "test", "failed\nhere"),
        ("info", "shared_journals", "site started"),
    ]
    assert (entries[3]["error"], entries[3]["at"][0].partition(":")[0]) == ("KeyError", "test_errors.py")
    assert entries[4]["facts"] == {"pid": 7}
    assert datetime.fromisoformat(entries[0]["time"]).utcoffset() == timedelta(0)
    assert "Martin" not in file.read_text()
    assert "Martin" in capsys.readouterr().err  # the terminal shows everything
    assert ended(["methods", "--log-file", str(file), "--log-format", "json"], monkeypatch) == 0
    assert json.loads(file.read_text().splitlines()[-1])["level"] == "debug"


def test_what_is_missing_is_told_at_once_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npz(tmp_path)
    text = study(tmp_path).split("[[methods]]")[0] + '[[methods]]\nname = "fedavg"\nuplink = [{name = "zstd"}]\n'
    one = parse(text)
    checks.preflight([one], tmp_path / "runs" / "deeper")
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    monkeypatch.setattr(checks, "FREE_BYTES", 2**80)
    with pytest.raises(errors.ConfigError) as raised:
        checks.preflight([one], tmp_path)
    lines = str(raised.value).splitlines()
    assert len(lines) == 3
    assert 'pip install "polyclinic[privacy]"' in lines[0]
    assert "matplotlib" in lines[1]
    assert "are free" in lines[2]
    (tmp_path / "file").touch()
    with pytest.raises(errors.ConfigError, match=r"is a file\. Name a folder"):
        checks.preflight([one], tmp_path / "file" / "runs")


def test_packages_of_preflight_are_names_of_transforms() -> None:
    from polyclinic.compression.transform_table import TRANSFORMS

    assert set(checks._TRANSFORMS) <= set(TRANSFORMS)


def walk(app: App, name: str) -> Iterator[tuple[str, App]]:
    yield name, app
    for word in app:
        if not word.startswith("-"):
            yield from walk(app[word], f"{name} {word}")


def test_every_option_of_every_command_has_help() -> None:
    missing = []
    for name, command in walk(app.app, "polyclinic"):
        assert command.help or (command.default_command and command.default_command.__doc__), name
        if command.default_command is None:
            continue
        for argument in command.assemble_argument_collection(parse_docstring=True):
            if argument.show and not (argument.parameter.help or "").strip():
                missing.append(f"{name}: {argument.name}")
    assert not missing, missing


def test_a_line_stays_a_line_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    rendering.console.print("word " * 100)
    assert len(capsys.readouterr().out.splitlines()) == 1
