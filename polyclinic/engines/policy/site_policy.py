"""Site policy: a readable TOML file, enforced at the site on the actual values.

The server cannot override it. It is read again before every message, so that a change takes effect at once. It is
checked three times: ``refusals`` before a person reviews a study, ``admit`` before anything runs, and ``release``
before anything leaves.
"""

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from polyclinic.core import serialization as states
from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.config_problems import Problem, line_of, problems_of
from polyclinic.core.execution import Refused
from polyclinic.core.method import Method, Request
from polyclinic.core.pipeline import transforms_of
from polyclinic.core.plugin_packages import RULE, Package, allows, exact_rule
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.engines.plan import Plan
from polyclinic.engines.policy.coverage import uncovered
from polyclinic.engines.policy.requirements import arrived, transform_problems, unknown_transforms
from polyclinic.engines.site_description import JOB, Describe
from polyclinic.errors import ConfigError, PolyclinicError
from polyclinic.learning.weights import store
from polyclinic.methods.plugins import packages_in
from polyclinic.methods.registry import entry

MAX_POLICY = 2**18
EVALUATED = ("val", "test")
MODEL_PARTS = ("update", "change", "model", "gradient")
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=10**12)]
Amount = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]

DEFAULT = Path(__file__).with_name("policy.toml").read_text(encoding="utf-8")


class BadPolicy(ConfigError):
    """An invalid policy file. The message lists every problem."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Approve(_Table):
    """Hashes of methods that are approved without a person's review."""

    automatically: tuple[Hash, ...] = ()


class Allow(_Table):
    """Jobs that may run, and values that may leave."""

    jobs: tuple[str, ...] = ("*",)
    never: tuple[str, ...] = ("predict/*", "show/*")
    stats: tuple[str, ...] = ("WeightedMean", "ElementwiseMean")
    gather: tuple[str, ...] = ("score", "describe")
    packages: tuple[Annotated[str, Field(pattern=RULE)], ...] = ()
    weights: tuple[Annotated[str, Field(pattern=r"^(\*|[0-9a-f]{64})$")], ...] = ("*",)
    class_names: bool = False


class Require(_Table):
    """Conditions that every reply must meet."""

    transforms: tuple[dict[str, str | float | int], ...] = ()
    secure: bool = False
    min_sites: Count = 3


class Limits(_Table):
    """Numerical limits."""

    min_patients: Count = 10
    min_cell: Count = 5
    megabytes_per_round: Amount = 2000.0
    weights_megabytes: Amount = 0.0
    rounds: Count = 2000
    epochs: Count = 100
    steps: Count = 100_000
    learning_rate: Amount = 10.0


class Privacy(_Table):
    """Privacy budget of each unit, over all studies with these data, without expiry."""

    epsilon: Annotated[float, Field(gt=0, le=1e6)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    unit: Literal["record", "patient", "site"] = "patient"


class Policy(_Table):
    """The content of a policy file."""

    approve: Approve = Approve()
    allow: Allow = Allow()
    require: Require = Require()
    limits: Limits = Limits()
    privacy: Privacy | None = None

    def refusals(self, plan: Plan, sent: Mapping[str, Any] | None = None) -> list[str]:
        """Return why this policy would refuse ``plan``, one sentence per reason.

        Args:
            plan: The plan.
            sent: Start weights that the server would send (``RunRequest.weights``). If they are allowed and not here,
                the rest cannot be checked before they are.

        Raises:
            ValueError: If the plan cannot be built.
        """
        packages = packages_in(asdict(plan))
        if refused := self.package_problems(packages):
            return refused  # building the method would import the package
        refused = self.weights_problems(plan, sent or {})
        if refused or awaited(plan):
            return refused  # the network cannot be built without them
        method = plan.build_method()
        found = [*_plan_problems(self, plan), *transform_problems(self.require.transforms, transforms_of(method))]
        if self.privacy and not plan.private and entry(plan.method).leaves != "nothing":
            found.append(
                "replies must contain noise that the site's privacy budget can account for (privacy): train with "
                "DPSGD, or use clip and gaussian in the uplink"
            )
        if plan.private and (reason := uncovered(plan)):
            found.append(f"{reason} (privacy)")
        return found

    def package_problems(self, packages: Iterable[Package]) -> list[str]:
        """Return why this policy would not run code of ``packages``, one sentence per reason."""
        return [
            f"the plan needs the package {package.name} {package.version}, whose code the policy does not allow; "
            f'allow.packages = ["{exact_rule(package)}"] would allow the installed version'
            for package in packages
            if not any(allows(rule, package) for rule in self.allow.packages)
        ]

    def weights_problems(self, plan: Plan, sent: Mapping[str, Any]) -> list[str]:
        """Return why start weights of ``plan`` cannot be used at this site, one sentence per reason.

        Args:
            plan: The plan.
            sent: Start weights that the server would send; empty for none.
        """
        sha256 = _weights_of(plan)
        if not sha256:
            return []
        if not {"*", sha256} & {*self.allow.weights}:
            return [f"the plan needs the start weights {sha256}, which the policy does not allow (allow.weights)"]
        try:
            store.find(sha256)
        except PolyclinicError as error:
            if sent.get("sha256") != sha256 or not isinstance(error, store.UnknownWeights):
                return [str(error)]
            size, most = sent["bytes"] / 1e6, self.limits.weights_megabytes
            if size > most:
                return [
                    f"the start weights {sha256[:12]}... are not here, the server would send {size:.1f} MB, and the "
                    f"policy allows {most:g} (limits.weights_megabytes); `polyclinic site weights add` adds a file"
                ]
        return []

    def model_problems(self, models: Iterable[str]) -> list[str]:
        """Return why models that the preprocessing applies cannot be used at this site, one sentence per reason."""
        found = []
        for sha256 in models:
            if not {"*", sha256} & {*self.allow.weights}:
                found.append(f"the steps need the model {sha256}, which the policy does not allow (allow.weights)")
                continue
            try:
                store.find(sha256)
            except PolyclinicError as error:
                found.append(f"the steps need a model: {error}")
        return found

    def survey_problems(self) -> list[str]:
        """Return why this policy would refuse to describe the site's data, one sentence per reason."""
        found = []
        if not _matches(JOB, self.allow.jobs) or _matches(JOB, self.allow.never):
            found.append(f"the job {JOB!r} does not run here (allow.jobs, allow.never)")
        if not _matches(JOB, self.allow.gather):
            found.append(f"{JOB!r} does not leave (allow.gather)")
        return found


def read(path: Path) -> Policy:
    """Read the policy file at ``path``.

    Raises:
        BadPolicy: If it is not valid. The message lists every problem.
    """
    if not path.is_file():
        raise BadPolicy(
            f"{path} does not exist, and without a policy nothing runs: `polyclinic site policy --reset` writes one"
        )
    with open(path, "rb") as file:
        data = file.read(MAX_POLICY + 1)
    return parse(data, str(path))


def parse(data: bytes, where: str = "policy.toml") -> Policy:
    """Parse the policy in ``data``; ``where`` names it in messages.

    Raises:
        BadPolicy: If it is not valid. The message lists every problem.
    """
    if len(data) > MAX_POLICY:
        raise BadPolicy(f"{where} is larger than {MAX_POLICY} bytes")
    try:
        text = data.decode()
        table = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadPolicy(f"{where}: {error}") from None
    try:
        policy = Policy.model_validate(_tuples(table))
    except RecursionError:
        raise BadPolicy(f"{where}: nested too deeply") from None
    except ValidationError as error:
        raise _bad(where, text, table, problems_of(error.errors(), Policy)) from None
    if wrong := list(unknown_transforms(policy.require.transforms)):
        raise _bad(where, text, table, [Problem(("require", "transforms"), says) for says in wrong])
    return policy


def _bad(where: str, text: str, table: Any, problems: Iterable[Problem]) -> BadPolicy:
    return BadPolicy("\n".join(f"{where}:{line_of(text, p.path)}: {p.located(table)}: {p.says}" for p in problems))


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Enforced:
    """Enforces a policy for one study at one site. Implements ``core.execution.Policy``.

    Attributes:
        policy: The policy.
        plan: The plan of the study.
        sent: Bytes that left the site in this round before this message.
    """

    policy: Policy
    plan: Plan
    sent: int = 0

    def admit(self, method: Method[Any], request: Request, site: Site) -> None:
        """Check a request before it is executed.

        Raises:
            Refused: If the policy does not allow it. The message lists every reason.
        """
        if isinstance(method, Describe):
            found = self.policy.survey_problems()
        else:
            found = [*self.policy.refusals(self.plan), *_ask_problems(self.policy, self.plan, method, request, site)]
        if found:
            raise Refused("; ".join(found))

    def release(self, method: Method[Any], request: Request, reply: Reply, site: Site) -> None:
        """Check a reply before it leaves the site.

        Raises:
            Refused: If the policy does not allow it. The message lists every reason.
        """
        found = list(_reply_problems(self.policy, reply, site.name, self.sent))
        if found := [*found, *_shape_problems(self.plan, method, reply)]:
            raise Refused("; ".join(found))


def _plan_problems(policy: Policy, plan: Plan) -> Iterator[str]:
    limits, local = policy.limits, plan.build_local()
    for what, value, most in (
        ("rounds", plan.rounds, limits.rounds),
        ("epochs in a round", local.epochs if local.steps is None else 0, limits.epochs),
        ("steps in a round", local.steps or 0, limits.steps),
        ("learning_rate", local.lr, limits.learning_rate),
    ):
        if value > most:
            yield f"{value:g} {what.replace('_', ' ')}, and the policy allows {most:g} (limits.{what.split()[0]})"


def _ask_problems(policy: Policy, plan: Plan, method: Method[Any], request: Request, site: Site) -> Iterator[str]:
    allow, limits = policy.allow, policy.limits
    if not _matches(request.job, allow.jobs):
        yield f"the job {request.job!r} is not among those that the policy allows (allow.jobs)"
    if _matches(request.job, allow.never):
        yield f"the job {request.job!r} never runs here (allow.never)"
    if not 0 <= request.round < plan.rounds + 1:
        yield f"round {request.round} is beyond the study's {plan.rounds} rounds"
    verb, _, role = request.job.partition("/")
    scored = verb in ("score", "predict", "explain", "show")
    if scored and role not in EVALUATED:
        yield f"models are scored on {' and '.join(EVALUATED)} data alone, and never on {role[:80]!r}"
    if (patients := count_patients(site.data.get(role if scored else "train", ()))) < limits.min_patients and not (
        scored and not patients
    ):
        yield f"fewer than {limits.min_patients} patients here (limits.min_patients)"
    hides = any(t.secure for t in transforms_of(method))
    if hides and not scored and not request.secure:
        yield "the study specifies secure aggregation, and the server requests the plain reply"
    if policy.require.secure and not scored and not request.secure:
        yield "the policy allows secure sums only (require.secure)"
    if (size := request.nbytes(site.name)) > limits.megabytes_per_round * 1e6:
        most = limits.megabytes_per_round
        yield f"a message of {size / 1e6:.0f} MB, and the policy allows {most:g} (limits.megabytes_per_round)"
    try:
        yield from _model_problems(plan, arrived(method, request).trees.get("params", {}))
    except ValueError as error:
        yield f"the server's message cannot be read: {error}"


def _model_problems(plan: Plan, params: Tree) -> Iterator[str]:
    """Yield why ``params`` cannot be those of the approved model: another architecture, or not finite."""
    known = _known_shapes(plan)
    for name, leaf in params.items():
        if name not in known:
            yield f"the server's model has a tensor {name[:80]!r}, which the approved model does not have"
            return
        if tuple(leaf.shape) != known[name]:
            yield f"the server's {name[:80]!r} has the shape {tuple(leaf.shape)}, the approved model's {known[name]}"
            return
    if not tree.finite(params):
        yield "the server's model contains NaN or infinity"


_known: dict[str, Mapping[str, tuple[int, ...]]] = {}


def _known_shapes(plan: Plan) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the approved model's tensors by name.

    If the method predicts with another task, these include the shapes of that task's model and of the initial model.
    """
    if plan.hash not in _known:
        method = plan.build_method()
        models = [plan.build_task().first(0)]
        if method.prediction_task is not None:
            begun = method.request(method.init(models[0]))
            models += [method.prediction_task.first(0), arrived(method, begun).trees.get("params", {}) if begun else {}]
        _known[plan.hash] = {name: tuple(leaf.shape) for model in models for name, leaf in model.items()}
    return _known[plan.hash]


def _reply_problems(policy: Policy, reply: Reply, site: str, sent: int) -> Iterator[str]:
    for part, stat in reply.parts.items():
        kind = states.kind_of(stat)
        if isinstance(stat, PerSite):
            if not _matches(part, policy.allow.gather):
                yield (
                    f"{part!r} would leave as a {kind}, which the server sees separately from other sites' values "
                    "(allow.gather lists the permitted parts)"
                )
            if list(stat.items) != [site]:
                yield f"{part!r} contains values of {sorted(stat.items)}, not of {site} alone"
        elif kind not in policy.allow.stats:
            yield f"{part!r} would leave as a {kind}, which the policy does not allow (allow.stats)"
    most = policy.limits.megabytes_per_round * 1e6
    if sent + reply.nbytes > most:
        yield (
            f"{(sent + reply.nbytes) / 1e6:.0f} MB would have left in this round, and the policy allows "
            f"{most / 1e6:g} (limits.megabytes_per_round)"
        )


def _shape_problems(plan: Plan, method: Method[Any], reply: Reply) -> Iterator[str]:
    """Yield why ``reply`` does not have the approved size: a part of the model in another shape, or more outputs."""
    if not all(t.dense and t.additive for t in transforms_of(method)):
        return  # encoded: only the bytes of a round are limited
    known = _known_shapes(plan)
    for part, leaves in _leaves(reply):
        wrong = [name for name, leaf in leaves.items() if name in known and tuple(leaf.shape) != known[name]]
        if part in MODEL_PARTS and leaves.keys() <= known.keys() and wrong:
            yield f"{part}: {wrong[0][:80]!r} would leave in another shape than the approved model's {known[wrong[0]]}"
        scores = leaves.get("score") if part == "predict" else None
        outputs = scores.shape[1] if scores is not None and scores.ndim == 2 else 0
        if outputs > plan.outputs:
            yield f"{outputs} outputs for each patient would leave, and {plan.outputs} were approved"


def _leaves(reply: Reply) -> Iterator[tuple[str, Tree]]:
    """Yield the trees of a reply by the method's own part names, whether or not it passed through transforms."""
    for part, stat in reply.parts.items():
        for leaves in stat.items.values() if isinstance(stat, PerSite) else (stat.total,):
            if part != "sent":
                yield part, leaves
                continue
            split: dict[str, dict[str, Tensor]] = {}
            for name, leaf in leaves.items():
                kind, _, rest = name.partition("/")
                own, _, bare = rest.partition("/")
                if kind == "m":
                    split.setdefault(own, {})[bare] = leaf
            yield from split.items()


def awaited(plan: Plan) -> str:
    """Return the hash of start weights that ``plan`` needs and this site does not have; empty if there are none."""
    sha256 = _weights_of(plan)
    try:
        if sha256:
            store.find(sha256)
    except store.UnknownWeights:
        return sha256
    return ""


def _weights_of(plan: Plan) -> str:
    """Return the hash of the start weights that ``plan`` names; empty if it names none."""
    wanted = plan.tuning.get("weights", {})
    return str(wanted.get("sha256", "")) if isinstance(wanted, Mapping) else ""


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def count_patients(data: Any) -> int:
    """Return the number of patients in ``data``, or of examples if it has no patient names."""
    patients = getattr(data, "patients", None)
    return len(set(patients)) if patients is not None else len(data)
