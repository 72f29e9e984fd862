"""Exceptions. Every error that a user can correct is a ``PolyclinicError``; any other exception is a bug.

Each message says what is wrong, where (file, field, site), and what to do. The command line prints these messages
without a traceback and exits with code 2; see ``polyclinic.cli.app`` for all exit codes.

```
PolyclinicError
├── ConfigError          a study, policy, run request or option that is not valid
├── DataError            data that cannot be found, read or used
├── MissingDependency    an optional package that is not installed
├── PolicyRefusal        an action that a policy, a limit or a privacy budget forbids
├── ProtocolError        a message that does not follow the protocol
├── IntegrityError       a file or journal that was damaged, altered or forged
└── RunError             a run that cannot start, continue or be used
```
"""

from collections.abc import Sequence


class PolyclinicError(Exception):
    """Base class of all errors that a user, an operator or another site can correct."""


class ConfigError(PolyclinicError, ValueError):
    """A study, policy, run request, option or argument is not valid."""


class DataError(PolyclinicError, ValueError):
    """Data, or the ``[data]`` table of a study, cannot be used.

    Attributes:
        problems: Every problem, one sentence each.
    """

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class MissingDependency(PolyclinicError, ImportError):
    """A package of one of Polyclinic's extras is not installed.

    Attributes:
        extra: The extra that installs it.
        purpose: The feature that needs it, with its verb: "explanations need captum".
    """

    def __init__(self, extra: str, purpose: str) -> None:
        self.extra, self.purpose = extra, purpose
        super().__init__(f'{purpose}, which is not installed: pip install "polyclinic[{extra}]"')

    def __reduce__(self) -> tuple[type["MissingDependency"], tuple[str, str]]:
        """Rebuild from extra and purpose, since worker processes send errors to their parent."""
        return type(self), (self.extra, self.purpose)


class PolicyRefusal(PolyclinicError):
    """An action that a site's policy, a limit or a privacy budget forbids."""


class ProtocolError(PolyclinicError, ValueError):
    """A message that does not follow the protocol. The message of the error names the sender and the reason."""


class IntegrityError(PolyclinicError, ValueError):
    """A file, journal or signature that was damaged, altered or forged."""


class RunError(PolyclinicError, RuntimeError):
    """A run that cannot start, continue, or be used for the requested purpose."""
