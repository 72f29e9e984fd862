"""Model of the ``[data]`` table of a study file: data set, sites and split."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError, model_validator
from pydantic import ModelWrapValidatorHandler as Handler
from pydantic_core import InitErrorDetails

from polyclinic.core import extensions
from polyclinic.data import config_parsing
from polyclinic.data.annotations import Annotation
from polyclinic.data.catalog import dataset_catalog
from polyclinic.data.examples import DataError
from polyclinic.data.files import placed
from polyclinic.data.fingerprint.nnunet_plan import NnunetPlan
from polyclinic.data.fingerprint.preprocessing_plan import DataPlan
from polyclinic.data.partition import PARTITIONS, Partition
from polyclinic.data.source import Source
from polyclinic.data.splits import ROLES
from polyclinic.errors import ConfigError

KINDS: dict[str, tuple[str, str]] = {
    "nodules": ("polyclinic.data.sources.lung_nodules", "Nodules"),
    "npz": ("polyclinic.data.sources.npz", "Npz"),
    "folders": ("polyclinic.data.sources.folders", "Folders"),
    "manifest": ("polyclinic.data.sources.manifest", "Manifest"),
    "patterns": ("polyclinic.data.path_patterns", "Patterns"),
    "pairs": ("polyclinic.data.paired_folders", "Pairs"),
    "table": ("polyclinic.data.sources.feature_tables", "FeatureTable"),
    "bids": ("polyclinic.data.sources.bids_images", "BidsImages"),
    "dicom": ("polyclinic.data.sources.dicom_images", "DicomImages"),
    "fastmri": ("polyclinic.data.sources.fastmri", "FastMri"),
    "roi-phantom": ("polyclinic.data.simulation.phantoms", "RoiPhantom"),
    "survival-phantom": ("polyclinic.data.simulation.phantoms", "SurvivalPhantom"),
}
"""Possible values of ``kind``: module and class of the source. Its options are the fields of the class."""


def _sites(value: Any) -> str | Partition:
    """Parse a column name, or a simulated partition such as ``{partition = "dirichlet", count = 8}``."""
    if isinstance(value, str | Partition):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError('must be a column\'s name, or a partition such as {partition = "dirichlet", count = 8}')
    given = dict(value)
    name = given.pop("partition", None)
    if name not in PARTITIONS:
        says = f"no partition is called {name!r}.{config_parsing.choices(str(name), PARTITIONS, 'There are')}"
        raise config_parsing.problems([config_parsing.problem(("partition",), says, name)])
    return config_parsing.build(PARTITIONS[name], given, f'the partition "{name}"')


def _plain(value: str | Partition) -> Any:
    return value if isinstance(value, str) else {"partition": value.name, **vars(value)}


def _split(value: Any) -> tuple[float, ...] | str:
    """Parse three shares, or ``"official"``."""
    if value == "official":
        return "official"
    numbers = isinstance(value, list | tuple) and all(type(n) in (int, float) for n in value)
    if not numbers or len(value) != len(ROLES) or any(not 0 <= n <= 1 for n in value) or abs(sum(value) - 1) > 1e-6:
        raise ConfigError('must be the shares of training, validation and test, which sum to 1, or "official"')
    if value[0] == 0 or value[2] == 0:
        raise ConfigError("training and test each need a share above 0")
    return tuple(float(n) for n in value)


Sites = Annotated[str | Partition, PlainValidator(_sites), PlainSerializer(_plain)]
Split = Annotated[
    tuple[float, ...] | str, PlainValidator(_split), PlainSerializer(lambda v: v if v == "official" else list(v))
]
Names = Annotated[tuple[str, ...], Field(strict=False)]


class DataSpec(BaseModel):
    """Data of a study. Further keys are options of the source, such as ``size`` and ``mm``.

    Attributes:
        use: Data set of the catalog (``polyclinic data list``).
        path: Folder or file of your own; ``~`` and ``$VARIABLES`` are expanded.
        kind: Kind of data at ``path``; a key of ``KINDS``.
        plan: File of a plan whose preprocessing is used: a ``DataPlan`` (``polyclinic data plan``), or one as nnU-Net
            makes it (``polyclinic plan``), from which a study also takes patch, network and batch.
        sites: ``"natural"`` for the source's own hospitals or scanners, another column's name, or a partition that
            simulates sites.
        split: Shares of training, validation and test, or ``"official"`` for the source's own split.
        external: Sites without training; all their data are test data.
        min_patients: Sites with fewer patients are left out and listed.
        max_patients: Largest number of patients per site, drawn at random.
        unlabeled: Share of each site's training patients whose labels are withheld (role ``"unlabeled"``).
        annotations: Weak annotation of training data, by site: ``"boxes"`` or ``"labels"`` (of images) instead of
            masks, or ``"none"``.
        public: Sites whose images are public: every site and the server have them, without targets.
        accelerate: Acceleration factor of simulated acquisition for reconstruction, with the full image as target; 0
            for none. ``center``: share of k-space around its middle that is always measured.
        position: Column with the relative height of a slice in its volume. ``video``: column that identifies the video
            of a frame.
        scanners: Strength of simulated scanners, one per site, that change its images; 0 for none.
        duplicates: Whether equal inputs are reported, dropped (test data are kept), or refused.
        near_duplicates: Whether nearly equal images are searched for and reported, or refused if two roles share them.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    use: str | None = None
    path: str | None = None
    kind: str | None = None
    plan: str | None = None
    sites: Sites = "natural"
    split: Split = (0.6, 0.15, 0.25)
    external: Names = ()
    min_patients: Annotated[int, Field(ge=1)] = 10
    max_patients: Annotated[int, Field(ge=1)] | None = None
    unlabeled: Annotated[float, Field(ge=0, lt=1)] = 0.0
    annotations: dict[str, Annotation] = {}
    public: Names = ()
    accelerate: Annotated[float, Field(ge=0, le=32)] = 0.0
    center: Annotated[float, Field(gt=0, le=1)] = 0.08
    position: str | None = None
    video: str | None = None
    scanners: Annotated[float, Field(ge=0, le=2)] = 0.0
    duplicates: Literal["report", "drop", "refuse"] = "report"
    near_duplicates: Literal["ignore", "report", "refuse"] = "ignore"

    @property
    def options(self) -> dict[str, Any]:
        """The source's options, as given."""
        return dict(self.model_extra or {})

    @property
    def partition(self) -> Partition | None:
        """The partition that simulates sites, or None if they are real."""
        return None if isinstance(self.sites, str) else self.sites

    def source(self) -> Source:
        """Return the source of the examples, without reading any data."""
        if self.plan is not None:
            return self._planned_source(self.plan)
        return source_of(self.use, self.path, self.kind, self.options)

    def _planned_source(self, plan: str) -> Source:
        """Return the source with the preprocessing of the file ``plan``.

        Raises:
            DataError: If the plan is not for these data.
        """
        own, path = self.options, placed(plan, "plan")
        found = NnunetPlan.read(path)
        planned = DataPlan.options(path, own) if found is None else {**own, **found.data_options}
        try:
            return source_of(self.use, self.path, self.kind, planned)
        except ValidationError as error:
            says = [
                f"it was made for {'images' if 'steps' in planned else 'a table'}, which this data is not"
                if line["loc"] in (("steps",), ("statistics",), ("declared",)) and "unknown key" in line["msg"]
                else f"{'.'.join(map(str, line['loc']))}: {line['msg']}"
                for line in error.errors()
            ]
            raise DataError([f'plan = "{plan}": {one}' for one in dict.fromkeys(says)]) from None

    @model_validator(mode="wrap")
    @classmethod
    def _whole(cls, value: Any, handler: Handler["DataSpec"]) -> "DataSpec":
        """Validate the table and the source's options in one pass."""
        if not isinstance(value, Mapping):
            return handler(value)
        lines: list[InitErrorDetails] = []
        spec = None
        try:
            spec = handler(value)
        except ValidationError as error:
            lines += [config_parsing.again(line, line["loc"]) for line in error.errors(include_url=False)]
        own = {key: item for key, item in value.items() if key not in cls.model_fields}
        use, path, kind = (value.get(key) for key in ("use", "path", "kind"))
        if all(word is None or isinstance(word, str) for word in (use, path, kind)):
            try:
                source_of(use, path, kind, own)
            except ValidationError as error:
                lines += [config_parsing.again(line, line["loc"]) for line in error.errors(include_url=False)]
        if spec is not None:
            lines += list(_together(spec))
        if lines:
            raise config_parsing.problems(lines)
        assert spec is not None
        return spec


def source_of(use: str | None, path: str | None, kind: str | None, own: Mapping[str, Any]) -> Source:
    """Return the source that a ``[data]`` table names, with its options ``own``.

    Raises:
        ValidationError: With every problem, by key.
    """
    if use is None and kind is None:
        says = 'name a data set with use = "..." (`polyclinic data list` shows them), or give a path and its kind'
        raise config_parsing.problems([config_parsing.problem(("use",), says, use)])
    given, about = dict(own) if path is None else {**own, "path": path}, None
    if use is not None:
        if kind is not None:
            says = f'is given in addition to use = "{use}", which determines the kind: remove one of them'
            raise config_parsing.problems([config_parsing.problem(("kind",), says, kind)])
        try:
            kind, given, about = dataset_catalog.resolve(use, path, own)
        except DataError as error:
            raise config_parsing.problems(
                [config_parsing.problem(("use",), says, use) for says in error.problems]
            ) from None
    if kind not in KINDS and kind in extensions.names("sources"):
        part = extensions.load("sources", str(kind))
        own_source: Source = config_parsing.build(part, given, f'"{kind}"') if isinstance(part, type) else part
        return own_source
    if kind not in KINDS:
        says = f'no kind of data is called "{kind}".{config_parsing.choices(str(kind), KINDS, "There are")}'
        raise config_parsing.problems([config_parsing.problem(("kind",), says, kind)])
    module, name = KINDS[kind]
    source: Source = config_parsing.build(getattr(importlib.import_module(module), name), given, f'"{use or kind}"')
    if about is not None and hasattr(source, "about"):
        source = dataclasses.replace(source, about=about)  # type: ignore[type-var]
    return source


def _together(spec: DataSpec) -> list[InitErrorDetails]:
    """Return the problems of combinations of individually valid keys."""
    lines = []
    if spec.max_patients is not None and spec.max_patients < spec.min_patients:
        says = f"is below min_patients = {spec.min_patients}, so no site would remain"
        lines.append(config_parsing.problem(("max_patients",), says, spec.max_patients))
    if 0 < spec.accelerate < 1:
        says = "must be an acceleration factor of at least 1, or 0 for no reconstruction"
        lines.append(config_parsing.problem(("accelerate",), says, spec.accelerate))
    if both := sorted({*spec.public} & {*spec.external}):
        lines.append(config_parsing.problem(("public",), f"names {both[0]}, which is also external", both[0]))
    if spec.plan is not None and (
        twice := [key for key in ("steps", "statistics", "declared", "patch") if key in spec.options]
    ):
        says = f"defines the preprocessing, and so does {twice[0]}: remove one of them"
        lines.append(config_parsing.problem(("plan",), says, spec.plan))
    if len(set(spec.external)) != len(spec.external):
        lines.append(config_parsing.problem(("external",), "names a site twice", spec.external))
    return lines
