"""Reader of run folders: the study, the records of each round, and the test predictions.

```
runs/<name>-<hash>/
  study.toml      the study as run           records.jsonl   one record per line
  run.json        sites, methods, versions   journal.jsonl   the hash-chained journal
  run-plan.toml   the plan that the study names, if any
  arms/<label>-seed<s>/predictions.safetensors   and optionally validation.safetensors of the same form
  linear/<label>-seed<s>.safetensors             optionally, the same of linear baselines
```

All problems are reported together, with file and line. An unfinished run can be read: an incomplete last line and
method runs without predictions are listed in ``Run.missing`` and are not errors.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from polyclinic.core.config_problems import problems_of
from polyclinic.errors import RunError
from polyclinic.evaluation.records.method_runs import LINEAR_FOLDER, LINEAR_LOCAL, LINEAR_POOLED, PLAN, arm_name
from polyclinic.evaluation.records.predictions import Predictions, joined, read_predictions
from polyclinic.evaluation.records.record_schema import (
    Chosen,
    Known,
    Privacy,
    Quarantine,
    Round,
    RunInfo,
    Scores,
    Sealed,
    Standing,
    Trial,
    arm_names,
    record_files,
)

_LINE: TypeAdapter[Known] = TypeAdapter(Known)
_KINDS = ("round", "scores", "test", "sealed", "privacy", "quarantine", "trial", "chosen", "standing")


class NotARun(RunError, ValueError):
    """A folder or file that cannot be read as a run. The message lists every problem, with file and line."""


@dataclass(frozen=True)
class Run:
    """The contents of a run folder.

    Attributes:
        path: The folder.
        info: ``run.json``.
        lines: The records, in order.
        arms: Test predictions by (method label, seed), then by site. With folds, those of all folds together, each
            patient once; those of external sites are the first fold's.
        splits: The same separately for each fold, by (method label, seed, fold); empty without folds.
        validation: Validation predictions, if stored. With folds there are none, since one fold's validation patients
            are another's test patients, which must not determine a threshold.
        linear: Test predictions of the linear baselines, as ``arms``; empty if the run has none.
        study: The text of ``study.toml``.
        plan: The text of the plan that it names; empty without one.
        missing: Descriptions of the parts of a finished run that this one lacks.
        unread: Number of lines of each kind of record that this version does not know.
    """

    path: Path
    info: RunInfo
    lines: tuple[Known, ...] = ()
    arms: Mapping[tuple[str, int], Mapping[str, Predictions]] = field(default_factory=dict)
    validation: Mapping[tuple[str, int], Mapping[str, Predictions]] = field(default_factory=dict)
    splits: Mapping[tuple[str, int, int], Mapping[str, Predictions]] = field(default_factory=dict)
    linear: Mapping[tuple[str, int], Mapping[str, Predictions]] = field(default_factory=dict)
    study: str = ""
    plan: str = ""
    missing: tuple[str, ...] = ()
    unread: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def rounds(self) -> tuple[Round, ...]:
        """The records of rounds."""
        return tuple(line for line in self.lines if isinstance(line, Round))

    @cached_property
    def curves(self) -> tuple[Scores, ...]:
        """Validation metrics by round and site."""
        return tuple(line for line in self.lines if isinstance(line, Scores) and line.kind == "scores")

    @cached_property
    def privacy(self) -> tuple[Privacy, ...]:
        """The records of privacy spending."""
        return tuple(line for line in self.lines if isinstance(line, Privacy))

    @cached_property
    def quarantined(self) -> tuple[Quarantine, ...]:
        """Replies that were refused; those that a round already counts as lost are not repeated."""
        lost = {(r.method, r.seed, r.fold, r.round, site) for r in self.rounds for site in r.lost}
        return tuple(
            line
            for line in self.lines
            if isinstance(line, Quarantine) and (line.method, line.seed, line.fold, line.round, line.site) not in lost
        )

    @cached_property
    def opened(self) -> Mapping[tuple[str, int], int]:
        """How often the test set of each method and seed was opened; with folds, the maximum over folds."""
        found: dict[tuple[str, int], int] = {}
        for s in (line for line in self.lines if isinstance(line, Sealed)):
            found[s.method, s.seed] = max(s.opened, found.get((s.method, s.seed), 0))
        return found

    @cached_property
    def trials(self) -> tuple[Trial, ...]:
        """The settings that a search tried."""
        return tuple(line for line in self.lines if isinstance(line, Trial))

    @cached_property
    def chosen(self) -> tuple[Chosen, ...]:
        """The settings of each method run after a search."""
        return tuple(line for line in self.lines if isinstance(line, Chosen))

    @cached_property
    def standings(self) -> tuple[Standing, ...]:
        """The sites that each method run names at its end."""
        return tuple(line for line in self.lines if isinstance(line, Standing))

    @property
    def repeats(self) -> int:
        """Number of runs of each method: one for each seed and fold."""
        return len(self.info.seeds) * max(1, self.info.folds)

    def spent(self, label: str) -> tuple[Privacy, ...]:
        """Return the final spending of each site under ``label``, in the order of names; the largest over seeds."""
        last = {(p.site, p.seed, p.fold): p for p in self.privacy if p.method == label}
        most: dict[str | None, Privacy] = {}
        for (site, _, _), p in last.items():
            if site not in most or (p.epsilon or 0) > (most[site].epsilon or 0):
                most[site] = p
        return tuple(most[k] for k in sorted(most, key=lambda k: k or ""))

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the files on which results depend, by path within the folder."""
        files = [self.path / n for n in ("study.toml", PLAN, "run.json", "records.jsonl", "journal.jsonl")]
        files += sorted(self.path.glob("arms/*/predictions.safetensors")) + sorted(
            self.path.glob("arms/*/model.safetensors")
        )
        files += sorted(self.path.glob(f"{LINEAR_FOLDER}/*.safetensors"))
        return {str(f.relative_to(self.path)): _sha256(f) for f in files if f.is_file()}


def training_sites(run: Run) -> list[str]:
    """Return the names of the sites that trained."""
    return [s.name for s in run.info.sites if s.role == "training"]


def external_sites(run: Run) -> list[str]:
    """Return the names of the sites that did not train."""
    return [s.name for s in run.info.sites if s.role == "external"]


def read_run(folder: str | Path) -> Run:
    """Read a run folder.

    Raises:
        NotARun: If it is not a run folder, or a file is damaged. All problems are listed.
    """
    path = Path(folder)
    info = read_info(path)
    problems: list[str] = []
    missing: list[str] = []
    names = arm_names(info)
    lines, unread = _read_records(path, [name for *_, name in names], problems, missing)
    found: dict[tuple[str, int, int], Mapping[str, Predictions]] = {}
    validation: dict[tuple[str, int], Mapping[str, Predictions]] = {}
    absent, sites = list[str](), [s.name for s in info.sites]
    for label, seed, fold, name in names:
        if (file := path / "arms" / name / "predictions.safetensors").is_file():
            found[label, seed, fold] = read_predictions(file, info.task, info.metric, sites, problems)
        else:
            absent.append(f"{label} (seed {seed}" + (f", fold {fold})" if info.folds else ")"))
        if (file := path / "arms" / name / "validation.safetensors").is_file() and not info.folds:
            validation[label, seed] = read_predictions(file, info.task, info.metric, sites, problems)
    arms = _whole_arms(found, max(1, info.folds))
    linear = _whole_arms(_linear(path, info, problems), max(1, info.folds))
    if absent:
        missing.append("no test predictions yet of " + ", ".join(absent))
    study = path / "study.toml"
    if not study.is_file():
        missing.append("study.toml, the study as run")
    text, plan = _text(study, problems), _text(path / PLAN, problems)
    if problems:
        raise NotARun("\n".join([*problems, f"{_count(problems)} in {path}; nothing was written."]))
    splits = found if info.folds else {}
    return Run(path, info, lines, arms, validation, splits, linear, text, plan, tuple(missing), unread)


def _text(file: Path, problems: list[str]) -> str:
    """Return the text of a file; empty if there is none, or if it is no text."""
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else ""
    except UnicodeDecodeError:
        problems.append(f"{file}: is damaged (not UTF-8)")
        return ""


def _linear(path: Path, info: RunInfo, problems: list[str]) -> dict[tuple[str, int, int], Mapping[str, Predictions]]:
    """Return the test predictions of the linear baselines by label, seed and fold."""
    found: dict[tuple[str, int, int], Mapping[str, Predictions]] = {}
    for label in (LINEAR_LOCAL, LINEAR_POOLED):
        for seed in info.seeds:
            for fold in range(max(1, info.folds)):
                file = path / LINEAR_FOLDER / f"{arm_name(label, seed, fold if info.folds else None)}.safetensors"
                if file.is_file():
                    sites = [s.name for s in info.sites]
                    found[label, seed, fold] = read_predictions(file, info.task, info.metric, sites, problems)
    return found


def _whole_arms(
    found: Mapping[tuple[str, int, int], Mapping[str, Predictions]], folds: int
) -> dict[tuple[str, int], Mapping[str, Predictions]]:
    """Return the predictions of each method and seed of which all folds exist, with folds concatenated."""
    arms: dict[tuple[str, int], Mapping[str, Predictions]] = {}
    for label, seed, first in found:
        parts = [found.get((label, seed, fold)) for fold in range(folds)]
        if first == 0 and all(part is not None for part in parts):
            whole: dict[str, Predictions] = {}
            for part in parts:
                for site, p in (part or {}).items():
                    whole[site] = joined(whole[site], p) if site in whole else p
            arms[label, seed] = dict(sorted(whole.items()))
    return arms


def read_info(path: Path) -> RunInfo:
    """Read the description ``run.json`` of the run in the folder at ``path``.

    Raises:
        NotARun: If there is none, or it is damaged.
    """
    file = path / "run.json"
    if not path.is_dir():
        raise NotARun(f"{path}: no such folder. Give the folder of a run, such as runs/<name>-<hash>.")
    if not file.is_file():
        inside = ", ".join(sorted(one.parent.name for one in path.glob("*/run.json")))
        hint = f"It contains these run folders: {inside}." if inside else "`polyclinic run` writes run folders."
        raise NotARun(f"{path}: not a run folder: it has no run.json. {hint}")
    try:
        return RunInfo.model_validate_json(file.read_bytes())
    except ValidationError as error:
        problems = _in_words(error, str(file))
        raise NotARun("\n".join([*problems, f"{_count(problems)} in {file}; nothing was written."])) from None


def _read_records(
    path: Path, names: Sequence[str], problems: list[str], missing: list[str]
) -> tuple[tuple[Known, ...], Mapping[str, int]]:
    files = record_files(path, names)
    if files != [path / "records.jsonl"]:
        missing.append("records.jsonl, what happened round by round" + (", which its arms still hold" if files else ""))
    lines, unread = list[Known](), Counter[str]()
    for file in files:
        read, unknown = _read_lines(file, problems, missing)
        lines += read
        unread += unknown
    return tuple(lines), dict(unread)


def _read_lines(file: Path, problems: list[str], missing: list[str]) -> tuple[list[Known], Counter[str]]:
    raw, lines, unread = file.read_bytes(), list[Known](), Counter[str]()
    parts = raw.split(b"\n")
    for number, text in enumerate(parts, 1):
        if not text.strip():
            continue
        torn = number == len(parts)  # a whole line ends with a newline
        try:
            value = json.loads(text)
            if not isinstance(value, dict) or "kind" not in value:
                raise ValueError('a record is an object with a "kind"')
            if value["kind"] in _KINDS:
                lines.append(_LINE.validate_python(value))
            else:
                unread[str(value["kind"])] += 1
        except ValidationError as error:
            problems.extend(_in_words(error, f"{file}:{number}"))
        except ValueError as error:
            if torn:
                missing.append(f"the last line of records.jsonl (line {number}) was cut off while it was written")
            else:
                problems.append(f"{file}:{number}: not a JSON record ({error}). Restore the line or remove it.")
    return lines, unread


def _in_words(error: ValidationError, where: str) -> list[str]:
    found = error.errors()
    for e in found:
        if e["loc"][:1] and e["loc"][0] in _KINDS:  # the kind of the record; a field of the same name comes after it
            e["loc"] = e["loc"][1:]
    return [f"{where}: {p.key + ': ' if p.path else ''}{p.says}" for p in problems_of(found)]


def _count(problems: Sequence[str]) -> str:
    return "1 problem" if len(problems) == 1 else f"{len(problems)} problems"


def _sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
