"""Executor that FLARE instantiates in a site's job process; it passes calls to the site agent and returns its answers.

One of the two classes of this package that FLARE may instantiate. It never raises, because a failing job process ends
the whole job, and it does not import PyTorch.
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
    """Executor of one job through a site agent."""

    def __init__(self, order: str) -> None:
        """Parse the ``order`` in the signed job at the start of the run."""
        super().__init__()
        self.text = order
        self.agent: SiteAgent | None = None
        self.stopped = False
        self.problem = "see the site's log"

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        """Open the site agent when the run starts and close it when it ends."""
        if event_type == EventType.START_RUN:
            self._open(fl_ctx)
            heartbeat.answer(fl_ctx.get_engine().get_cell())
        elif event_type in (EventType.ABOUT_TO_END_RUN, EventType.END_RUN):
            self.stopped = True
            if self.agent:
                self.agent.close()

    def _open(self, fl_ctx: Any) -> None:
        home = SiteFolder(Path(fl_ctx.get_engine().get_workspace().get_root_dir()).parent)
        try:
            self.agent = SiteAgent(home, RunRequest.from_json(self.text), lambda: self.stopped)
            self.agent.trainer.warm()
        except (InvalidRunRequest, SetupError, OSError) as error:
            self.log_error(fl_ctx, f"the site agent cannot be opened: {printable(str(error))}")
            if isinstance(error, InvalidRunRequest):  # safe to report: its text derives from the server's request
                self.problem = printable(str(error))

    def execute(self, task_name: str, shareable: Any, fl_ctx: Any, abort_signal: Any) -> Any:
        """Answer one call."""
        if self.agent is None:
            self._open(fl_ctx)  # the disk may have been full when the run started
        agent = self.agent
        if agent is None:
            return Shareable({"answer": None, "reason": f"failed: its site agent cannot be opened; {self.problem}"})
        cell = fl_ctx.get_engine().get_cell()
        agent.trainer.stopped = lambda: self.stopped or abort_signal.triggered
        body: Path | None = None
        try:
            call = Call.from_json(shareable.get("call"))
            refusal = agent.before(call)  # checked before anything is fetched
            if refusal is not None:
                return Shareable({"answer": refusal.to_json()})
            if call.size:
                fetch = self._fetch_weights if call.kind == "weights" else self._fetch
                body = fetch(agent, cell, call, shareable, f"server.{fl_ctx.get_job_id()}", abort_signal)
            answer, file = agent.answer(call, body)
            attachment = file_transfer.offer(cell, file, 1) if file else {}
            return Shareable({"answer": answer.to_json(), **attachment})
        except Exception as error:
            known = isinstance(error, BadMessage | OSError)
            reason = printable(str(error)) if known else f"{type(error).__name__}; see the site's log"
            self.log_exception(fl_ctx, "a message was refused")
            with suppress(OSError):  # the disk may be full; the server's journal records it
                agent.note_refusal("message refused", {"reason": reason})
            return Shareable({"answer": None, "reason": f"refused: {reason}"})
        finally:
            message_limits.remove(body, agent.memory.folder / "received")

    def _fetch(self, agent: SiteAgent, cell: Any, call: Call, attachment: Any, sender: str, abort_signal: Any) -> Path:
        """Fetch the file of a call to this site's disk.

        Raises:
            BadMessage: If it is not the file that the message names.
            OSError: If it cannot be fetched.
        """
        path = agent.memory.folder / "received"
        if file_transfer.fetch(cell, attachment, sender, path, call.size, abort_signal) != (call.size, call.sha256):
            raise BadMessage("the file is not the one that its message names")
        return take_in(agent.memory, path, call.number)

    def _fetch_weights(
        self, agent: SiteAgent, cell: Any, call: Call, attachment: Any, sender: str, stopped: Any
    ) -> Path:
        """Fetch start weights, after the part that came before an interruption; exceptions as of ``_fetch``."""
        path = agent.memory.weights
        if file_transfer.fetch(cell, attachment, sender, path, call.size, stopped, resume=True) != (
            call.size,
            call.sha256,
        ):
            path.unlink()
            agent.memory.count_wrong_weights()
            raise BadMessage("the file is not the one that its message names")
        return path
