"""``polyclinic audit release``: whether an ε covers everything that a method sends."""

import sys

from rich.markup import escape

from polyclinic.cli.rendering import Json, console, document, line


def release(target: str, *, full: bool = False, json_: Json = False) -> None:
    """Check that privacy noise covers everything that leaves a site.

    Runs the method's rounds on small synthetic data twice: unchanged, and with one patient changed. A difference in
    what leaves the site, other than through the noise, is not covered by any ε. Takes seconds, or minutes with
    --full. Exit code 1 if a method of the study is not covered, or if no setting covers the named method.

    Args:
        target: A study file, whose methods are audited with their settings; or the name of a method, including one of
            an installed package.
        full: Try more changes, in all of a site's data and at all sites.
    """
    from polyclinic.studies.audits.release_command import audit_release

    with document(json_) as emit:
        audits = audit_release(target, full)
        covered = [one.verdict.covered for one in audits]
        # A study is covered if each of its methods is; a method by its name, if some setting covers it
        good = all(covered) if target.endswith(".toml") else any(covered)
        listed = [{"label": one.label, "noise": one.noise, **one.verdict.to_json()} for one in audits]
        emit({"covered": good, "audits": listed})
        for one in audits:
            mark = "[green]✓[/green]" if one.verdict.covered else "[red]✗[/red]"
            console.print(f"  {mark} [bold]{escape(one.label)}[/bold], {escape(one.noise)}", soft_wrap=True)
            line(f"    {one.verdict.says}")
            for finding in one.verdict.findings:
                by = "" if finding.amount is None else f" (by {finding.amount:.3g})"
                line(f"    - {finding}{by}, at {finding.site}, round {finding.round}")
    if not good:
        sys.exit(1)
