"""At the server, what FLARE's job process runs: it carries what the conductor sends, and nothing more.

The other class of ours that FLARE may build.
"""

import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvflare.apis.controller_spec import Task
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable

from polyclinic.engines.flare import transfer
from polyclinic.engines.flare.conduct import Conductor
from polyclinic.engines.flare.federation import Delivery, Ended
from polyclinic.engines.flare.homes import ServerHome
from polyclinic.engines.flare.job import TASK
from polyclinic.engines.flare.messages import Call
from polyclinic.engines.flare.order import Order


class FlareCarrier:
    """Carries calls as FLARE tasks, one a site, and takes answers as they are submitted."""

    def __init__(self, controller: Controller, fl_ctx: Any, abort_signal: Any) -> None:
        self.controller, self.fl_ctx, self.abort_signal = controller, fl_ctx, abort_signal
        self.cell = fl_ctx.get_engine().get_cell()
        self.came: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.tasks: dict[str, Task] = {}

    def post(self, calls: Sequence[Call], body: Path | None) -> None:
        """Sends each call to its site, and with each the same file."""
        beside = transfer.offer(self.cell, body, len(calls)) if body else {}
        for call in calls:
            task = Task(TASK, Shareable({"call": call.to_json(), **beside}), result_received_cb=self._received)
            self.drop(call.site)
            self.tasks[call.site] = task
            self.controller.send(task, self.fl_ctx, targets=[call.site])

    def arrived(self, seconds: float) -> Delivery | None:
        """What has come.

        Raises:
            Ended: Where the job was ended.
        """
        if self.abort_signal.triggered:
            raise Ended("the job was ended")
        try:
            site, result = self.came.get(timeout=seconds)
        except queue.Empty:
            return None

        def take(path: Path, limit: int) -> tuple[int, str]:
            return transfer.fetch(self.cell, result, site, path, limit, self.abort_signal)

        return Delivery(site, result.get("answer"), take)

    def away(self, site: str) -> bool:
        """Whether FLARE has not heard of a site for long."""
        return self.controller.get_client_disconnect_time(site) is not None

    def drop(self, site: str) -> None:
        """Withdraws a site's task."""
        task = self.tasks.pop(site, None)
        if task is not None and task.completion_status is None:
            self.controller.cancel_task(task)

    def _received(self, client_task: Any, fl_ctx: Any) -> None:
        self.came.put((client_task.client.name, client_task.result))
        client_task.result = None


class StudyController(Controller):  # type: ignore[misc]
    """Runs one order."""

    def __init__(self, order: str) -> None:
        """For the ``order`` in the signed job."""
        super().__init__(task_check_period=0.1)
        self.order = Order.from_json(order)

    def start_controller(self, fl_ctx: Any) -> None:
        """Nothing to prepare."""

    def stop_controller(self, fl_ctx: Any) -> None:
        """Nothing to tidy."""

    def process_result_of_unknown_task(
        self, client: Any, task_name: str, client_task_id: str, result: Any, fl_ctx: Any
    ) -> None:
        """An answer that nobody waits for any more is dropped."""

    def control_flow(self, abort_signal: Any, fl_ctx: Any) -> None:
        """The run, from its checkpoint to its end."""
        home = ServerHome(Path(fl_ctx.get_engine().get_workspace().get_root_dir()).parents[1])
        present = {client.name for client in self._engine.get_clients()}
        members = tuple(sorted(present & set(self.order.plan["sites"])))
        carrier = FlareCarrier(self, fl_ctx, abort_signal)
        Conductor(self.order, carrier, home.run(self.order.run), members).run()
