"""The data check's command, and its page: one HTML file with pictures and histograms, for use at the site only.

The page shows patients' images. It is readable by its owner only, loads no external resources (its content policy
forbids it), runs no script, and escapes every text from file names.
"""

import base64
import html
import io
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from polyclinic.core import atomic
from polyclinic.data.deidentification.filename_screening import shown
from polyclinic.data.quality.site_check import KINDS, CheckReport
from polyclinic.errors import ConfigError

_STYLE = """
:root { --ink:#1c2733; --soft:#5b6b7b; --line:#d9e0e7; --paper:#fff;
  --error:#b3261e; --warning:#9a6700; --note:#0b6e8a }
@media (prefers-color-scheme: dark) { :root { --ink:#e6edf3; --soft:#9fb0c0; --line:#33414e; --paper:#12181f;
  --error:#ff8a80; --warning:#f2c14e; --note:#6fd3ee } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.stay { border: 2px solid var(--error); padding: .6rem 1rem; border-radius: .4rem; margin: 1rem 0; font-weight: 600 }
.soft { color: var(--soft) } .error b { color: var(--error) }
.warning b { color: var(--warning) } .note b { color: var(--note) }
li { margin: .35rem 0 } ul { list-style: none; padding: 0 } details { margin-left: 1rem; color: var(--soft) }
table { border-collapse: collapse } td, th { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line);
  text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums } .bars td:last-child { width: 20rem }
.bar { background: var(--note); height: .8rem; border-radius: .2rem }
.grid { display: flex; flex-wrap: wrap; gap: .8rem } figure { margin: 0; width: 96px }
img { width: 96px; height: 96px; object-fit: contain; background: #000; border-radius: .3rem }
figcaption { font-size: .7rem; color: var(--soft); overflow-wrap: anywhere }
@media print { body { max-width: none } details { display: none } }
"""
_LEVELS = {"error": "to correct", "warning": "to inspect", "note": "for information"}


def write_page(report: CheckReport, path: str | os.PathLike[str]) -> Path:
    """Write the page atomically, readable by its owner only (mode 0600).

    Raises:
        ValueError: If ``path`` is inside the data or is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a file")
    if report.root.is_dir() and report.root.resolve() in path.resolve().parents:
        raise ConfigError(f"{path} is inside the data; write the page to another folder")
    atomic.write_private(path, page(report))
    return path


def page(report: CheckReport) -> str:
    """Return the page as text."""
    return "\n".join(_parts(report))


def _text(value: object) -> str:
    return html.escape("".join(c if c.isprintable() else "?" for c in str(value)), quote=True)


def _parts(report: CheckReport) -> Iterator[str]:
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Data check</title>'
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}"><meta name="robots" content="noindex">'
    yield f"<style>{_STYLE}</style></head><body>"
    yield f"<h1>Data check: {_text(shown(report.root.name))}</h1>"
    who = "patients not known" if report.patients is None else f"{report.patients} patients"
    yield f'<p class="soft">{_text(KINDS[report.kind])} · {report.examples} examples · {who}</p>'
    yield '<p class="stay">This page shows patients\' images. Keep it at this site: do not send or upload it.</p>'
    for level, title in _LEVELS.items():
        some = [finding for finding in report.findings if finding.level == level]
        if some:
            yield f'<h2>{len(some)} {title}</h2><ul class="{level}">'
            for finding in some:
                yield f"<li><b>{_text(finding.code)}</b> {_text(finding.message)}{_files(finding.files)}</li>"
            yield "</ul>"
    if not report.findings:
        yield "<p>No problems found.</p>"
    for title, counts in (
        ("Classes", report.classes),
        ("Splits", report.splits),
        ("Sites", report.sites),
        ("Modalities", report.modalities),
        ("Orientations", report.orientations),
        ("Mask labels", report.mask_labels),
    ):
        if counts:
            yield f"<h2>{title}</h2>{_bars(counts)}"
    yield from _geometry(report)
    for units, quantiles in report.intensity.items():
        yield f"<h2>Values {_text(units)}</h2>{_histogram(quantiles)}"
    if report.pictures:
        yield '<h2>Some examples</h2><div class="grid">'
        for caption, pixels in report.pictures:
            yield f'<figure><img alt="" src="{_png(pixels)}"><figcaption>{_text(caption)}</figcaption></figure>'
        yield "</div>"
    yield "</body></html>"


def _files(names: tuple[str, ...], most: int = 200) -> str:
    if len(names) < 2:
        return f'<br><span class="soft">{_text(names[0])}</span>' if names else ""
    listed = "".join(f"<li>{_text(name)}</li>" for name in names[:most])
    more = f"<li>and {len(names) - most} more</li>" if len(names) > most else ""
    return f"<details><summary>{len(names)} files</summary><ul>{listed}{more}</ul></details>"


def _bars(counts: Counter[Any], most: int = 40) -> str:
    top = max(counts.values())
    rows = "".join(
        f'<tr><td>{_text(key)}</td><td class="n">{count}</td>'
        f'<td><div class="bar" style="width:{100 * count / top:.1f}%"></div></td></tr>'
        for key, count in counts.most_common(most)
    )
    return f'<table class="bars">{rows}</table>'


def _geometry(report: CheckReport) -> Iterator[str]:
    rows = [("Size in voxels (z, y, x)", report.sizes), ("Spacing in mm (z, y, x)", report.spacing_mm)]
    if any(spread for _, spread in rows):
        yield "<h2>Geometry</h2><table><tr><th></th><th>least</th><th>median</th><th>largest</th></tr>"
        for title, spread in rows:
            if spread:
                cells = "".join(f"<td>{' x '.join(f'{n:.4g}' for n in triple)}</td>" for triple in spread)
                yield f"<tr><td>{title}</td>{cells}</tr>"
        yield "</table>"


def _histogram(quantiles: np.ndarray[Any, Any], bins: int = 48) -> str:
    """Return a histogram drawn from quantiles: equal numbers of values are between neighbors."""
    values = np.asarray(quantiles, dtype=np.float64)
    low, high = values[1], values[-2]  # the extremes would flatten the rest
    if not high > low:
        return f"<p>one value: {values[len(values) // 2]:.4g}</p>"
    places = np.interp(np.linspace(0, 1, 4001), np.linspace(0, 1, len(values)), values)
    counts, _ = np.histogram(places, bins=bins, range=(low, high))
    tall = max(int(counts.max()), 1)
    heights = [110 * int(count) / tall for count in counts]
    bars = "".join(
        f'<rect x="{10 * i}" y="{120 - h:.1f}" width="9" height="{h:.1f}" fill="currentColor"/>'
        for i, h in enumerate(heights)
    )
    label = f'<text x="0" y="136" font-size="12" fill="currentColor">{low:.4g}</text>'
    label += f'<text x="{10 * bins}" y="136" font-size="12" fill="currentColor" text-anchor="end">{high:.4g}</text>'
    box = f'role="img" aria-label="histogram" viewBox="0 0 {10 * bins} 140" width="480" height="140"'
    return f"<svg {box}>{bars}{label}</svg>"


def _png(pixels: np.ndarray[Any, Any]) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
