"""The ``[data]`` table of a study file, as a value: which data, whose sites, which split."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError, model_validator
from pydantic import ModelWrapValidatorHandler as Handler
from pydantic_core import InitErrorDetails

from polyclinic.data import config_parsing
from polyclinic.data.annotations import Annotation
from polyclinic.data.catalog import dataset_catalog
from polyclinic.data.examples import DataError
from polyclinic.data.files import placed
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
}
"""What ``kind`` may be: the module and the class of the source. Options are the class's fields."""


def _sites(value: Any) -> str | Partition:
    """A column's name, or a made-up partition from its table ``{partition = "dirichlet", count = 8}``."""
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
    """Three shares, or ``"official"``."""
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
    """Which data a study is about. Further keys are the source's own options, such as ``size`` and ``mm``.

    Attributes:
        use: A data set of the catalog (``polyclinic data list``).
        path: A folder or file of your own; ``~`` and ``$VARIABLES`` are filled in.
        kind: What lies at ``path``; a key of ``KINDS``.
        plan: The file of a ``DataPlan`` (``polyclinic data plan`` writes it), whose preprocessing is used.
        sites: ``"natural"`` for the source's own hospitals or scanners, another column's name, or a partition that
            makes sites up.
        split: Shares of training, validation and test, or ``"official"`` for the source's own split.
        external: Sites that nobody trains on; all their data are test data.
        min_patients: Sites with fewer patients are left out, and named.
        max_patients: At most this many patients a site, drawn at random.
        unlabeled: The share of each site's training patients whose labels are withheld (role ``"unlabeled"``).
        annotations: By site, what its training data are annotated with where that is not all there is: ``"boxes"`` or
            ``"labels"`` (of whole images) instead of masks, or ``"none"``.
        public: Sites whose images are nobody's patients: every site and the server hold them, without targets.
        accelerate: By how much acquisition was accelerated, for reconstruction: the full image is the target; 0 for
            not at all. ``center``: the share of k-space around its middle that is always measured.
        position: The column that says how high in its volume a slice lies. ``video``: which video a frame is of.
        scanners: The strength of imaginary scanners, one per site, that change its images; 0 for none.
        duplicates: Whether equal inputs are reported, dropped (test data keep theirs), or refused.
        near_duplicates: Whether nearly equal images are looked for and reported, or refused where two roles share them.
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
        """The source's own options, as given."""
        return dict(self.model_extra or {})

    @property
    def partition(self) -> Partition | None:
        """How sites are made up, or None where they are real."""
        return None if isinstance(self.sites, str) else self.sites

    def source(self) -> Source:
        """Where the examples come from. Reads nothing yet."""
        own = self.options
        if self.plan is None:
            return source_of(self.use, self.path, self.kind, own)
        planned = DataPlan.options(placed(self.plan, "plan"), own)
        try:
            return source_of(self.use, self.path, self.kind, planned)
        except ValidationError as error:
            says = [
                f"it was made for {'images' if 'steps' in planned else 'a table'}, which this data is not"
                if line["loc"] in (("steps",), ("statistics",), ("declared",)) and "unknown key" in line["msg"]
                else f"{'.'.join(map(str, line['loc']))}: {line['msg']}"
                for line in error.errors()
            ]
            raise DataError([f'plan = "{self.plan}": {one}' for one in dict.fromkeys(says)]) from None

    @model_validator(mode="wrap")
    @classmethod
    def _whole(cls, value: Any, handler: Handler["DataSpec"]) -> "DataSpec":
        """Checks the table and the source's options in one pass."""
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
    """The source that a ``[data]`` table names, with its ``own`` options.

    Raises:
        ValidationError: With every problem, by key.
    """
    if use is None and kind is None:
        says = 'name a data set with use = "..." (`polyclinic data list` shows them), or give a path and its kind'
        raise config_parsing.problems([config_parsing.problem(("use",), says, use)])
    given, about = dict(own) if path is None else {**own, "path": path}, None
    if use is not None:
        if kind is not None:
            says = f'is given beside use = "{use}": the catalog knows what kind it is, so leave one of them out'
            raise config_parsing.problems([config_parsing.problem(("kind",), says, kind)])
        try:
            kind, given, about = dataset_catalog.resolve(use, path, own)
        except DataError as error:
            raise config_parsing.problems(
                [config_parsing.problem(("use",), says, use) for says in error.problems]
            ) from None
    if kind not in KINDS:
        says = f'no kind of data is called "{kind}".{config_parsing.choices(str(kind), KINDS, "There are")}'
        raise config_parsing.problems([config_parsing.problem(("kind",), says, kind)])
    module, name = KINDS[kind]
    source: Source = config_parsing.build(getattr(importlib.import_module(module), name), given, f'"{use or kind}"')
    if about is not None and hasattr(source, "about"):
        source = dataclasses.replace(source, about=about)  # type: ignore[type-var]
    return source


def _together(spec: DataSpec) -> list[InitErrorDetails]:
    """What is wrong between keys that are each right."""
    found = []
    if spec.max_patients is not None and spec.max_patients < spec.min_patients:
        says = f"is below min_patients = {spec.min_patients}, so that no site would be left"
        found.append(config_parsing.problem(("max_patients",), says, spec.max_patients))
    if 0 < spec.accelerate < 1:
        says = "is how many times faster than usual: 1 or more, or 0 for images that are not to be reconstructed"
        found.append(config_parsing.problem(("accelerate",), says, spec.accelerate))
    if both := sorted({*spec.public} & {*spec.external}):
        found.append(config_parsing.problem(("public",), f"names {both[0]}, which is external as well", both[0]))
    if spec.plan is not None and (twice := [key for key in ("steps", "statistics", "declared") if key in spec.options]):
        says = f"says how data are prepared, and so does {twice[0]}: leave one of them out"
        found.append(config_parsing.problem(("plan",), says, spec.plan))
    if len(set(spec.external)) != len(spec.external):
        found.append(config_parsing.problem(("external",), "names a site twice", spec.external))
    return found
