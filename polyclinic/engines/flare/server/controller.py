"""Controller that FLARE instantiates in the server's job process; it transports the messages of the run coordinator.

One of the two classes of this package that FLARE may instantiate; the other is ``client.executor.SiteExecutor``.
"""

import os
import queue
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvflare.apis.controller_spec import Task
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable

from polyclinic.engines.flare.client.heartbeat import Heartbeat
from polyclinic.engines.flare.protocol import file_transfer, message_limits
from polyclinic.engines.flare.protocol.expected_signers import Signers
from polyclinic.engines.flare.protocol.flare_job import TASK
from polyclinic.engines.flare.protocol.messages import BadMessage, Call
from polyclinic.engines.flare.protocol.paths import ServerFolder, private_folder, read_toml
from polyclinic.engines.flare.protocol.rpc import Delivery, Ended
from polyclinic.engines.flare.protocol.run_request import RunRequest
from polyclinic.engines.flare.server import study_runs
from polyclinic.engines.flare.server.run_coordinator import RunCoordinator, model_bytes, write_failure
from polyclinic.errors import PolyclinicError

FETCHERS = 2


class FlareCarrier:
    """Transport that sends calls as FLARE tasks, one per site, and receives the submitted answers."""

    def __init__(
        self,
        controller: Controller,
        fl_ctx: Any,
        abort_signal: Any,
        inbox: Path,
        sites: Sequence[str],
        dead_after: float,
        limits: message_limits.Limits = message_limits.Limits(),
    ) -> None:
        """Serve one job and its ``sites``; a site without a sign of life for ``dead_after`` seconds is away."""
        self.controller, self.fl_ctx, self.abort_signal = controller, fl_ctx, abort_signal
        self.cell = fl_ctx.get_engine().get_cell()
        self.came: queue.Queue[Delivery] = queue.Queue()
        self.tasks: dict[str, tuple[Task, int]] = {}
        self.inbox, self.limits = private_folder(inbox), limits
        self.fetching = ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch")
        self.job = fl_ctx.get_job_id()
        self.pulse = Heartbeat(self.cell, self.job, sites, dead_after)

    def post(self, calls: Sequence[Call], body: Path | None) -> None:
        """Send each call to its site, all with the same file."""
        attachment = file_transfer.offer(self.cell, body, len(calls), self.pulse.moved) if body else {}
        for call in calls:
            task = Task(TASK, Shareable({"call": call.to_json(), **attachment}), result_received_cb=self._received)
            self.drop(call.site)
            self.tasks[call.site] = task, self.limits.reply(call)
            self.controller.send(task, self.fl_ctx, targets=[call.site])

    def arrived(self, seconds: float) -> Delivery | None:
        """Return the next delivery, or None after ``seconds``.

        Raises:
            Ended: If the job was ended.
        """
        if self.abort_signal.triggered:
            raise Ended("the job was ended")
        try:
            return self.came.get(timeout=seconds)
        except queue.Empty:
            return None

    def away(self, site: str) -> bool:
        """Return whether FLARE has lost a site, or its job process does not respond."""
        return self.controller.get_client_disconnect_time(site) is not None or self.pulse.silent(site)

    def drop(self, site: str) -> None:
        """Withdraw a site's task."""
        task, _ = self.tasks.pop(site, (None, 0))
        if task is not None and task.completion_status is None:
            self.controller.cancel_task(task)

    def close(self) -> None:
        """Stop fetching and empty the inbox."""
        self.pulse.close()
        self.fetching.shutdown(wait=False, cancel_futures=True)
        for path in self.inbox.iterdir():
            path.unlink(missing_ok=True)

    def _received(self, client_task: Any, fl_ctx: Any) -> None:
        # FLARE holds a lock here; other threads fetch files, few at a time, so that memory stays bounded.
        site, result, client_task.result = client_task.client.name, client_task.result, None
        task, limit = self.tasks.get(site, (None, 0))
        if task is client_task.task:  # an answer to a withdrawn task is not fetched
            self.fetching.submit(self._fetch, site, result, limit)

    def _fetch(self, site: str, result: Any, limit: int) -> None:
        """Fetch the file of an answer into the inbox, if its size is allowed, and then deliver both."""
        path = self.inbox / f"{uuid.uuid4()}.part"
        problem, fetched = "", (0, "")
        try:
            size = self._may_come(result, limit)
            if size:
                sender = f"{site}.{self.job}"
                fetched = file_transfer.fetch(
                    self.cell, result, sender, path, size, self.abort_signal, self.pulse.moved
                )
        except (OSError, BadMessage, message_limits.TooMuch) as error:
            problem = str(error)

        def take(place: Path, most: int) -> tuple[int, str]:
            if problem or not path.exists():
                raise OSError(problem or "no file arrived")
            os.replace(path, place)
            return fetched

        reason = str(result.get("reason") or "its job process failed")[:4000]
        self.came.put(Delivery(site, result.get("answer"), take, reason, lambda: message_limits.remove(path)))

    def _may_come(self, result: Any, limit: int) -> int:
        """Return the bytes of an answer's file, as the answer announces them; 0 if there is no file.

        Raises:
            TooMuch: If they exceed the limit for the request.
            OSError: If there is no room.
        """
        if "ref" not in result and "body" not in result:
            return 0
        size = message_limits.announced(result.get("answer"))
        if size > limit:
            raise message_limits.TooMuch(f"its {size} bytes exceed the limit of {limit} bytes for this request")
        message_limits.check_room(self.inbox, size, self.limits.keep_free_megabytes)
        return size


class StudyController(Controller):  # type: ignore[misc]
    """Controller that executes one run request."""

    def __init__(self, order: str, dead_after: float = 30.0) -> None:
        """Parse the ``order`` in the signed job; a site without a sign of life for ``dead_after`` seconds is away."""
        super().__init__(task_check_period=0.1)
        self.order, self.dead_after = RunRequest.from_json(order), dead_after

    def start_controller(self, fl_ctx: Any) -> None:
        """Do nothing: there is nothing to prepare."""

    def stop_controller(self, fl_ctx: Any) -> None:
        """Do nothing: there is nothing to release."""

    def process_result_of_unknown_task(
        self, client: Any, task_name: str, client_task_id: str, result: Any, fl_ctx: Any
    ) -> None:
        """Drop an answer to a withdrawn task."""

    def control_flow(self, abort_signal: Any, fl_ctx: Any) -> None:
        """Execute the run from its checkpoint to its end."""
        home = ServerFolder(Path(fl_ctx.get_engine().get_workspace().get_root_dir()).parents[1])
        present = {client.name for client in self._engine.get_clients()}
        members = tuple(sorted(present & set(self.order.everyone)))
        folder = home.run(self.order.run)
        given = read_toml(home.settings, "polyclinic server init")
        limits = message_limits.Limits.of(given, study_runs.survey_of(home, self.order.study.get("name", "")))
        try:
            limits = replace(limits, model=model_bytes(self.order))
        except PolyclinicError as error:  # such as start weights that were removed since the run was queued
            write_failure(folder, str(error))
            raise
        carrier = FlareCarrier(self, fl_ctx, abort_signal, folder / "inbox", members, self.dead_after, limits)
        try:
            RunCoordinator(self.order, carrier, folder, members, signers=Signers(home.admitted), limits=limits).run()
        finally:
            carrier.close()
