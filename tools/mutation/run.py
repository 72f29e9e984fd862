"""Mutation testing: change a module in one place, run its tests, and list the changes that no test notices.

    python tools/mutation/run.py core/check            # one or more modules of modules.toml
    python tools/mutation/run.py --show core/check     # only print what the last run found

See README.md in this folder.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib
import json
import os
import resource
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
sys.path[:0] = [str(ROOT), str(HERE)]

import pytest  # noqa: E402
from mutants import Mutant, mutants  # noqa: E402
from swap import Calls, Replaced, changed_functions, swap  # noqa: E402

RESULTS = ROOT / "build" / "mutation"
PYTEST = ["-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "not slow and not deploy"]
SURVIVED, KILLED, TIMEOUT, AFRESH = "survived", "killed", "timeout", "afresh"
CANNOT = 77  # the exit status of a fork in which a function could not be changed
MEMORY = 16 * 2**30
# Limits of a mutant's tests, each a multiple of their usual processor time plus seconds: processor time, and elapsed time,
# which is longer on a machine with more running processes than processors.
PROCESSOR, ELAPSED = (4, 10), (6, 25)


class Target:
    """A module under test: its source, its mutants, its tests, and what is known of each mutant."""

    def __init__(self, name: str, tests: list[str], fresh: bool = False) -> None:
        self.name, self.tests = name, tests
        self.path = ROOT / "polyclinic" / f"{name}.py"
        self.module = "polyclinic." + name.replace("/", ".")
        self.source = self.path.read_text()
        self.file = RESULTS / f"{name.replace('/', '.')}.json"
        old = json.loads(self.file.read_text()) if self.file.exists() and not fresh else {}
        self.mutants = self._made(old)
        self.status = {k: v for k, v in old.get("status", {}).items() if k in self.mutants}
        self.learned = self.file.with_suffix(".learned")  # what the tests import, and how long they take
        self.log = self.file.with_suffix(".log")  # of a run that has not been written down yet, or was killed
        if self.log.exists():
            self.status |= {k: v for k, v in map(str.split, self.log.read_text().splitlines()) if k in self.mutants}
        self.save()

    def _made(self, old: dict[str, Any]) -> dict[str, Mutant]:
        digest = hashlib.sha256(self.source.encode() + (HERE / "mutants.py").read_bytes()).hexdigest()
        self.digest = digest
        if old.get("digest") == digest:
            return {key: Mutant(*values) for key, values in old["mutants"].items()}
        return {hashlib.sha256(mutant.source.encode()).hexdigest()[:12]: mutant for mutant in mutants(self.source)}

    def save(self) -> None:
        """Write down what is known."""
        RESULTS.mkdir(parents=True, exist_ok=True)
        kept = {key: [m.line, m.source, m.diff] for key, m in self.mutants.items()}
        self.file.write_text(json.dumps({"digest": self.digest, "mutants": kept, "status": self.status}))
        self.log.unlink(missing_ok=True)

    def pending(self) -> list[str]:
        """The mutants that no test has killed yet, those that were never tried first."""
        left = [key for key in self.mutants if self.status.get(key, SURVIVED) in (SURVIVED, AFRESH)]
        return sorted(left, key=lambda key: key in self.status)

    def table(self) -> str:
        """How many were killed, and the diffs of those that were not."""
        dead = sum(self.status.get(key) in (KILLED, TIMEOUT) for key in self.mutants)
        untried = sum(key not in self.status for key in self.mutants)
        lines = []
        for key, mutant in self.mutants.items():
            if self.status.get(key) in (SURVIVED, AFRESH):
                lines += [f"{key} {self.name}.py:{mutant.line}", mutant.diff, ""]
        late = sum(self.status.get(key) == TIMEOUT for key in self.mutants)
        share = f"{dead} of {len(self.mutants)} killed ({dead / max(1, len(self.mutants)):.1%})"
        share += f", {late} of them by a time limit" if late else ""
        return "\n".join([*lines, f"{self.name}: {share}" + (f", {untried} not tried yet" if untried else "")])


class InOneProcess:
    """A pytest plugin that, once tests are collected, runs them in a fork of the process for every mutant."""

    def __init__(self, target: Target, keys: list[str], until: float, out: Callable[[str, str], None]) -> None:
        self.target, self.keys, self.until, self.out = target, keys, until, out

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """In place of running the tests once."""
        base = self._learn(session)
        if base is None:
            raise SystemExit(f"the tests of {self.target.name} fail without any mutation")
        prime()
        loaded = [name for name in sys.modules if name.startswith("polyclinic.")]
        self.target.learned.write_text(json.dumps({"loaded": loaded, "seconds": sum(base["seconds"].values())}))
        for key in self.keys:
            if time.monotonic() > self.until:
                break
            self.out(key, self._status(session, key, base))
        return True

    def _status(self, session: pytest.Session, key: str, base: dict[str, Any]) -> str:
        """What the tests that call a mutant's functions make of it."""
        path, module = str(self.target.path), sys.modules[self.target.module]
        mutant = compile(self.target.mutants[key].source, path, "exec")
        names = changed_functions(compile(self.target.source, path, "exec"), mutant)
        if names is None:
            return AFRESH
        items = sorted(
            (i for i in session.items if base["calls"][i.nodeid] & names), key=lambda item: base["seconds"][item.nodeid]
        )
        code = forked(
            lambda: _run(session, items) if swap(module, mutant, names) else CANNOT,
            sum(base["seconds"][i.nodeid] for i in items),
        )
        return AFRESH if code == CANNOT else _meaning(code)

    def _learn(self, session: pytest.Session) -> dict[str, Any] | None:
        """Which functions each test calls and how long it takes; None if a test fails."""
        read, write = os.pipe()

        def learned() -> int:
            calls, found = Calls(str(self.target.path)), {"calls": {}, "seconds": {}, "setup": {}}
            session.config.pluginmanager.register(Learning(calls, found))
            failed = _run(session, session.items)
            if not failed:
                os.write(write, json.dumps(found).encode())
            return failed

        pid = _fork(learned, 1800, 1800)
        os.close(write)
        with os.fdopen(read) as file:
            text = file.read()
        os.waitpid(pid, 0)
        if not text:
            return None
        found = json.loads(text)
        by_file: dict[str, set[str]] = {}  # what fixtures call counts for every test of their file
        for test, names in found["setup"].items():
            by_file.setdefault(test.split("::")[0], set()).update(names)
        found["calls"] = {t: set(n) | by_file.get(t.split("::")[0], set()) for t, n in found["calls"].items()}
        return found  # type: ignore[no-any-return]


class Learning:
    """A pytest plugin that notes, for each test, what it calls and how long it takes."""

    def __init__(self, calls: Calls, found: dict[str, Any]) -> None:
        self.calls, self.found = calls, found

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Any:
        """Fixtures."""
        sys.setprofile(self.calls)
        try:
            return (yield)
        finally:
            sys.setprofile(None)
            self.found["setup"][item.nodeid] = list(self.calls.taken())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        """The test itself."""
        began = time.process_time()
        sys.setprofile(self.calls)
        try:
            return (yield)
        finally:
            sys.setprofile(None)
            self.found["calls"][item.nodeid] = list(self.calls.taken())
            self.found["seconds"][item.nodeid] = time.process_time() - began


def _run(session: pytest.Session, items: list[pytest.Item]) -> int:
    """Run ``items`` until one fails; 1 if one did."""
    for i, item in enumerate(items):
        following = items[i + 1] if i + 1 < len(items) else None
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return 1
    return 0


def afresh(target: Target, key: str) -> int:
    """The exit status of the tests when the mutant is imported in place of the module."""
    Replaced(target.module, str(target.path), target.mutants[key].source).install()
    return int(pytest.main([*PYTEST, "-x", *target.tests]))


def forked(work: Callable[[], int], seconds: float) -> int:
    """The wait status of ``work`` in a fork, which usually takes ``seconds`` and is ended at ``PROCESSOR`` or ``ELAPSED``."""
    cpu, wall = (factor * seconds + more for factor, more in (PROCESSOR, ELAPSED))
    pid = _fork(work, int(cpu), int(wall * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))))
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # whatever the tests have started
    return os.waitstatus_to_exitcode(status)


def _fork(work: Callable[[], int], cpu: int, wall: int) -> int:
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    os.setsid()
    code = 70
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(wall)
        used = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (used + cpu, used + cpu + 1))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        import hypothesis.internal.conjecture.engine as engine

        engine.MAX_SHRINKS = 0  # that it fails is enough
        code = work()
    except BaseException:
        code = 71
    os._exit(code)


def _meaning(code: int) -> str:
    if code == -signal.SIGKILL:  # by somebody else, or for want of memory: it says nothing of the tests
        return SURVIVED
    return SURVIVED if code == 0 else TIMEOUT if code in (-signal.SIGXCPU, -signal.SIGALRM) else KILLED


def prime() -> None:
    """Fill the caches of loaded modules that modules.toml names, so that not every fork computes them anew."""
    for name in tomllib.loads((HERE / "modules.toml").read_text())["primed"]:
        module, _, function = name.partition(":")
        if module in sys.modules:
            getattr(sys.modules[module], function)()


def independent(target: str) -> list[str]:
    """The modules of Polyclinic that import nothing, however indirectly, that imports ``target``."""
    imports: dict[str, set[str]] = {}
    for path in sorted((ROOT / "polyclinic").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found = imports.setdefault(name, {name.rpartition(".")[0]})  # its package is imported with it
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
    tainted = {target}
    while more := {name for name, found in imports.items() if found & tainted} - tainted:
        tainted |= more
    return [name for name in imports if name not in tainted]


def run(target: Target, warm: Iterable[str], until: float) -> None:
    """Try every mutant of ``target`` that was not killed before."""
    keys, log = target.pending(), target.log
    log.write_text("")

    def out(key: str, status: str) -> None:
        with open(log, "a") as file:
            file.write(f"{key} {status}\n")

    def quick() -> int:
        plugin = InOneProcess(target, keys, until, out)
        return int(pytest.main([*PYTEST, *target.tests], plugins=[plugin]))

    for name in warm:
        importlib.import_module(name)
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(quick())
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(f"{target.name}: the tests fail without any mutation, or could not be collected")
    target.status |= dict(line.split() for line in log.read_text().splitlines())
    target.save()
    learned = json.loads(target.learned.read_text())
    for name in independent(target.module):
        if name in learned["loaded"]:
            importlib.import_module(name)
    prime()
    assert target.module not in sys.modules, "or a fork would not import the mutant"
    for key in [k for k in keys if target.status.get(k) == AFRESH]:
        if time.monotonic() > until:
            break
        target.status[key] = _meaning(forked(lambda key=key: afresh(target, key), learned["seconds"] + 5))
        target.save()


def main() -> None:
    """Read the command line."""
    config = tomllib.loads((HERE / "modules.toml").read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=", ".join(config["tests"]))
    parser.add_argument("--show", action="store_true", help="print what is known and run nothing")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs found")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long; run again to go on")
    given = parser.parse_args()
    if unknown := [name for name in given.modules if name not in config["tests"]]:
        raise SystemExit(f"{unknown[0]} is not in modules.toml. There are {', '.join(config['tests'])}")
    os.chdir(ROOT)
    spent = 0.0
    for name in given.modules or [k for k in config["tests"] if (RESULTS / f"{k.replace('/', '.')}.json").exists()]:
        target = Target(name, config["tests"][name], given.fresh)
        if not given.show:
            began = time.monotonic()
            run(target, config["warm"], began + given.seconds - spent)
            spent += time.monotonic() - began
        print(target.table(), flush=True)


if __name__ == "__main__":
    main()
