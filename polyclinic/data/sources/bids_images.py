"""BIDS folders as a source: images by suffix, labels and sites from participants.tsv, or masks."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from polyclinic.data.collection import Collection, Entry, FromFiles, described
from polyclinic.data.examples import DataError
from polyclinic.data.files import opened
from polyclinic.data.formats.bids import BidsImage, read_bids
from polyclinic.data.formats.column_roles import column_of, detected, no_column
from polyclinic.data.formats.safe_reading import Unreadable
from polyclinic.data.labels import MissingLabels, Reading, SurvivalReading, event_problems, survival_notes
from polyclinic.data.preprocessing.pipeline_config import Steps
from polyclinic.data.source import HIDDEN, Info, Task


@dataclass(frozen=True)
class BidsImages(FromFiles):
    """Images of a BIDS folder; its participants are the patients.

    Attributes:
        path: The folder, or a ``.zip`` file of it.
        suffix: Selected images, such as ``("T1w",)``; several are channels of one example, from visits that have all.
        label: The column of participants.tsv with the class or number; "" if masks are the target. With ``event``, the
            column of the time to an event.
        event: The column that says whether the event happened at that time, 1, or the patient was last seen then, 0
            (survival analysis).
        event_codes: Values of ``event`` that mean that it happened, instead of 1.
        censored_codes: Values of ``event`` that mean that it did not, instead of 0.
        regression: Whether the label is a number rather than a class.
        site: The column that names the site; if empty, the first with a usual name (``site``, ``hospital``, ``center``,
            ``scanner``, ...); ``"none"`` for no column.
        session: Only this session, such as ``"01"``; "" for all.
        classes: The classes in order; if empty, the sorted values (for masks: the names of 0, 1, ...).
        missing_labels: ``"refuse"`` raises an error for visits without a label; ``"drop"`` leaves them out with a note.
        steps: Preprocessing.
        unreadable: ``"refuse"`` raises an error for damaged files; ``"skip"`` leaves them out and lists them.
        about: Description from the catalog; not settable in a study file.
    """

    path: str
    suffix: tuple[str, ...] = ("T1w",)
    label: str = ""
    event: str = ""
    event_codes: tuple[str, ...] = ()
    censored_codes: tuple[str, ...] = ()
    regression: bool = False
    site: str = ""
    session: str = ""
    classes: tuple[str, ...] = ()
    missing_labels: MissingLabels = "refuse"
    steps: Steps = ()
    unreadable: Literal["refuse", "skip"] = "refuse"
    about: Info | None = field(default=None, metadata=HIDDEN)

    def __post_init__(self) -> None:
        super().__post_init__()
        codes = (*self.event_codes, *self.censored_codes)
        if problems := event_problems(self.event, self.label, codes, self.regression):
            raise DataError(problems)

    def collect(self) -> Collection:
        """Collect every visit that has all selected images, with its participant's label or its mask."""
        root = opened(self.path)
        try:
            bids = read_bids(root)
        except Unreadable as refusal:
            raise DataError(str(refusal)) from None
        problems: list[str] = []
        site = column_of(bids.table, "site", self.site, problems)
        if self.label and self.label not in bids.columns:
            problems.append(no_column(bids.columns, self.label, "label"))
        if self.event and self.event not in bids.columns:
            problems.append(no_column(bids.columns, self.event))
        problems = [f"participants.tsv {problem}" for problem in problems]
        if not self.suffix:
            problems.append("suffix = []: name at least one kind of image, such as T1w")
        visits: dict[tuple[str, ...], dict[str, BidsImage]] = {}
        for image in bids.images:
            if image.suffix in self.suffix and self.session in ("", image.entities.get("ses", "")):
                visit = (image.subject, image.entities.get("ses", ""), image.entities.get("run", ""))
                if image.suffix in visits.setdefault(visit, {}):
                    problems.append(f"{image.subject} has two {image.suffix} images in one visit; keep one of them")
                visits[visit][image.suffix] = image
        complete = {visit: images for visit, images in visits.items() if len(images) == len(set(self.suffix))}
        if not complete and not problems:
            kinds = ", ".join(sorted({image.suffix for image in bids.images})) or "none"
            problems.append(f"no visit has all of {', '.join(self.suffix)}; there are {kinds}")
        chosen = [tuple(visit_[suffix] for suffix in self.suffix) for _, visit_ in sorted(complete.items())]
        masks = [None if self.label else bids.mask_of(images[0]) for images in chosen]
        if not self.label and (lost := masks.count(None)):
            problems.append(
                f"{lost} of {len(chosen)} visits have no mask in the image's space, or several; name a label instead"
            )
        if problems:
            raise DataError([f"{root.name}: {problem}" for problem in problems[:20]])
        task: Task = "regression" if self.regression else "classification"
        task = "segmentation" if not self.label else "survival" if self.event else task
        targets: list[int] | list[tuple[float, ...]] | list[None] = [None] * len(chosen)
        classes, notes = self.classes, detected({"site": (self.site, site)})
        rows = [bids.row_of(images[0]) for images in chosen]
        if self.label:
            reading, survival = Reading(self.classes), SurvivalReading(self.event_codes, self.censored_codes)
            names = (self.label, self.event) if self.event else (self.label,)
            cells = {name: [row.get(name, "") for row in rows] for name in names}
            gone = set(survival.unlabeled(*cells.values()) if self.event else reading.unlabeled(cells))
            if self.missing_labels == "drop" and gone:
                notes.append(f"Left out: {len(gone)} visits whose {' or '.join(names)} is missing.")
                chosen = [images for i, images in enumerate(chosen) if i not in gone]
                rows = [row for i, row in enumerate(rows) if i not in gone]
                masks = [mask for i, mask in enumerate(masks) if i not in gone]
                cells = {name: [word for i, word in enumerate(c) if i not in gone] for name, c in cells.items()}
            places = [images[0].path.name for images in chosen]
            if self.event:
                time, event = cells.items()
                pairs = survival.read(time, event, problems, places)
                notes += (
                    survival_notes(pairs, [row.get(site, "") for row in rows] if site else []) if not problems else []
                )
                targets, classes = pairs, ()
            else:
                targets, classes = reading.read(cells, task, problems, places)
        if problems:
            raise DataError([f"{root.name}/participants.tsv: {problem}" for problem in problems[:20]])
        entries = []
        for images, row, target, mask in zip(chosen, rows, targets, masks, strict=True):
            columns = {k: v for k, v in row.items() if k not in (self.label, self.event)}
            name = images[0].path.relative_to(root).as_posix()
            paths = tuple(image.path for image in images)
            entries.append(Entry(name, paths, images[0].subject, target, mask.path if mask else None, columns))
        name = Path(self.path).stem
        found = Info(name, name, "MR", "brain", task, classes)
        return self.made(described(self.about, found, notes), tuple(entries), (site,) if site else ())
