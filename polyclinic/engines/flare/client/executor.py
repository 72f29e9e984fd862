"""At a site, what FLARE's job process runs: it hands calls to the desk and brings back its answers.

One of the two classes of ours that FLARE may build. It never raises, for a job process that fails takes the whole job
with it; and it imports no PyTorch.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.shareable import Shareable

from polyclinic.engines.flare.client import heartbeat
from polyclinic.engines.flare.client.site_agent import SiteAgent, take_in
from polyclinic.engines.flare.protocol import file_transfer, message_limits
from polyclinic.engines.flare.protocol.messages import BadMessage, Call, printable
from polyclinic.engines.flare.protocol.paths import SetupError, SiteFolder
from polyclinic.engines.flare.protocol.run_request import InvalidRunRequest, RunRequest


class SiteExecutor(Executor):  # type: ignore[misc]
    """Does what a desk allows, for one job."""

    def __init__(self, order: str) -> None:
        """For the ``order`` in the signed job."""
        super().__init__()
        self.text = order
        self.desk: SiteAgent | None = None
        self.stopped = False
        self.problem = "the site's log says more"

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        """Opens the desk when the run starts and closes it when it ends."""
        if event_type == EventType.START_RUN:
            self._open(fl_ctx)
            heartbeat.answer(fl_ctx.get_engine().get_cell())
        elif event_type in (EventType.ABOUT_TO_END_RUN, EventType.END_RUN):
            self.stopped = True
            if self.desk:
                self.desk.close()

    def _open(self, fl_ctx: Any) -> None:
        home = SiteFolder(Path(fl_ctx.get_engine().get_workspace().get_root_dir()).parent)
        try:
            self.desk = SiteAgent(home, RunRequest.from_json(self.text), lambda: self.stopped)
            self.desk.trainer.warm()
        except (InvalidRunRequest, SetupError, OSError) as error:
            self.log_error(fl_ctx, f"the desk cannot be opened: {printable(str(error))}")
            if isinstance(
                error, InvalidRunRequest
            ):  # perhaps of another version; what it says comes from the server itself
                self.problem = printable(str(error))

    def execute(self, task_name: str, shareable: Any, fl_ctx: Any, abort_signal: Any) -> Any:
        """One call and its answer."""
        if self.desk is None:
            self._open(fl_ctx)  # the disk may have been full when the run started
        desk = self.desk
        if desk is None:
            return Shareable({"answer": None, "reason": f"failed: its desk cannot be opened; {self.problem}"})
        cell = fl_ctx.get_engine().get_cell()
        desk.trainer.stopped = lambda: self.stopped or abort_signal.triggered
        body: Path | None = None
        try:
            call = Call.from_json(shareable.get("call"))
            refusal = desk.before(call)  # nothing is fetched that may not come
            if refusal is not None:
                return Shareable({"answer": refusal.to_json()})
            if call.size:
                body = self._fetch(desk, cell, call, shareable, f"server.{fl_ctx.get_job_id()}", abort_signal)
            answer, file = desk.answer(call, body)
            beside = file_transfer.offer(cell, file, 1) if file else {}
            return Shareable({"answer": answer.to_json(), **beside})
        except Exception as error:
            known = isinstance(error, BadMessage | OSError)
            reason = printable(str(error)) if known else f"{type(error).__name__}; the site's log says more"
            self.log_exception(fl_ctx, "a message was refused")
            with suppress(OSError):  # the disk may be full; then nothing leaves, and the server's journal names us
                desk.note_refusal("message refused", {"reason": reason})
            return Shareable({"answer": None, "reason": f"refused: {reason}"})
        finally:
            message_limits.remove(
                body, desk.memory.folder / "received"
            )  # whatever came of it, it is not needed any more

    def _fetch(self, desk: SiteAgent, cell: Any, call: Call, beside: Any, sender: str, abort_signal: Any) -> Path:
        """The file of a call, on this site's disk.

        Raises:
            BadMessage: If it is not the one that its message names.
            OSError: If it cannot be had.
        """
        path = desk.memory.folder / "received"
        if file_transfer.fetch(cell, beside, sender, path, call.size, abort_signal) != (call.size, call.sha256):
            raise BadMessage("the file is not the one that its message names")
        return take_in(desk.memory, path, call.number)
