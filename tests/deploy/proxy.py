"""A way between a site and its server that a test can cut, stall and slow down."""

import selectors
import socket
import threading
import time
from contextlib import suppress

BLOCK = 2**16


class Proxy:
    """Listens on a port of its own and passes bytes both ways to ``target``.

    Attributes:
        rate: Bytes a second in each direction; without limit where None. ``delay``: seconds that each block waits.
        stalled: Whether bytes are held back, as by a firewall that drops packets.
    """

    def __init__(self, target: int = 0) -> None:
        self.target, self.rate, self.delay, self.stalled = target, None, 0.0, False
        self.passed = 0
        self._open: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._closed = False
        self._refusing = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, refuse: bool = True) -> None:
        """Breaks every connection, and refuses new ones until ``mend``."""
        self._refusing = refuse
        for one in list(self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Everything passes again."""
        self._refusing, self.stalled, self.rate, self.delay = False, False, None, 0.0

    def close(self) -> None:
        self._closed = True
        self.cut()
        self._listening.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            if self._refusing:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self.target), timeout=10)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            self._open |= {near, far}
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError), selectors.DefaultSelector() as ready:
            ready.register(one, selectors.EVENT_READ)
            while True:
                if self.stalled or not ready.select(0.2):
                    if self.stalled:
                        time.sleep(0.05)
                    continue
                block = one.recv(BLOCK)
                if not block:
                    break
                if self.delay:
                    time.sleep(self.delay)
                if self.rate:
                    time.sleep(len(block) / self.rate)
                while self.stalled:
                    time.sleep(0.05)
                other.sendall(block)
                self.passed += len(block)
        for end in (one, other):
            self._open.discard(end)
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            with suppress(OSError):
                end.close()
