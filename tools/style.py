"""Checks spelling and wording: ``python tools/style.py`` prints counts, and fails if any exceeds its baseline.

Spelling is checked by codespell (American English). The patterns are those that docs/style.md rules out. Options:

    --max N      Fail if the sum of an area's findings exceeds N, instead of reading the baseline.
    --update     Write the present counts as the baseline.
    --list NAME  Print each finding of one pattern.
"""

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASELINE = ROOT / "tools" / "style_baseline.toml"
AREAS = ("polyclinic", "tests", "benchmarks", "examples", "tools", "docs", "deploy", "project")
OWN = ("tools/style.py", "docs/style.md", "tools/style_baseline.toml")
"""Files that quote what they rule out."""

WORDS = r"\b(?:whom|whoever|whosoever|nobody|stands?|standing|beside|told|said|elsewhere)\b"
PATTERNS = {
    "words": re.compile(WORDS, re.I),
    "where-there": re.compile(r"\bwhere (?:there (?:is|are)|it is at hand|nothing)\b", re.I),
    "how-many": re.compile(r"\b(?:as many as there are|so many|no more than that)\b", re.I),
    "personification": re.compile(
        r"\b(?:knows of|speaks|hears|listens to|remembers|forgets|promises|wants to|hands? (?:out|over|on)|lets? go of)\b",
        re.I,
    ),
    "archaic": re.compile(
        r"\b(?:but for|save for|lest|thereof|wherein|aught|hence|thus|no longer than|goes on)\b", re.I
    ),
    "raises-where": re.compile(r"^\s+\w+: Where ", re.M),
}
CODE = re.compile(r"``[^`]*``|`[^`\n]*`")


def files() -> list[Path]:
    """Return the text files under version control."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    kinds = (".py", ".md", ".toml", ".yaml", ".yml", ".html", ".css", ".js", ".cff", "Makefile")
    ours = [name for name in listed if name.endswith(kinds) and name not in OWN and "/vendor/" not in name]
    return [ROOT / name for name in ours if (ROOT / name).is_file()]


def area(path: Path) -> str:
    """Return the area of a file: its top folder."""
    top = path.relative_to(ROOT).parts[0]
    return top if top in AREAS else "project"


def prose(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield the passages of a file that people read, each with its first line and whether it is a docstring.

    Of Python: docstrings, comments, and texts of more than two words. Of other files: everything outside code.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        if path.suffix == ".md":
            text = re.sub(r"^```.*?^```", lambda found: "\n" * found[0].count("\n"), text, flags=re.M | re.S)
        yield 1, text, False
        return
    docstrings = set()
    tree = ast.parse(text)
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        for statement in getattr(node, "body", ()) if isinstance(getattr(node, "body", ()), list) else ():
            if (
                isinstance(statement, ast.Expr)
                and isinstance(statement.value, ast.Constant)
                and isinstance(statement.value.value, str)
            ):
                docstrings.add(id(statement.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) and isinstance(p.value, str) else "…" for p in node.values]
            if " " in (whole := "".join(parts)):
                yield node.lineno, whole, False
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in inside
            and node.value.count(" ") >= 2
        ):
            yield node.lineno, node.value, id(node) in docstrings
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string, False


def wording() -> dict[str, list[tuple[Path, int, str]]]:
    """Return what each pattern matches: file, line and words."""
    findings = defaultdict(list)
    for path in files():
        for first, text, docstring in prose(path):
            plain = CODE.sub(lambda code: " " * len(code[0]), text)
            for name, pattern in PATTERNS.items():
                if name == "raises-where" and not docstring:
                    continue
                for match in pattern.finditer(plain):
                    line = first + plain.count("\n", 0, match.start() + len(match[0]) - len(match[0].lstrip()))
                    findings[name].append((path, line, match[0].strip()))
    return findings


def spelling() -> list[tuple[Path, int, str]]:
    """Return what codespell finds, and nothing if it is not installed. Its options are in pyproject.toml."""
    if find_spec("codespell_lib") is None:
        print("spelling is not checked: codespell is not installed (pip install codespell)", file=sys.stderr)
        return []
    command = [sys.executable, "-m", "codespell_lib", *(str(path.relative_to(ROOT)) for path in files())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = re.findall(r"^(.+?):(\d+): (.+)$", done.stdout, re.M)
    return [(ROOT / name, int(line), words) for name, line, words in found]


def main() -> int:
    """Print the counts, and return 1 if one exceeds its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max", type=int, default=None, metavar="N")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--list", default=None, metavar="NAME")
    options = parser.parse_args()
    findings = {"spelling": spelling(), **wording()}
    for path, line, words in findings.get(options.list, ()):
        print(f"{path.relative_to(ROOT)}:{line}: {words}")
    counts = {name: Counter(area(path) for path, *_ in found) for name, found in sorted(findings.items())}
    print(f"{'':18}" + "".join(f"{name:>12}" for name in AREAS))
    for name, by_area in counts.items():
        print(f"{name:18}" + "".join(f"{by_area[name_of]:12}" for name_of in AREAS))
    if options.update:
        lines = [
            "# Highest allowed number of findings of tools/style.py, by area and pattern. Lower it; do not raise it."
        ]
        for where in AREAS:
            lines += [
                "",
                f"[{where}]",
                *(f"{name} = {by_area[where]}" for name, by_area in counts.items() if by_area[where]),
            ]
        BASELINE.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return 0
    if options.max is not None:
        totals = {where: sum(by_area[where] for by_area in counts.values()) for where in AREAS}
        over = [
            f"{where}: {total} findings, at most {options.max}"
            for where, total in totals.items()
            if total > options.max
        ]
    else:
        allowed = tomllib.loads(BASELINE.read_text(encoding="utf-8"))
        over = [
            f"{where}: {name} {by_area[where]}, baseline {allowed.get(where, {}).get(name, 0)}"
            for name, by_area in counts.items()
            for where in AREAS
            if by_area[where] > allowed.get(where, {}).get(name, 0)
        ]
    for line in over:
        print(f"too many: {line} (see: python tools/style.py --list PATTERN)", file=sys.stderr)
    return bool(over)


if __name__ == "__main__":
    sys.exit(main())
