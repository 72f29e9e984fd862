"""Identity of a run's data: a hash of every example's input and target, by site and role.

It is written to ``data.safetensors`` when a run begins, and compared when the data are read again. It does not depend
on the names of files. Renamed files are therefore no change unless they change the split: without known patients, the
name of a file is the name of its patient.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyclinic.core.serialization import bytes_of
from polyclinic.core.tree import Tree
from polyclinic.data.cases.cases import Cases
from polyclinic.data.examples import Dataset, in_memory
from polyclinic.data.federation import Federated, federate, fingerprint_of
from polyclinic.data.source import FittedSource, Info, Source
from polyclinic.data.splits import Fold
from polyclinic.errors import RunError
from polyclinic.evaluation.records.run_reader import Run
from polyclinic.studies.config.study_config import Study, parse
from polyclinic.studies.run.run_directory import read_tensors, write_tensors

FILE = "data.safetensors"
CHUNK_BYTES = 2**28
"""Size of the inputs that are read at once for their hashes."""
MOST_LINES = 10
PUBLIC = "public"


class DataChanged(RunError, ValueError):
    """The data of a run are not those that it began with. The message says what changed at which site."""


class _Row(NamedTuple):
    """One example: its role, hashes of its name, input and target, and the number of its patient."""

    role: str
    name: int
    input: int
    target: int
    patient: int


def write_identity(folder: Path, data: Federated, source: Source) -> None:
    """Write the identity of ``data``, which ``source`` reads, to the run's folder."""
    write_tensors(folder / FILE, identify(data, source))


def require_unchanged(folder: Path, fingerprint: str, data: Federated, source: Source) -> None:
    """Compare ``data`` with those that the run in ``folder`` began with.

    Args:
        folder: The run folder.
        fingerprint: The fingerprint in ``run.json``. If it is equal, the examples are not compared.
        data: The first split of the run's first seed, as the data are now.
        source: The source that reads them.

    Raises:
        DataChanged: If an example, its target, site, role or patient differs.
    """
    if data.fingerprint == fingerprint:
        return
    if not (folder / FILE).is_file():
        raise DataChanged(f"{folder}: the data have changed since the run began. {FILE}, which says how, is missing")
    if lines := differences(read_tensors(folder / FILE), identify(data, source), data.info):
        listed = "".join(f"\n  {line}" for line in lines)
        raise DataChanged(f"{folder}: the data have changed since the run began:{listed}")


def require_same_data(run: Run, study: Study, source: Source) -> None:
    """Compare the data that ``source`` reads with those that ``run`` of ``study`` began with.

    Raises:
        DataChanged: If they differ.
        DataError: If they cannot be read.
    """
    seed, fold, began = run.info.seeds[0], first_fold(run), run.info.data.fingerprint
    if fingerprint_of(study.data, seed, fold, source) != began:
        require_unchanged(run.path, began, federate(study.data, seed, fold, source), source)


def read_again(run: Run, seed: int) -> tuple[Study, Source, Federated]:
    """Read the data of ``run`` as split with ``seed``, for computations with its models.

    Returns:
        The study, the source of its data, and the split. With folds, it is the split of the first fold.

    Raises:
        DataChanged: If the data are not those that the run began with.
        DataError: If they cannot be read.
    """
    study = parse(run.study, run.path / "study.toml")
    source = study.data.source()
    require_same_data(run, study, source)
    return study, source, federate(study.data, seed, first_fold(run), source)


def first_fold(run: Run) -> Fold | None:
    """Return the first fold of a run's cross-validation, if it has one."""
    return Fold(0, run.info.folds, run.info.folds_by or "patients") if run.info.folds else None


def identify(data: Federated, source: Source) -> Tree:
    """Compute the identity of ``data``, which ``source`` reads.

    Inputs and targets are hashed as the source reads them: rows of tables before they are filled and scaled, images
    before simulated scanners and weak annotation.

    Returns:
        For each ``"<site>/<role>"`` an int64 tensor [n, 4]: hashes of each example's name, input and target, and the
        rank of its patient's name among those of all patients.
    """
    ranks = {patient: i for i, patient in enumerate(sorted(set(source.table().patients)))}
    places = {
        f"{site}/{role}": examples
        for site, roles in data.sites.items()
        for role, examples in roles.items()
        if role != PUBLIC
    }
    if data.public is not None:
        places[f"{PUBLIC}/{PUBLIC}"] = data.public
    return {place: _identified(examples, source, ranks) for place, examples in places.items() if len(examples)}


def differences(before: Tree, now: Tree, info: Info) -> tuple[str, ...]:
    """Return what changed between two identities, one sentence for each site; nothing if the data are the same.

    Args:
        before: The identity of the data when the run began.
        now: The identity of the data as they are.
        info: Description of the data, which decides whether rows or images, labels or masks are counted.
    """
    old, new = _rows(before), _rows(now)
    unit, target = "row" if info.modality == "table" else "image", "mask" if info.task == "segmentation" else "label"
    found: dict[str, list[str]] = {site: [] for site in sorted({*old, *new})}
    for site, sentences in found.items():
        old[site], new[site], _ = _matched(old[site], new[site], lambda row: (row.role, row.input, row.target))
        for text, key in _CHANGES:
            old[site], new[site], count = _matched(old[site], new[site], key)
            sentences += _counted(text, count, unit, target)
    for (start, end), count in sorted(_moved(old, new).items()):
        found[start] += _counted(f"{{n}} {{unit}} moved to {end}", count, unit, target)
        found[end] += _counted(f"{{n}} {{unit}} moved here from {start}", count, unit, target)
    for site, sentences in found.items():
        sentences += _counted("{n} {unit} removed", len(old[site]), unit, target)
        sentences += _counted("{n} {unit} added", len(new[site]), unit, target)
    lines = [f"{site}{_novelty(site, before, now)}: {', '.join(texts)}" for site, texts in found.items() if texts]
    if not lines:
        return _other_patients(_rows(before), _rows(now), unit)
    more = [f"... and {len(lines) - MOST_LINES} more sites"] if len(lines) > MOST_LINES else []
    if _contents(before) == _contents(now):
        more.append(f"The {unit}s and {target}s are the same, but names of files, patients or sites have changed.")
    return (*lines[:MOST_LINES], *more)


_CHANGES: tuple[tuple[str, Callable[[_Row], Hashable]], ...] = (
    ("{n} {unit} moved between training, validation and test", lambda row: (row.input, row.target)),
    ("{n} {target} changed", lambda row: row.input),
    ("{n} {unit} changed", lambda row: row.name),
)
"""What a pair of examples with an equal key has in common, and what differs."""


def _identified(examples: Dataset, source: Source, ranks: Mapping[str, int]) -> Tensor:
    """Return the rows of one role at one site: int64 [n, 4]."""
    step = max(1, CHUNK_BYTES // (4 * math.prod(examples.shape)))
    hashed = [_contents_of(source, examples.ids[i : i + step]) for i in range(0, len(examples), step)]
    patients = [ranks.get(patient, -1) for patient in examples.patients]
    return torch.stack(
        [
            _joined(_hash(name.encode()) for name in examples.ids),
            torch.cat([inputs for inputs, _ in hashed]),
            torch.cat([targets for _, targets in hashed]),
            torch.tensor(patients, dtype=torch.int64),
        ],
        dim=1,
    )


def _contents_of(source: Source, ids: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the hashes of the inputs and of the targets of the named examples: int64 [n] each."""
    if isinstance(source, FittedSource):
        texts = source.texts(ids)
        return _joined(_hash(x.encode()) for x, _ in texts), _joined(_hash(y.encode()) for _, y in texts)
    examples = source.examples(ids)
    if isinstance(examples, Cases):
        return _joined(key[:8] for key in examples.input_hashes()), _joined(key[:8] for key in examples.target_hashes())
    images = in_memory(examples, "the identity of data")
    targets = images.targets.long() if images.targets.dtype == torch.uint8 else images.targets
    return _hashes(images.inputs), _hashes(targets)


def _hashes(values: Tensor) -> Tensor:
    """Return a hash of each entry of ``values`` [n, ...]: int64 [n]."""
    flat: Any = np.frombuffer(bytes_of(values), np.uint8).reshape(len(values), values[:1].nbytes)
    return _joined(_hash(row) for row in flat)


def _joined(hashes: Iterable[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(hashes)), dtype=torch.int64)


def _hash(content: "bytes | memoryview") -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


def _rows(identity: Tree) -> dict[str, list[_Row]]:
    """Return the examples of each site."""
    rows: dict[str, list[_Row]] = defaultdict(list)
    for place, leaf in identity.items():
        site, _, role = place.rpartition("/")
        rows[site] += [_Row(role, *values) for values in leaf.tolist()]
    return rows


def _matched(
    old: Sequence[_Row], new: Sequence[_Row], key: Callable[[_Row], Hashable]
) -> tuple[list[_Row], list[_Row], int]:
    """Pair examples with an equal ``key``; return those without a partner, and the number of pairs."""
    partners: dict[Hashable, list[_Row]] = defaultdict(list)
    for row in new:
        partners[key(row)].append(row)
    alone = [row for row in old if not (partners[key(row)] and partners[key(row)].pop())]
    return alone, [row for rows in partners.values() for row in rows], len(old) - len(alone)


def _moved(old: dict[str, list[_Row]], new: dict[str, list[_Row]]) -> Counter[tuple[str, str]]:
    """Remove the examples that are now at another site from ``old`` and ``new``, and count them by both sites."""
    moved = Counter[tuple[str, str]]()
    for start in sorted(old):
        for end in sorted(new):
            if old[start] and new[end] and start != end:
                old[start], new[end], count = _matched(old[start], new[end], lambda row: (row.input, row.target))
                moved[start, end] += count
    return +moved


def _other_patients(old: Mapping[str, Sequence[_Row]], new: Mapping[str, Sequence[_Row]], unit: str) -> tuple[str, ...]:
    """Return the sites at which the same examples have other patients, whose numbers are in the predictions."""
    lines = list[str]()
    for site in sorted(old):
        gone = Counter(row[2:] for row in old[site]) - Counter(row[2:] for row in new[site])
        lines += _counted(f"{site}: the patient of {{n}} {{unit}} changed", gone.total(), unit)
    return tuple(lines)


def _novelty(site: str, before: Tree, now: Tree) -> str:
    was, remains = (any(place.startswith(f"{site}/") for place in identity) for identity in (before, now))
    return "" if was and remains else " (no longer a site)" if was else " (a new site)"


def _contents(identity: Tree) -> Counter[tuple[int, int]]:
    return Counter((row.input, row.target) for rows in _rows(identity).values() for row in rows)


def _counted(text: str, count: int, unit: str, target: str = "") -> list[str]:
    """Return ``text`` with ``count`` and its noun, or nothing if the count is 0."""
    s = "" if count == 1 else "s"
    return [text.format(n=count, unit=unit + s, target=target + s)] if count else []
