"""Loaded by Python in every real process that the tests start, because this folder is on PYTHONPATH.

By files in the folder that POLYCLINIC_TEST_FAULTS names, a test decides about processes that it did not write: when they
die (``*.kill``), how long a site works (``hold-SITE-ROUND``) or scores (``silent-SITE``), what a site's job process
makes of an answer (``twist-SITE``, ``flood-SITE``), and what a hostile server asks besides (``hostile-RUN``, ``flooding``). Privacy noise comes from the site's name, so that it repeats. Without that folder nothing changes.
"""

import hashlib
import importlib.abc
import importlib.util
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("POLYCLINIC_TEST_FAULTS") or "/nonexistent")


def die_at(where: str, when: str) -> None:
    """Kills this process where a test has asked for it; each request is obeyed once, after ``skip`` occasions."""
    for order in FOLDER.glob("*.kill"):
        try:
            wanted = json.loads(order.read_text())
        except (OSError, ValueError):
            continue
        argv = " ".join(sys.orig_argv)
        if wanted["when"] != when or not re.search(wanted["path"], where) or not re.search(wanted["argv"], argv):
            continue
        if wanted["skip"] > 0:
            order.write_text(json.dumps({**wanted, "skip": wanted["skip"] - 1}))
            continue
        try:
            order.rename(order.with_suffix(".done"))
        except OSError:
            continue
        os.kill(os.getpid(), signal.SIGKILL)


def patient_replace(real: Any) -> Any:
    """``os.replace``, before and after which a process may die: every file of ours that must survive goes
    through it.
    """

    def replace(source: Any, target: Any, **more: Any) -> None:
        die_at(os.fspath(target), "before")
        real(source, target, **more)
        die_at(os.fspath(target), "after")

    return replace


def fixed(name: str) -> Any:
    """Noise of a site that anybody can repeat."""
    return lambda size: hashlib.shake_256(name.encode()).digest(size)


def change_training(module: Any) -> None:
    """A site whose noise repeats, and that works as long as a test holds it."""
    site, request = module.Site, module.Training._ask
    module.Site = lambda name, *rest, **more: site(name, *rest, entropy=fixed(name), **more)

    def held(self: Any, command: Any) -> Any:
        hold = FOLDER / f"hold-{self.site.name}-{command['round']}"
        if hold.exists():
            hold.with_name(f"held-{self.site.name}-{command['round']}").touch()
        while hold.exists() and not command["job"].startswith("score"):
            time.sleep(0.02)
        while command["job"].startswith("score") and (FOLDER / f"silent-{self.site.name}").exists():
            time.sleep(0.02)
        return request(self, command)

    module.Training._ask = held


def change_executor(module: Any) -> None:
    """A job process at a site that makes something else of one answer."""
    execute = module.SiteExecutor.execute

    def twisted(self: Any, task_name: str, shareable: Any, *rest: Any) -> Any:
        result = execute(self, task_name, shareable, *rest)
        wish = FOLDER / f"twist-{self.agent.name if self.agent else ''}"
        kind = json.loads(shareable["call"])["kind"]
        if kind == "hello" and (FOLDER / f"flood-{self.agent.name if self.agent else ''}").exists():
            result["body"] = b"0" * 2**23
        if kind != "do":
            return result
        earlier, self.earlier = getattr(self, "earlier", {}), dict(result)
        if not wish.exists():
            return result
        how = wish.read_text()
        wish.unlink()
        body = bytes(result.get("body", b""))
        match how:
            case "truncated":
                result["body"] = body[: len(body) // 2]
            case "oversized":
                result["body"] = body + b"0" * 2**20
            case "altered":
                result["body"] = body[:-1] + bytes([body[-1] ^ 1])
            case "malformed":
                result["answer"] = "{" * 100_000
            case "unexpected":
                result["answer"] = {"a": ["table", 1]}
            case "elsewhere":
                del result["body"]
                result["ref"], result["at"] = "R" + "0" * 32, "site-1.nowhere"
            case "replayed":
                result.update(earlier)
            case "raised":
                raise MemoryError("as if there were none left")
        return result

    module.SiteExecutor.execute = twisted


def change_conductor(module: Any) -> None:
    """A server that, once it has trained, sends the requests of a test (``hostile-RUN``) and records the answers."""
    finish = module.RunCoordinator._finish

    def hostile(self: Any, federation: Any) -> None:
        from dataclasses import replace

        wish = FOLDER / f"hostile-{self.order.run}"
        heard = []
        for job, round, by in json.loads(wish.read_text()) if wish.exists() else ():
            asked = self.method.evaluation_request(self._at.state)
            params = {
                name: leaf + by if leaf.is_floating_point() else leaf for name, leaf in asked.trees["params"].items()
            }
            trees = {**asked.trees, "params": params}
            federation.send(
                replace(asked, job=job, round=round, secure=False, recipients=None, trees=trees), federation.sites
            )
            heard += [[job, round, a.site, a.reply is not None, a.lost] for a in federation.replies(120.0)]
        if wish.exists():
            wish.rename(wish.with_name(f"hostile-{self.order.run}.done")).write_text(json.dumps(heard))
        finish(self, federation)

    module.RunCoordinator._finish = hostile


def change_controller(module: Any) -> None:
    """A server that registers sites with a file of 8 MB in its call (``flooding``)."""
    post = module.FlareCarrier.post

    def flooding(self: Any, calls: Any, body: Any) -> None:
        from dataclasses import replace

        wish = FOLDER / "flooding"
        if wish.exists() and calls and calls[0].kind == "hello":
            data = b"0" * 2**23
            body = FOLDER / "flood.bin"
            body.write_bytes(data)
            calls = [replace(call, size=len(data), sha256=hashlib.sha256(data).hexdigest()) for call in calls]
        post(self, calls, body)

    module.FlareCarrier.post = flooding


CHANGES = {
    "polyclinic.engines.flare.client.training_worker": change_training,
    "polyclinic.engines.flare.client.executor": change_executor,
    "polyclinic.engines.flare.server.run_coordinator": change_conductor,
    "polyclinic.engines.flare.server.controller": change_controller,
}


class Changed(importlib.abc.MetaPathFinder):
    """Changes a module of ours right after it is loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in CHANGES:
            return None
        change = CHANGES.pop(name)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if FOLDER.is_dir():
    os.replace = patient_replace(os.replace)
    sys.meta_path.insert(0, Changed())
