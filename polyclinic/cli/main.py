"""The command ``polyclinic``: what there is, and how a mistake is told."""

import logging
import os
import sys

from cyclopts import App

from polyclinic import __version__

app = App(
    name="polyclinic",
    help="Federated learning for medical image analysis: many clinics, one model, no image leaves its hospital.",
    version=__version__,
)
_STUDIES, _LISTS, _DATA = "Studies", "What there is", "Data and privacy"
_HOSPITALS = "Between hospitals"
study = App(name="study", group=_STUDIES, help="The same commands as one group, such as polyclinic study run.")
for group, name, target, summary in (
    (_STUDIES, "demo", "run:demo", "Run a study of real patients at several sites, and open its report."),
    (_STUDIES, "new", "run:new", "Write a commented study file to begin from."),
    (_STUDIES, "run", "run:run", "Run a study."),
    (_STUDIES, "report", "run:report", "Write the report of a run."),
    (_STUDIES, "status", "run:status", "How far a run has come."),
    (_STUDIES, "stop", "run:stop", "Stop a run after the round under way."),
    (_STUDIES, "standing", "standing:standing", "How each site's updates stood, and how to leave one out."),
    (_STUDIES, "compare", "results:compare", "Compare methods of several runs, paired."),
    (_STUDIES, "panel", "results:panel_app", "Rank methods over several data sets, and run all of them."),
    (_STUDIES, "track", "results:track", "Hand a run's records on to MLflow or TensorBoard."),
    (_STUDIES, "explain", "explain:explain", "What a run's model looks at, at every site."),
    (_STUDIES, "export", "results:export", "Write a model for other tools: MONAI bundle, ONNX, torch.export."),
    (_LISTS, "methods", "lists:methods_app", "The federated methods, by the survey's taxonomy."),
    (_LISTS, "networks", "lists:networks", "The networks that a study may name."),
    (_LISTS, "transforms", "lists:transforms", "What may stand between a site and the server."),
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


def main() -> None:
    """Runs the command line. A mistake of the user's is told in its own words, without a traceback."""
    logging.getLogger("polyclinic").addHandler(logging.NullHandler())
    try:
        app(sys.argv[1:])
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not type(error).__module__.startswith("polyclinic.") and not isinstance(error, FileNotFoundError):
            raise
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
