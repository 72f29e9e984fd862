"""Requests to the console in this process, and the console as a real process."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import polyclinic

PORT = 8700
HOST = f"127.0.0.1:{PORT}"


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def request(
    app: Any, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, **more: str
) -> Response:
    """One request to an application, with the headers of a browser's page of its own unless ``headers`` says else.

    A value of None in ``headers`` leaves a header out.
    """
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    given: dict[str, Any] = {"host": HOST}
    if method == "POST":
        given |= {"content-type": "application/json", "content-length": str(len(content)), "origin": f"http://{HOST}"}
    given |= {"sec-fetch-site": "same-origin", **(headers or {}), **more}
    place, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "path": place,
        "raw_path": place.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "scheme": "http",
        "server": ("127.0.0.1", PORT),
        "client": ("127.0.0.1", 1),
        "headers": [(k.lower().encode(), v.encode("latin1")) for k, v in given.items() if v is not None],
    }
    sent: list[Any] = []
    pieces = [content[i : i + 20_000] for i in range(0, len(content), 20_000)] or [b""]

    async def receive() -> dict[str, Any]:
        if pieces:
            piece = pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}
        await asyncio.sleep(3600)
        raise AssertionError("it took too long")

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(asyncio.wait_for(app(scope, receive, send), 30))
    start = next(message for message in sent if message["type"] == "http.response.start")
    whole = b"".join(message.get("body", b"") for message in sent if message["type"] == "http.response.body")
    return Response(start["status"], {k.decode().lower(): v.decode("latin1") for k, v in start["headers"]}, whole)


class Running(NamedTuple):
    """A console that runs as a process."""

    base: str
    token: str
    process: "subprocess.Popen[str]"
    begun: float

    def key(self) -> str:
        """A key for the first link."""
        return str(self.post("/api/login", {"token": self.token})["key"])

    def post(self, path: str, body: Any, **headers: str) -> Any:
        given = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        asked = urllib.request.Request(self.base + path, json.dumps(body).encode(), given)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=30) as answer:
            return json.loads(answer.read())

    def act(self, key: str, name: str, **body: Any) -> Any:
        return self.post("/api/act", {"act": name, **body}, x_polyclinic_key=key)

    def usage(self) -> tuple[float, float]:
        """CPU seconds so far, and megabytes of memory."""
        words = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        kilobytes = re.search(r"VmRSS:\s+(\d+)", status)
        assert kilobytes
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK"), int(kilobytes[1]) / 1000


@contextmanager
def console(*words: str, cwd: Path | None = None) -> Iterator[Running]:
    """``polyclinic WORDS`` as a process, with its link; ended by SIGTERM."""
    package = Path(polyclinic.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(package), "PYTHONUNBUFFERED": "1"}
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "polyclinic.cli.app", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=cwd or package,
    )
    assert process.stdout
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"(http://127\.0\.0\.1:\d+)/#(\S+)", line):
                break
        else:
            raise AssertionError("".join(said))
        yield Running(found[1], found[2], process, time.monotonic() - begun)
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()
