"""FLARE's process is started again when it has ended, later with every crash, and soon after it ran well."""

import subprocess
from types import SimpleNamespace
from typing import cast

import pytest

from polyclinic.engines.flare import flare_processes
from polyclinic.engines.flare.flare_processes import MAX_PAUSE, STEADY, KeptProcess


class Process:
    def __init__(self) -> None:
        self.code: int | None = None

    def poll(self) -> int | None:
        return self.code


class World:
    """A clock that is set, and the processes that were started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.started, self.ended = 1000.0, list[Process](), list[tuple[int, int]]()
        monkeypatch.setattr(flare_processes, "time", SimpleNamespace(time=lambda: self.now))
        self.kept = KeptProcess(self.begin, lambda code, crashes: self.ended.append((code, crashes)))

    def begin(self) -> "subprocess.Popen[bytes]":
        self.started.append(Process())
        return cast("subprocess.Popen[bytes]", self.started[-1])

    def die_and_wait(self, code: int = 1) -> float:
        """Let the process end, and return the seconds until the next start, in steps of half a second."""
        self.started[-1].code = code
        begun = self.now
        while not self.kept.look():
            self.now += 0.5
        return self.now - begun


def test_the_pause_doubles_and_ends_at_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    assert world.kept.look()
    assert not world.kept.look()
    pauses = [world.die_and_wait() for _ in range(8)]
    assert pauses == [2, 4, 8, 16, 32, MAX_PAUSE, MAX_PAUSE, MAX_PAUSE]
    assert world.ended == [(1, n) for n in range(1, 9)]
    assert len(world.started) == 9


def test_crashes_are_forgotten_when_it_has_run_well(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.kept.look()
    world.die_and_wait()
    world.die_and_wait()
    assert world.kept.crashes == 2
    world.now += STEADY + 1
    assert not world.kept.look()
    assert world.kept.crashes == 0
    world.die_and_wait(-9)
    assert world.ended[-1] == (-9, 1)
