"""Component of FLARE's parent process at a site that records the last contact with the server and its refusals.

FLARE's heartbeat events fire whether or not the server answered. This component therefore inspects the replies
themselves and writes ``connection.json``, from which ``polyclinic site status`` reports whether the server can be
reached and whether this site may still take part. The file contains times, so that its age remains visible after this
process was killed.
"""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.fuel.f3.cellnet.defs import CellChannelTopic, MessageHeaderKey, ReturnCode

from polyclinic.core.atomic import write_private
from polyclinic.engines.flare.protocol.paths import SetupError, SiteFolder, read_json

EVERY = 2.0
NOT_FROM_THERE = (ReturnCode.TIMEOUT, ReturnCode.TARGET_UNREACHABLE, ReturnCode.COMM_ERROR, ReturnCode.INVALID_TARGET)
REFUSALS = (ReturnCode.UNAUTHENTICATED, ReturnCode.AUTHENTICATION_ERROR)


class Connection(FLComponent):  # type: ignore[misc]
    """Observer of the server's replies to this site."""

    def __init__(self) -> None:
        super().__init__()
        self.home: SiteFolder | None = None
        self.heard = self.written = 0.0
        self.refused = ""

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        """Start to observe when the process starts, before it has registered."""
        if event_type != EventType.SYSTEM_BOOTSTRAP:
            return
        engine = fl_ctx.get_engine()
        self.home = SiteFolder(Path(engine.args.workspace).resolve().parent)
        with suppress(SetupError, OSError):  # a revoked site remains revoked when it restarts
            self.refused = str(read_json(self.home.path / "connection.json", default={"refused": ""})["refused"])
        engine.get_cell().core_cell.add_incoming_reply_filter("*", "*", self.note)

    def note(self, reply: Any) -> None:
        """Record a reply, at most every ``EVERY`` seconds unless the refusal changes."""
        code = reply.get_header(MessageHeaderKey.RETURN_CODE)
        if str(reply.get_header(MessageHeaderKey.ORIGIN, "")).partition(".")[0] != "server" or code in NOT_FROM_THERE:
            return
        before, self.heard = self.refused, time.time()
        if code in REFUSALS:
            self.refused = str(reply.get_header(MessageHeaderKey.ERROR) or code)[:500]
        elif code == ReturnCode.OK and reply.get_header(MessageHeaderKey.TOPIC) == CellChannelTopic.HEART_BEAT:
            self.refused = ""  # the server answers only registered sites' heartbeats
        if self.home is not None and (self.refused != before or self.heard - self.written > EVERY):
            self.written = self.heard
            text = json.dumps({"heard": self.heard, "refused": self.refused})
            try:
                write_private(self.home.path / "connection.json", text, durable=False)
            except OSError:  # such as a full disk: the old time remains, and shows its age
                self.written = 0.0
