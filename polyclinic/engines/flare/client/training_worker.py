"""Commands of the training process: builds the run request from the installed code and enforces the site's policy."""

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from polyclinic.core import serialization as states
from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.execution import Refused
from polyclinic.core.pipeline import transforms_of
from polyclinic.core.plugin_packages import Package
from polyclinic.core.serialization import Corrupt
from polyclinic.core.site import Compute, Site
from polyclinic.data.examples import DataError
from polyclinic.engines.devices import chosen_device
from polyclinic.engines.flare.client import site_data
from polyclinic.engines.flare.client.secure_training import Demands, SecureTraining
from polyclinic.engines.flare.protocol import data_restrictions, tensor_file
from polyclinic.engines.flare.protocol.messages import printable
from polyclinic.engines.flare.protocol.paths import SiteFolder, read_small, read_toml
from polyclinic.engines.flare.protocol.run_request import PLACEHOLDER, RunRequest, code_hash, code_on_disk
from polyclinic.engines.plan import Plan
from polyclinic.engines.policy import site_policy as policies
from polyclinic.engines.policy.privacy_budget import Paid, coarse
from polyclinic.engines.policy.requirements import arrived
from polyclinic.engines.policy.site_ledger import ledger_for
from polyclinic.engines.request_schedule import marks_problem
from polyclinic.engines.site_description import Describe, read_description
from polyclinic.engines.site_runtime import marks_of, minibatches, work
from polyclinic.learning.weights import importer, store
from polyclinic.methods.plugins import packages_in
from polyclinic.secure_aggregation import contents, layout_of
from polyclinic.secure_aggregation.session_keys import ProtocolError

log = logging.getLogger(__name__)


class Training:
    """One run at one site."""

    def __init__(self, home: SiteFolder, run: str) -> None:
        torch.set_num_threads(1)
        self.home = home
        self.settings = read_toml(home.settings, "polyclinic site init")
        self.order = RunRequest.from_json(read_small(home.memory(run) / "order.json"))
        self._code, self._packages = code_hash(), self.order.packages  # before any of it is loaded for this request

    @cached_property
    def plan(self) -> Plan:
        """The run request's plan."""
        return self.order.build_plan()

    @cached_property
    def method(self) -> Any:
        """The run request's method; of a survey, the description of this site's data."""
        if self.order.mode == "survey":
            policy = policies.read(self.home.policy)
            return Describe(self._kind, self.held.classes, policy.limits.min_cell, policy.allow.class_names)
        return self.plan.build_method()

    @cached_property
    def held(self) -> site_data.SiteData:
        """This site's data, as the run request needs them."""
        return site_data.load(Path(self.settings["data"]), self.order, self.plan, self.settings["site"])

    @cached_property
    def site(self) -> Site:
        """This site, with its data."""
        device = chosen_device(self.settings.get("device", "cpu"))
        compute = Compute(int(self.settings.get("threads", 0)))
        return Site(self.settings["site"], self.held.roles, device, self.plan.seed, compute=compute)

    @property
    def _kind(self) -> str:
        """The kind of task of the study that a survey belongs to."""
        arms = self.order.study.get("arms", ())
        return str(arms[0]["plan"]["kind"]) if arms else self.plan.kind

    @cached_property
    def sums(self) -> SecureTraining:
        """This site's part in secure sums."""
        demands = Demands.of(transforms_of(self.method), self.plan.sites)
        return SecureTraining(self.site.name, self.order.identities, self.home.keys, demands)

    def do(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Execute a command and return its result; every failure is returned as a reason, not raised."""
        try:
            if changed := self._changed(command):
                return {"lost": changed, "seconds": 0.0}
            match command["what"]:
                case "check":
                    return self._check()
                case "weights":
                    return self._weights(command)
                case "schedule":
                    batches = minibatches(self.method, self.site)
                    return {"lost": "", "jobs": [job.to_table() for job in self.method.jobs], "batches": batches}
                case "again":
                    return self._again(command)
                case "data":
                    return self._data()
                case "secure":
                    return self.sums.step(command, policies.read(self.home.policy).require.min_sites)
            return self._ask(command)
        except ProtocolError as error:
            return {"lost": printable(f"refused: {error}", 2000), "seconds": 0.0}
        except (Corrupt, ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
            log.exception("failed")
            return {"lost": f"failed: {type(error).__name__}; see the site's log", "seconds": 0.0}

    def _changed(self, command: Mapping[str, Any]) -> str:
        """Return why the code is not the approved one, or an empty text.

        Modules are loaded from disk when first needed. The code must therefore be what the site agent names both at the
        start of this process and on disk now.
        """
        again = "during the run: the site must be stopped and started again"
        if {self._code, code_on_disk()} != {command["code"]}:
            return f"refused: polyclinic was changed here {again}"
        if {self._packages, self.order.packages} != {tuple(Package(*package) for package in command["packages"])}:
            return f"refused: a package that the study needs was changed here {again}"
        if command["what"] == "check":
            return ""
        own = packages_in(self.order.plan)
        return "; ".join(f"refused: {why}" for why in policies.read(self.home.policy).package_problems(own))

    def _check(self) -> dict[str, Any]:
        """Return whether run request and policy allow the study here. No data file is opened."""
        policy, name = policies.read(self.home.policy), self.settings["site"]
        survey, notes = self.order.mode == "survey", list[str]()
        problems = [*data_restrictions.refused(self.order.data)]
        problems += policy.survey_problems() if survey else policy.refusals(self.plan, self.order.weights)
        problems += policy.model_problems(data_restrictions.stage_models(self.order.data))
        if self.order.study and not self.order.of_study:
            problems.append(f"the {'survey' if survey else 'run'} is not part of the study that it names")
        if name not in self.order.everyone:
            problems.append(f"the study does not include {name}; its sites are {', '.join(self.order.everyone)}")
        for arm in self.order.arms if survey else ():
            notes += [
                f"{arm['label']} is refused here: {problem}" for problem in self._arm_problems(policy, arm["plan"])
            ]
        automatic = not survey and self.order.method_hash in policy.approve.automatically
        notes, awaits = list(dict.fromkeys(notes)), "" if survey else policies.awaited(self.plan)
        return {"lost": "", "problems": problems, "automatic": automatic, "notes": notes, "awaits": awaits}

    def _weights(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Add the start weights in a file to this site's store, if they have the hash that the run request states."""
        stated = self.order.weights
        taken = {item.card.name: item.sha256 for item in store.stored()}
        free = taken.get(stated["name"], stated["sha256"]) == stated["sha256"]
        called = stated["name"] if free else f"{stated['name'][:48]}-{stated['sha256'][:12]}"
        card = store.Card(called, stated["license"], stated["source"])
        try:
            importer.add(Path(command["file"]), card, sha256=stated["sha256"])
        except importer.NotImported as error:
            log.warning("%s", error)
            return {"lost": "refused: the file that came is not the start weights of the study", "seconds": 0.0}
        return {"lost": "", "seconds": 0.0}

    def _arm_problems(self, policy: policies.Policy, plan: Mapping[str, Any]) -> list[str]:
        """Return why the policy would refuse a method run of a study, as far as its plan is known."""
        try:
            return policy.refusals(replace(self.order, plan={**PLACEHOLDER, **plan}).build_plan(), self.order.weights)
        except (ValueError, TypeError) as error:
            return [f"it cannot be built here: {error}"]

    def _again(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Return whether an earlier reply may leave again: the policy may have changed since."""
        request = tensor_file.read_request(Path(command["ask"]))
        enforced = policies.Enforced(policies.read(self.home.policy), self.plan)
        try:
            enforced.admit(self.method, request, self.site)
            enforced.release(self.method, request, tensor_file.read_reply(Path(command["reply"])), self.site)
        except Refused as refusal:
            return {"lost": printable(f"refused: {refusal}", 2000), "seconds": 0.0}
        return {"lost": "", "seconds": 0.0}

    def _data(self) -> dict[str, Any]:
        """Check that the data fit the study: ``told`` is for the server, ``here`` for people at this site."""
        try:
            _ = self.held
        except DataError as error:
            log.warning("%s", error)
            reason = error.reported if isinstance(error, site_data.UnsuitableData) else site_data.UNREADABLE
            return {"lost": "", "told": reason, "here": str(error)}
        return {"lost": "", "told": "", "here": ""}

    def _ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        request = tensor_file.read_request(Path(command["ask"]))
        memory = tensor_file.read(Path(command["memory"])) if command["memory"] else {}
        if (request.round, request.job) != (command["round"], command["job"]):
            raise Corrupt("the file contains another request than the message names")
        policy = policies.read(self.home.policy)
        if command["automatic"] and self.order.method_hash not in policy.approve.automatically:
            return {"lost": "refused: the policy no longer approves this method by itself", "seconds": 0.0}
        enforced = policies.Enforced(policy, self.plan, command["sent"])
        rules: policies.Enforced | Paid = enforced
        if policy.privacy and self.order.data.get("rehearsal") is not True:
            name = str(self.settings.get("data_name") or Path(self.settings["data"]).name)
            ledger = ledger_for(self.home.ledgers, name, self.held.roles, self.site.name, policy.privacy)
            rules = Paid.of(enforced, ledger)
        marks = marks_of(arrived(self.method, request)) if command["marked"] else {}
        if other := [why for known, complete in command["bound"] if (why := marks_problem(marks, known, complete))]:
            return {
                "lost": printable(f"refused: the job {request.job!r} in round {request.round}: {other[0]}"),
                "seconds": 0.0,
            }
        with contents() as summed:
            done = work(self.method, request, memory, self.site, rules, self.home.memory(self.order.run))
        if done.reply is None:
            return {"lost": _without_data(done.lost), "seconds": done.seconds}
        reply = coarse(done.reply, policy.limits.min_cell) if isinstance(rules, Paid) else done.reply
        size, sha256 = tensor_file.write(Path(command["reply"]), reply)
        if request.secure:
            tensor_file.write(Path(command["layout"]), layout_of(reply))
        same = done.memory is memory or done.memory == {} == memory
        if not same and done.memory:
            tensor_file.write(Path(command["kept"]), done.memory)
        return {
            "lost": "",
            "seconds": done.seconds,
            "size": size,
            "sha256": sha256,
            "memory": "same" if same else "kept" if done.memory else "none",
            "secure": request.secure,
            "content": summed[-1] if request.secure and summed else "",
            "marks": marks,
            "parts": kinds_of(reply),
            "said": self._said(reply),
        }

    def _said(self, reply: Reply) -> dict[str, Any]:
        """Return the data's shape as reported in the answer to a survey."""
        if self.order.mode != "survey":
            return {}
        description = read_description(reply, self.site.name)
        return {"inputs": description["inputs"], "outputs": description["outputs"]}


def kinds_of(reply: Reply) -> list[dict[str, Any]]:
    """Describe the parts of a reply without their values: name, kind of aggregate, size."""
    return [
        {
            "part": part,
            "kind": states.kind_of(stat),
            "tensors": sum(len(tree) for tree in stat.trees),
            "numbers": sum(leaf.numel() for tree in stat.trees for leaf in tree.values()),
            "apart": isinstance(stat, PerSite),
        }
        for part, stat in reply.parts.items()
    ]


def _without_data(reason: str) -> str:
    """Return the reason as sent to the server. An exception's text may name a patient and is only logged at the
    site.
    """
    failed = re.fullmatch(r"failed: (\w+): .*?(\([\w.]+:\d+\))?", reason, re.DOTALL)
    if not failed:
        return printable(reason, 2000)
    log.error("%s", reason)
    return f"failed: {failed[1]} {failed[2] or ''}; see the site's log"
