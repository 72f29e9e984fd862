"""The command ``polyclinic``: its commands, its exit codes (``EXIT_CODES``), and how errors end it."""

import errno
import gc
import logging
import os
import platform
import shlex
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, Parameter

from polyclinic import __version__
from polyclinic.cli.rendering import note_invocation, set_up_logging, set_up_streams
from polyclinic.errors import MissingDependency, PolyclinicError

log = logging.getLogger(__name__)
EXIT_CODES = (
    ("0", "The command succeeded."),
    ("1", "The command worked, and the answer is no: a check found problems, data have drifted, nothing ran."),
    ("2", "A mistake to correct, such as a wrong option, file or setting. The message says what to do."),
    ("3", "`polyclinic stop` ended the run; `--resume` continues it."),
    ("70", "A bug in Polyclinic. The message names a file with the traceback."),
    ("130, 143", "Ctrl-C (SIGINT) or SIGTERM ended the command."),
    ("141", "The reader of the output closed it, as in `polyclinic methods | head`."),
)
EPILOGUE = "\n\n".join(
    [
        "Exit codes: " + " ".join(f"{code}: {meaning}" for code, meaning in EXIT_CODES),
        "Completion of commands and options in the shell: polyclinic --install-completion. Any command takes --help.",
    ]
)
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
    "openpyxl": "tables",
    "starlette": "console",
    "uvicorn": "console",
}
_CORRECTABLE = {
    errno.ENOENT: "Check the path",
    errno.EACCES: "Ask for permission, or name another path",
    errno.EPERM: "Ask for permission, or name another path",
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
    help="Federated learning for medical image analysis: hospitals train one model, and no image leaves its hospital.",
    version=__version__,
    help_epilogue=EPILOGUE,
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(negative=()),
)
_STUDIES, _LISTS, _DATA = "Studies", "Catalogs", "Data and privacy"
_HOSPITALS = "Between hospitals"
_OUTPUT, _SHELL = Group("Output of every command", sort_key=100), Group("Shell", sort_key=101)
study = App(name="study", group=_STUDIES, help="The same commands as one group, such as polyclinic study run.")
for group, name, target, summary in (
    (_STUDIES, "demo", "run:demo", "Run a small study of real patients at several sites, and write its report."),
    (_STUDIES, "new", "run:new", "Write a commented study file as a starting point."),
    (
        _STUDIES,
        "plan",
        "data:case_plan",
        "Plan preprocessing, patch and network as nnU-Net does, from sums over sites.",
    ),
    (_STUDIES, "run", "run:run", "Run a study and write its report."),
    (_STUDIES, "report", "run:report", "Write the report of a run."),
    (_STUDIES, "status", "run:status", "Show the progress of a run."),
    (_STUDIES, "stop", "run:stop", "Stop a run after the current round."),
    (
        _STUDIES,
        "console",
        "run:show_console",
        "Show a folder of runs in the browser, and start, stop and compare runs there.",
    ),
    (_STUDIES, "outliers", "outliers:outliers", "Show how far each site's updates differ from the others'."),
    (_STUDIES, "compare", "results:compare", "Compare methods of several runs, paired by test patient."),
    (_STUDIES, "plan-size", "results:plan_size", "Plan how many test patients and sites would show a difference."),
    (_STUDIES, "panel", "results:panel_app", "Rank methods over several data sets."),
    (_STUDIES, "track", "results:track", "Copy a run's records to MLflow or TensorBoard."),
    (_STUDIES, "predict", "models:predict", "Apply a run's model to new images."),
    (_STUDIES, "evaluate", "models:evaluate", "Evaluate a trained model on the data of a study, at each of its sites."),
    (_STUDIES, "explain", "results:explain", "Compute attribution maps of a run's model at every site."),
    (_STUDIES, "pictures", "results:pictures", "Draw the best, median and worst test case of every site."),
    (_STUDIES, "export", "results:export", "Write a model for other tools: MONAI bundle, ONNX, torch.export."),
    (_LISTS, "methods", "catalog:methods_app", "List the federated methods, by the survey's taxonomy."),
    (_LISTS, "networks", "catalog:networks", "List the networks that a study can name."),
    (_LISTS, "transforms", "catalog:transforms", "List the transforms of what travels between sites and server."),
    (_LISTS, "weights", "weights:app", "Add, list and check start weights of pretrained networks."),
    (_DATA, "data", "data:app", "Find public data sets, and check, plan and de-identify your own data."),
    (_DATA, "privacy", "privacy:app", "Plan a privacy budget, and read what was spent."),
    (_DATA, "vectors", "vectors:app", "Merge models once, from one signed file per site."),
    (_DATA, "audit", "audit:app", "Attack a run's model to measure what it reveals about patients."),
    (_HOSPITALS, "server", "server:app", "Coordinate studies between hospitals."),
    (_HOSPITALS, "site", "site:app", "Take part in studies with local data, which never leave."),
    (_HOSPITALS, "journal", "journal:app", "Verify the journals of sites, servers and runs."),
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
    log_format: Annotated[Literal["text", "json"], Parameter(group=_OUTPUT)] = "text",
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Parameter(group=_OUTPUT)] = "debug",
) -> Any:
    """Run a command with the options that all commands share.

    Args:
        tokens: The command and its arguments.
        quiet: Print no progress and no hints. Results and errors are printed.
        verbose: Print debugging messages to standard error, and tracebacks of errors.
        log_file: Append all messages to this file, with their times.
        log_format: Of the file: text, or one JSON object a line, without the texts of exceptions, which may quote data.
        log_level: The lowest level of messages in the file.
    """
    set_up_logging(quiet, verbose, log_file, log_format, log_level)
    given = {"--log-file": log_file, "--log-format": log_format, "--log-level": log_level}
    usual = {"--log-file": None, "--log-format": "text", "--log-level": "debug"}
    shared = ["--quiet"] * quiet + ["--verbose"] * verbose
    shared += [word for key, value in given.items() if value != usual[key] for word in (key, str(value))]
    note_invocation([*tokens, *shared])
    log.debug("polyclinic %s: %s", __version__, shlex.join(tokens))
    return app(tokens, exit_on_error=False)


def main() -> None:
    """Run the command line and exit with one of ``EXIT_CODES``. Only a bug has a traceback, saved in a file."""
    # PyTorch requests large tensors in pages of 2 MB (Linux): every round allocates tensors of the model's size, and
    # most of that time is spent on pages of 4 kB. PyTorch reads the variable at its first tensor, here and in workers.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    gc.set_threshold(100_000, 20, 20)  # the default examines the objects of imports and reports hundreds of times
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
        if (message := explained(error)) is not None:
            log.debug("traceback", exc_info=error)
            print(message, file=sys.stderr)
            sys.exit(2)
        print(
            f"{type(error).__name__}: {error}. This is a bug in Polyclinic {__version__}, not a mistake of yours.\n"
            f"Please report it with this traceback: {saved_traceback(error)}",
            file=sys.stderr,
        )
        sys.exit(70)


def explained(error: BaseException) -> str | None:
    """Return the message of an error that the user can correct; None for a bug."""
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
