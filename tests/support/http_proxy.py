"""Proxies between a site and its server: one that a test can cut, stall and slow down, and one for HTTP."""

import queue
import selectors
import socket
import threading
import time
from contextlib import suppress

BLOCK = 2**14
ON_THE_LINE = 64  # blocks, for each way: a megabyte


class Proxy:
    """Listens on a port of its own and passes bytes both ways to ``target``.

    Attributes:
        rate: Bytes a second in each direction; without limit where None. ``delay``: seconds that each byte is on
            its way.
        stalled: Whether bytes are held back, as by a firewall that drops packets.
        sent, received: Bytes that passed to ``target``, and from it.
    """

    def __init__(self, target: int = 0) -> None:
        self.target, self.delay, self.stalled = target, 0.0, False
        self.rate: float | None = None
        self.sent = self.received = 0
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
            for one, other, out in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pass, args=(one, other, out), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket, out: bool) -> None:
        """One direction: what is read waits on the line, and another thread lets it out when it is due."""
        line: queue.Queue[tuple[float, bytes]] = queue.Queue(ON_THE_LINE)
        threading.Thread(target=self._let_out, args=(line, one, other, out), daemon=True).start()
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
                line.put((time.monotonic() + self.delay, block))
        line.put((0.0, b""))

    def _let_out(
        self, line: "queue.Queue[tuple[float, bytes]]", one: socket.socket, other: socket.socket, out: bool
    ) -> None:
        block = b""
        with suppress(OSError):
            while True:
                due, block = line.get()
                if not block:
                    break
                time.sleep(max(0.0, due - time.monotonic()))
                if self.rate:
                    time.sleep(len(block) / self.rate)
                while self.stalled:
                    time.sleep(0.05)
                other.sendall(block)
                if out:
                    self.sent += len(block)
                else:
                    self.received += len(block)
        for end in (one, other):
            self._open.discard(end)
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            with suppress(OSError):
                end.close()
        while block:  # so that who reads never waits for room
            block = line.get()[1]


class HttpProxy:
    """Proxy at a hospital's outgoing connection: it forwards CONNECT, and counts calls (``asked``) and bytes
    (``passed``).
    """

    def __init__(self, allow: bool = True) -> None:
        self.allow, self.asked, self.passed = allow, list[str](), 0
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                line, _ = self.listening.accept()
                threading.Thread(target=self._one, args=(line,), daemon=True).start()

    def _one(self, line: socket.socket) -> None:
        with suppress(OSError, ValueError, IndexError):
            said = b""
            while b"\r\n\r\n" not in said:
                said += line.recv(4096)
            to = said.split()[1].decode()
            self.asked.append(to)
            if not self.allow:
                line.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
                line.close()
                return
            there = socket.create_connection((to.rpartition(":")[0], int(to.rpartition(":")[2])))
            line.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            for a, b in ((line, there), (there, line)):
                threading.Thread(target=self._pass, args=(a, b), daemon=True).start()

    def close(self) -> None:
        self.listening.close()

    def _pass(self, a: socket.socket, b: socket.socket) -> None:
        with suppress(OSError):
            while data := a.recv(65536):
                b.sendall(data)
                self.passed += len(data)
        for end in (a, b):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
