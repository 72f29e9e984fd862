"""``polyclinic audit release``: whether an ε would cover everything that a method sends."""

import json
import sys

from polyclinic.cli.rendering import console


def release(target: str, *, full: bool = False, json_: bool = False) -> None:
    """Check that nothing leaves a site beside what privacy noise hides.

    Runs the method's real rounds on small synthetic data, twice: as they are, and with one patient changed. Whatever
    differs in what leaves, other than through the noise, is not covered by any ε. Takes seconds; up to minutes with
    --full. Exits with 1 if a method of the study is not covered, or the named method is covered in no way.

    Args:
        target: A study file, whose methods are audited as they stand there; or the name of a method, also one of an
            installed package.
        full: Try more changes, in all of a site's data and at all sites.
        json_: Print JSON instead.
    """
    from polyclinic.studies.audits.release_command import audit_release

    found = audit_release(target, full)
    covered = [one.verdict.covered for one in found]
    # A study is covered if each of its methods is; a method by its name, if there is a way to cover it
    good = all(covered) if target.endswith(".toml") else any(covered)
    if json_:
        audits = [{"label": one.label, "noise": one.noise, **one.verdict.to_json()} for one in found]
        print(json.dumps({"covered": good, "audits": audits}, indent=1))
    else:
        for one in found:
            mark = "[green]✓[/green]" if one.verdict.covered else "[red]✗[/red]"
            console.print(f"  {mark} [bold]{one.label}[/bold], {one.noise}")
            console.print(f"    {one.verdict.says}", soft_wrap=True, markup=False)
            for finding in one.verdict.findings:
                by = "" if finding.amount is None else f" (by {finding.amount:.3g})"
                where = f"at {finding.site}, round {finding.round}"
                console.print(f"    - {finding}{by}, {where}", soft_wrap=True, markup=False)
    if not good:
        sys.exit(1)
