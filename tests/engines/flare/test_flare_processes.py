"""A process of a site or a server ends when it is asked to, or by force."""

import signal
import subprocess
import sys

from polyclinic.engines.flare import flare_processes

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"


def test_a_process_is_asked_to_end() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        flare_processes.terminate(child.pid, flare_processes.birth(child.pid), 30.0)
        assert child.wait() == -signal.SIGTERM


def test_a_process_that_does_not_end_is_killed_after_a_while() -> None:
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        flare_processes.terminate(child.pid, flare_processes.birth(child.pid), 0.2)
        assert child.wait() == -signal.SIGKILL


def test_a_process_that_has_ended_meanwhile_is_no_error() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        born = flare_processes.birth(child.pid)
        child.kill()
    flare_processes.terminate(child.pid, born, 30.0)
    assert not flare_processes.alive(child.pid, born)
