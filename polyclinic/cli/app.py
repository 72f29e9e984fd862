r"""The command ``polyclinic``: its commands, and how errors end it.

Exit codes:

| code | meaning |
|---|---|
| 0 | The command succeeded. |
| 1 | The command worked and its answer is no: a check found problems, an alarm, nothing to stop. |
| 2 | A mistake that the user can correct, such as a wrong option, file or setting. The message says how. |
| 3 | ``polyclinic stop`` ended the run; ``--resume`` continues it. |
| 70 | A bug in Polyclinic. The message names a file with the traceback. |
| 130, 143 | Ctrl-C (SIGINT) or SIGTERM ended the command. |
| 141 | The reader of the output closed it, as in ``polyclinic methods \| head``. |
"""

import errno
import logging
import os
import platform
import shlex
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter

from polyclinic import __version__
from polyclinic.cli.rendering import set_up_logging, set_up_streams
from polyclinic.errors import MissingDependency, PolyclinicError

log = logging.getLogger(__name__)
EPILOGUE = """Exit codes: 0 success; 1 the answer is no (a check found problems, an alarm); 2 a mistake to correct, such
as a wrong option, file or setting; 3 stopped by polyclinic stop; 70 a bug; 130 or 143 ended by Ctrl-C or SIGTERM;
141 the reader of the output closed it.

Completion of commands and options in the shell: polyclinic --install-completion. Any command takes --help."""
_EXTRAS = {
    "zstandard": "privacy",
    "dp_accounting": "privacy",
    "nvflare": "flare",
    "tenseal": "he",
    "onnx": "export",
    "onnxscript": "export",
    "captum": "explain",
    "mlflow": "track",
    "tensorboardX": "track",
    "pydicom": "dicom",
    "dicomanonymizer": "dicom",
    "h5py": "fastmri",
    "pyarrow": "tables",
}
_CORRECTABLE = {
    errno.ENOENT: "Check the path",
    errno.EACCES: "Ask for the permission, or name another path",
    errno.EPERM: "Ask for the permission, or name another path",
    errno.EISDIR: "Name a file",
    errno.ENOTDIR: "Name a folder whose parents are folders",
    errno.EEXIST: "Name a path that does not exist yet",
    errno.EROFS: "Name a path on a writable disk",
    errno.ENAMETOOLONG: "Name a shorter path",
    errno.ELOOP: "Name a path without circular links",
    errno.ENOSPC: "Free some disk space; polyclinic run --resume continues a run",
    errno.EDQUOT: "Free some disk space; polyclinic run --resume continues a run",
    errno.ENOTEMPTY: "Name an empty folder",
    errno.EXDEV: "Name a path on the same disk",
}

app = App(
    name="polyclinic",
    help="Federated learning for medical image analysis: many clinics, one model, no image leaves its hospital.",
    version=__version__,
    help_epilogue=EPILOGUE,
    suppress_keyboard_interrupt=False,
)
_STUDIES, _LISTS, _DATA = "Studies", "What there is", "Data and privacy"
_HOSPITALS = "Between hospitals"
_OUTPUT, _SHELL = Group("Output of every command", sort_key=100), Group("Shell", sort_key=101)
study = App(name="study", group=_STUDIES, help="The same commands as one group, such as polyclinic study run.")
for group, name, target, summary in (
    (_STUDIES, "demo", "run:demo", "Run a study of real patients at several sites, and open its report."),
    (_STUDIES, "new", "run:new", "Write a commented study file to begin from."),
    (_STUDIES, "run", "run:run", "Run a study."),
    (_STUDIES, "report", "run:report", "Write the report of a run."),
    (_STUDIES, "status", "run:status", "How far a run has come."),
    (_STUDIES, "stop", "run:stop", "Stop a run after the round under way."),
    (_STUDIES, "standing", "outliers:standing", "How each site's updates stood, and how to leave one out."),
    (_STUDIES, "compare", "results:compare", "Compare methods of several runs, paired."),
    (_STUDIES, "panel", "results:panel_app", "Rank methods over several data sets, and run all of them."),
    (_STUDIES, "track", "results:track", "Hand a run's records on to MLflow or TensorBoard."),
    (_STUDIES, "explain", "explain:explain", "What a run's model looks at, at every site."),
    (_STUDIES, "export", "results:export", "Write a model for other tools: MONAI bundle, ONNX, torch.export."),
    (_LISTS, "methods", "catalog:methods_app", "The federated methods, by the survey's taxonomy."),
    (_LISTS, "networks", "catalog:networks", "The networks that a study may name."),
    (_LISTS, "transforms", "catalog:transforms", "What may stand between a site and the server."),
    (_DATA, "data", "data:app", "Data sets of the field, and the check of your own."),
    (_DATA, "privacy", "privacy:app", "Plan a privacy budget, and read what was spent of one."),
    (_DATA, "vectors", "vectors:app", "One-shot merging: each site hands over one signed file."),
    (_DATA, "audit", "audit:app", "Attack a run's model, with a leaky control beside."),
    (_HOSPITALS, "server", "server:app", "Coordinate studies between hospitals."),
    (_HOSPITALS, "site", "site:app", "Take part with your own data, which stay."),
    (_HOSPITALS, "journal", "journal:app", "Check the journals of sites, servers and runs."),
):
    app.command(f"polyclinic.cli.{target}", name=name, help=summary, group=group)
    if group == _STUDIES:
        study.command(f"polyclinic.cli.{target}", name=name, help=summary)
app.command(study)
app.register_install_completion_command(name="--install-completion", group=_SHELL)


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    quiet: Annotated[bool, Parameter(negative=(), group=_OUTPUT)] = False,
    verbose: Annotated[bool, Parameter(negative=(), group=_OUTPUT)] = False,
    log_file: Annotated[Path | None, Parameter(group=_OUTPUT)] = None,
) -> Any:
    """Run a command with the options that all commands share.

    Args:
        tokens: The command and its arguments.
        quiet: Print errors, and JSON where it was asked for, and nothing else.
        verbose: Print debugging messages to standard error, and tracebacks of errors.
        log_file: Append all messages to this file, with their times.
    """
    set_up_logging(quiet, verbose, log_file)
    log.debug("polyclinic %s: %s", __version__, shlex.join(tokens))
    return app(tokens, exit_on_error=False)


def main() -> None:
    """Run the command line and exit with one of the codes above. Only a bug has a traceback, saved in a file."""
    set_up_streams()
    try:
        try:
            app.meta(sys.argv[1:], exit_on_error=False)
        finally:
            sys.stdout.flush()
    except CycloptsError:  # cyclopts has printed it
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if (says := explained(error)) is not None:
            log.debug("traceback", exc_info=error)
            print(says, file=sys.stderr)
            sys.exit(2)
        print(
            f"{type(error).__name__}: {error}. This is a bug in Polyclinic {__version__}, not a mistake of yours.\n"
            f"Please report it with this traceback: {saved_traceback(error)}",
            file=sys.stderr,
        )
        sys.exit(70)


def explained(error: BaseException) -> str | None:
    """The message for an error that the user can correct; None for a bug."""
    if isinstance(error, PolyclinicError) or type(error).__module__.startswith("polyclinic."):
        return str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and (name := (cause.name or "").split(".")[0]) in _EXTRAS:
            return str(MissingDependency(_EXTRAS[name], f"this command needs {name}"))
        cause = cause.__cause__
    if isinstance(error, OSError):
        if error.errno in _CORRECTABLE:
            place = f"{error.filename}: " if error.filename is not None else ""
            return f"{place}{error.strerror}. {_CORRECTABLE[error.errno]}"
        if error.errno is None and isinstance(error, FileNotFoundError):
            return str(error)
    return None


def saved_traceback(error: BaseException) -> str:
    """Save the traceback in a temporary file and return its path, or the traceback itself if that fails."""
    text = "".join(traceback.format_exception(error))
    command = shlex.join(["polyclinic", *sys.argv[1:]])
    text = f"polyclinic {__version__}, Python {platform.python_version()}, {platform.platform()}\n{command}\n\n{text}"
    try:
        handle, path = tempfile.mkstemp(prefix="polyclinic-traceback-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return f"\n{text}"
    return path


if __name__ == "__main__":
    main()
