"""Mutation testing: change a module in one place, run its tests, and list the changes that no test notices.

    python tools/mutation/run.py core/site                         # one or more modules of modules.toml
    python tools/mutation/run.py core --sample 30                  # 30 mutants of each module of a package
    python tools/mutation/run.py core --sample 300 --over          # 300 mutants of a package
    python tools/mutation/run.py core/site --show                  # only print what earlier runs found

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
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
sys.path[:0] = [str(ROOT), str(HERE)]

import pytest  # noqa: E402
from mutants import Changes, Mutant  # noqa: E402
from sample import drawn, score  # noqa: E402
from swap import Calls, Replaced, changed_functions, swap  # noqa: E402

RESULTS = ROOT / "build" / "mutation"
PYTEST = ["-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "not slow and not deploy"]
PYTEST += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of hypothesis, which is imported before forks
SURVIVED, KILLED, TIMEOUT, AFRESH = "survived", "killed", "timeout", "afresh"
CANNOT = 77  # the exit status of a fork in which a function could not be changed
MEMORY = 16 * 2**30
# Limits of a mutant's tests, each a multiple of their usual processor time plus seconds: processor time, and elapsed time,
# which is longer on a machine with more running processes than processors.
PROCESSOR, ELAPSED = (4, 10), (6, 25)


class Target:
    """A module under test: its source, its mutants by key, its tests, and what is known of each mutant."""

    def __init__(self, name: str, tests: list[str], fresh: bool = False) -> None:
        self.name, self.tests = name, tests
        self.path = ROOT / "polyclinic" / f"{name}.py"
        self.module = "polyclinic." + name.replace("/", ".")
        self.source = self.path.read_text()
        self.file = RESULTS / f"{name.replace('/', '.')}.json"
        self.digest = hashlib.sha256(self.source.encode() + (HERE / "mutants.py").read_bytes()).hexdigest()
        old = json.loads(self.file.read_text()) if self.file.exists() and not fresh else {}
        old = old if old.get("digest") == self.digest else {}
        count = old["changes"] if old else len(self._changes)
        self.keys = [hashlib.sha256(f"{self.digest} {i}".encode()).hexdigest()[:12] for i in range(count)]
        self._numbers = {key: i for i, key in enumerate(self.keys)}
        self._mutants = {key: Mutant(*values) if values else None for key, values in old.get("mutants", {}).items()}
        self.status: dict[str, str] = old.get("status", {})
        self.learned = self.file.with_suffix(".learned")  # what the tests import, and how long they take
        self.log = self.file.with_suffix(".log")  # of a run that has not been written down yet, or was killed
        if self.log.exists():
            self.status |= {k: v for k, v in map(str.split, self.log.read_text().splitlines()) if k in self._numbers}

    @cached_property
    def _changes(self) -> Changes:
        return Changes(self.source)

    def mutant(self, key: str) -> Mutant | None:
        """The mutant of a key; None if the change makes no difference or is no valid Python."""
        if key not in self._mutants:
            self._mutants[key] = self._changes.mutant(self._numbers[key])
        return self._mutants[key]

    def changed(self, key: str) -> str:
        """The source of the module with the mutant of ``key``."""
        mutant = self.mutant(key)
        assert mutant is not None
        return mutant.of(self.source)

    def every(self) -> list[str]:
        """The keys of all mutants, without repeats."""
        found = {self.mutant(key): key for key in reversed(self.keys)}
        return [key for key in self.keys if (mutant := self.mutant(key)) and found[mutant] == key]

    def save(self) -> None:
        """Write down what is known."""
        RESULTS.mkdir(parents=True, exist_ok=True)
        kept = {key: [m.line, m.start, m.end, m.new] if m else None for key, m in self._mutants.items()}
        facts = {"digest": self.digest, "changes": len(self.keys), "mutants": kept, "status": self.status}
        self.file.write_text(json.dumps(facts))
        self.log.unlink(missing_ok=True)

    def pending(self, keys: Iterable[str]) -> list[str]:
        """The mutants among ``keys`` that no test has killed yet, those that were never tried first."""
        left = [key for key in keys if self.status.get(key, SURVIVED) in (SURVIVED, AFRESH)]
        return sorted(left, key=lambda key: key in self.status)

    def killed(self, keys: Iterable[str]) -> int:
        """How many of ``keys`` a test has killed."""
        return sum(self.status.get(key) in (KILLED, TIMEOUT) for key in keys)

    def tried(self, keys: Iterable[str]) -> int:
        """How many of ``keys`` were tried to the end."""
        return sum(self.status.get(key) in (KILLED, TIMEOUT, SURVIVED) for key in keys)

    def table(self, keys: Sequence[str], sampled: bool) -> str:
        """How many of ``keys`` were killed, and the diffs of those that were not."""
        lines = []
        for key in sorted(keys, key=lambda key: self._numbers[key]):
            if self.status.get(key) in (SURVIVED, AFRESH) and (mutant := self.mutant(key)):
                lines += [f"{key} {self.name}.py:{mutant.line}", mutant.diff(self.source), ""]
        late = sum(self.status.get(key) == TIMEOUT for key in keys)
        untried = len(keys) - self.tried(keys)
        if sampled:
            share = f"a sample of {len(self.keys)} changes: {score(self.killed(keys), self.tried(keys))}"
        else:
            share = f"{self.killed(keys)} of {len(keys)} killed ({self.killed(keys) / max(1, len(keys)):.1%})"
        share += f", {late} of them by a time limit" if late else ""
        return "\n".join([*lines, f"{self.name}: {share}" + (f", {untried} not tried yet" if untried else "")])


class InOneProcess:
    """A pytest plugin that, once tests are collected, runs them in a fork of the process for every mutant."""

    def __init__(self, work: Mapping[str, tuple[Target, Sequence[str]]], until: float) -> None:
        self.work, self.until = work, until

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """In place of running the tests once."""
        base = self._learn(session)
        if base is None:
            raise SystemExit(f"the tests of {', '.join(self.work)} fail without any mutation")
        prime()
        loaded = [name for name in sys.modules if name.startswith("polyclinic.")]
        for target, keys in self.work.values():
            tests = _quickest_first(base, lambda call, name=target.name: call.partition(":")[0] == name)
            tests = tests or _quickest_first(base, lambda call: True)
            seconds = sum(base["seconds"][test] for test in tests)
            target.learned.write_text(json.dumps({"loaded": loaded, "seconds": seconds, "tests": tests}))
            for key in keys:
                if time.monotonic() > self.until:
                    return True
                status = self._status(session, target, key, base)
                with open(target.log, "a") as file:
                    file.write(f"{key} {status}\n")
        return True

    def _status(self, session: pytest.Session, target: Target, key: str, base: dict[str, Any]) -> str:
        """What the tests that call a mutant's functions make of it."""
        path, module = str(target.path), importlib.import_module(target.module)
        mutant = compile(target.changed(key), path, "exec")
        names = changed_functions(compile(target.source, path, "exec"), mutant)
        if names is None:
            return AFRESH
        calls = {f"{target.name}:{name}" for name in names}
        items = {item.nodeid: item for item in session.items}
        chosen = [items[test] for test in _quickest_first(base, lambda call: call in calls)]
        code = forked(
            lambda: _run(session, chosen) if swap(module, mutant, names) else CANNOT,
            sum(base["seconds"][item.nodeid] for item in chosen),
        )
        return AFRESH if code == CANNOT else _meaning(code)

    def _learn(self, session: pytest.Session) -> dict[str, Any] | None:
        """Which functions each test calls and how long it takes; None if a test fails."""
        read, write = os.pipe()

        def learned() -> int:
            paths = {str(target.path): name for name, (target, _) in self.work.items()}
            calls, found = Calls(paths), {"calls": {}, "seconds": {}, "setup": {}, "fixtures": {}}
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
        longest: dict[str, float] = {}  # and so does the time of the longest
        for test, names in found["setup"].items():
            by_file.setdefault(_file(test), set()).update(names)
            longest[_file(test)] = max(longest.get(_file(test), 0.0), found["fixtures"][test])
        found["calls"] = {test: set(names) | by_file[_file(test)] for test, names in found["calls"].items()}
        found["order"] = {test: seconds + longest[_file(test)] for test, seconds in found["seconds"].items()}
        found["seconds"] = {test: seconds + found["fixtures"][test] for test, seconds in found["seconds"].items()}
        return found  # type: ignore[no-any-return]


def _file(test: str) -> str:
    return test.partition("::")[0]


def _quickest_first(base: Mapping[str, Any], wanted: Callable[[str], bool]) -> list[str]:
    """Return the tests that call a ``wanted`` function."""
    tests = [test for test, calls in base["calls"].items() if any(map(wanted, calls))]
    return sorted(tests, key=lambda test: base["order"][test])


class Learning:
    """A pytest plugin that notes, for each test, what it calls and how long it takes."""

    def __init__(self, calls: Calls, found: dict[str, Any]) -> None:
        self.calls, self.found = calls, found

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Any:
        """Fixtures."""
        began = time.process_time()
        sys.setprofile(self.calls)
        try:
            return (yield)
        finally:
            sys.setprofile(None)
            self.found["setup"][item.nodeid] = list(self.calls.taken())
            self.found["fixtures"][item.nodeid] = time.process_time() - began

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


def afresh(target: Target, key: str, tests: Sequence[str]) -> int:
    """The exit status of ``tests`` when the mutant is imported in place of the module."""
    Replaced(target.module, str(target.path), target.changed(key)).install()
    return int(pytest.main([*PYTEST, "-x", *tests]))


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


def run(work: Mapping[str, tuple[Target, Sequence[str]]], until: float) -> None:
    """Try mutants of modules with the same tests: the mutants of functions, and note which have to be imported."""
    tests = next(iter(work.values()))[0].tests
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if pytest.main([*PYTEST, *tests], plugins=[InOneProcess(work, until)]):
        raise SystemExit(f"{', '.join(work)}: the tests fail without any mutation, or could not be collected")


def run_afresh(target: Target, keys: Sequence[str], until: float) -> None:
    """Try mutants of code that runs at import. Imports the modules that do not depend on ``target``."""
    learned = json.loads(target.learned.read_text())
    for name in independent(target.module):
        if name in learned["loaded"]:
            importlib.import_module(name)
    prime()
    assert target.module not in sys.modules, "or a fork would not import the mutant"
    for key in keys:
        if time.monotonic() > until:
            break
        code = forked(lambda key=key: afresh(target, key, learned["tests"]), learned["seconds"] + 5)
        target.status[key] = _meaning(code)
        target.save()


def apart(work: Callable[[], None]) -> bool:
    """Do ``work`` in a fork, so that what it imports is not loaded here; return whether it came to its end."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == 0
    try:
        work()
    except SystemExit as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def chosen(targets: Sequence[Target], number: int | None, seed: int, over: bool) -> dict[str, list[str]]:
    """Return the mutants to try, by module: all, ``number`` of each module, or ``number`` of all modules together."""
    if number is None:
        return {target.name: target.every() for target in targets}
    found: dict[str, list[str]] = {target.name: [] for target in targets}
    for group in [targets] if over else [[target] for target in targets]:
        of = {key: target for target in group for key in target.keys}
        valid = (key for key in drawn(of, len(of), seed) if of[key].mutant(key))
        for key in islice(valid, number):
            found[of[key].name].append(key)
    return found


def selected(given: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """Return the modules of modules.toml that are ``given`` by name or by the package in which they are."""
    names = [name for wanted in given for name in known if name == wanted or name.startswith(f"{wanted}/")]
    for wanted in given:
        if not any(name == wanted or name.startswith(f"{wanted}/") for name in known):
            raise SystemExit(f"{wanted} is not in modules.toml. There are {', '.join(known)}")
    return list(dict.fromkeys(names))


def main() -> None:
    """Read the command line."""
    config = tomllib.loads((HERE / "modules.toml").read_text())
    known_tests = config["tests"] | {name: of["tests"] for of in config["packages"].values() for name in of["modules"]}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"or a package: {', '.join(known_tests)}")
    parser.add_argument("--show", action="store_true", help="print what is known and run nothing")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs found")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long; run again to go on")
    parser.add_argument("--sample", type=int, metavar="N", help="try N mutants of each module, drawn at random")
    parser.add_argument("--over", action="store_true", help="draw the sample from all given modules together")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample; 0 by default")
    given = parser.parse_args()
    if given.over and given.sample is None:
        parser.error("--over is for --sample N")
    os.chdir(ROOT)
    tried_before = [name for name in known_tests if (RESULTS / f"{name.replace('/', '.')}.json").exists()]
    names = selected(given.modules, known_tests) if given.modules else tried_before
    targets = [Target(name, known_tests[name], given.fresh) for name in names]
    if given.sample is not None and given.sample < 1:
        parser.error("--sample N draws at least one mutant")
    keys = chosen(targets, given.sample, given.seed, given.over)
    for target in targets:
        target.save()
    until, failed = time.monotonic() + given.seconds, False
    killed = tried = 0
    for tests in dict.fromkeys(tuple(target.tests) for target in targets):
        together = {target.name: target for target in targets if tuple(target.tests) == tests}
        work = {name: (target, target.pending(keys[name])) for name, target in together.items()}
        work = {name: (target, pending) for name, (target, pending) in work.items() if pending}
        if work and not given.show and time.monotonic() < until:
            failed |= not apart(lambda work=work: run(work, until))
        for name in together:
            target = Target(name, list(tests))  # with what the fork has found
            again = [key for key in target.pending(keys[name]) if target.status.get(key) == AFRESH]
            if again and not given.show and time.monotonic() < until:
                for module in config["warm"]:
                    importlib.import_module(module)
                failed |= not apart(lambda target=target, again=again: run_afresh(target, again, until))
                target = Target(name, list(tests))
            print(target.table(keys[name], given.sample is not None), flush=True)
            killed, tried = killed + target.killed(keys[name]), tried + target.tried(keys[name])
    if given.over:
        print(f"together: a sample of {sum(len(target.keys) for target in targets)} changes: {score(killed, tried)}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
