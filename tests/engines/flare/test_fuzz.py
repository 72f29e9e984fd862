"""Every decoder under damaged bytes: words or a value, never a crash, a hang or memory without bound. A minute
each, slowly.
"""

import json
import random
import resource
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.core import serialization as states
from polyclinic.core.aggregates import PerSite, Reply, WeightedMean
from polyclinic.core.audit_log import Broken, Journal, verify
from polyclinic.data.examples import Examples
from polyclinic.engines.flare.client import proxies
from polyclinic.engines.flare.pki import certificate_authority as authorities
from polyclinic.engines.flare.pki import site_keys
from polyclinic.engines.flare.pki.certificate_authority import Authority
from polyclinic.engines.flare.protocol import tensor_file
from polyclinic.engines.flare.protocol.messages import VERSION, Answer, BadMessage, Call
from polyclinic.engines.flare.protocol.paths import SetupError
from polyclinic.engines.flare.protocol.run_request import InvalidRunRequest, RunRequest
from polyclinic.engines.plan import Plan
from polyclinic.engines.policy.site_policy import DEFAULT, BadPolicy, parse
from polyclinic.engines.site_description import PART, checked, describe, read_description
from polyclinic.secure_aggregation.secure_messages import Advert
from polyclinic.studies.config import study_config
from polyclinic.studies.config.diagnostics import BadStudy
from tests.support.clinics import STUDY
from tests.support.local_deployment import order

QUICK, LONG = 0.3, 60.0
GROWTH = 400  # megabytes that a minute of hostile bytes may leave behind or need at once
SLOWEST = 5.0  # seconds that one piece of hostile bytes may take, on a busy machine
Decoder = tuple[bytes, Callable[[bytes], Any], tuple[type[Exception], ...]]


def decoders(root: Path) -> dict[str, Decoder]:
    """By name: something right to begin with, what reads it, and how it may refuse."""
    call = Call(VERSION, "run-1", 7, "site-1", "a" * 64, 10, "b" * 64, "do", "c" * 64, 2, "train", 5, 3, 4, 0.0, "")
    answer = Answer(VERSION, "run-1", 7, "site-1", "a" * 64, 10, "b" * 64, "", False, 1.5, "d" * 64, "", "sig")
    reply = Reply({"update": WeightedMean({"w": torch.randn(4, 4)}, 2.0), "g": PerSite({"a": {"x": torch.arange(3)}})})
    study = {"name": "x", "hash": "h", "arms": [{"label": "a", "plan": order().plan}]}
    an = RunRequest(**{**json.loads(order().to_json()), "study": study, "best": {"metric": "auc", "higher": True}})
    few = tuple(map(str, range(12)))
    data = {"train": Examples(torch.zeros(12, 1, 8, 8), torch.arange(12) % 2, few, few)}
    said = json.dumps(describe(data, "classification"), sort_keys=True).encode()
    authority = Authority.make(root / "ca", "fuzz")
    request = authorities.request(root / "keys", "site-1", "hospital", "0")
    join = authorities.join_file(authority, request, {"project": "fuzz", "host": "h", "port": 1, "scheme": "grpc"})
    key = site_keys.load(root / "keys" / "site.key")
    journal = Journal(root / "made.jsonl")
    for i in range(5):
        journal.write("event", {"n": i})
    journal.close()

    def on_disk(read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
        def written(data: bytes) -> Any:
            (root / "file").write_bytes(data)
            return read(root / "file")

        return written

    def text(read: Callable[[str], Any]) -> Callable[[bytes], Any]:
        return lambda data: read(data.decode(errors="replace"))

    def table(read: Callable[[Any], Any]) -> Callable[[bytes], Any]:
        def loaded(data: bytes) -> Any:
            try:
                value = json.loads(data)
            except (ValueError, RecursionError):
                return None
            return read(value)

        return loaded

    def leaf(data: bytes) -> Any:
        return read_description(
            Reply({PART: PerSite({"a": {"text": torch.tensor(list(data), dtype=torch.uint8)}})}), "a"
        )

    def proxy(data: bytes) -> Any:
        return proxies.check(data.decode(errors="replace"))

    return {
        "calls": (call.to_json().encode(), text(Call.from_json), (BadMessage,)),
        "answers": (answer.to_json().encode(), text(Answer.from_json), (BadMessage,)),
        "orders": (an.to_json().encode(), text(RunRequest.from_json), (InvalidRunRequest,)),
        "plans": (json.dumps(order().plan).encode(), text(Plan.from_json), (ValueError, TypeError, RecursionError)),
        "replies": (states.encode(reply), on_disk(tensor_file.read_reply), (states.Corrupt,)),
        "states": (
            states.encode({"a": torch.randn(3), "b": Advert("a", "1", "2", "3", "4")}),
            on_disk(tensor_file.read),
            (states.Corrupt,),
        ),
        "descriptions": (said, leaf, (states.Corrupt,)),
        "tables of descriptions": (said, table(checked), (ValueError, TypeError, KeyError, AttributeError)),
        "requests": (json.dumps(request).encode(), table(authorities.check_request), (SetupError,)),
        "join files": (
            json.dumps(join).encode(),
            table(lambda t: authorities.check_join(t, [key], "site-1")),
            (SetupError,),
        ),
        "policies": (DEFAULT.encode(), parse, (BadPolicy,)),
        "studies": (STUDY.encode(), text(study_config.parse), (BadStudy,)),
        "journals": ((root / "made.jsonl").read_bytes(), on_disk(lambda path: list(verify(path))), (Broken,)),
        "proxies": (b"http://proxy.hospital.org:3128", proxy, (SetupError,)),
    }


NAMES = (
    "calls",
    "answers",
    "orders",
    "plans",
    "replies",
    "states",
    "descriptions",
    "tables of descriptions",
    "requests",
    "join files",
    "policies",
    "studies",
    "journals",
    "proxies",
)


def damaged(good: bytes, rng: random.Random) -> bytes:
    """``good`` with bytes changed, lost, doubled, swapped or nested; or nothing but noise."""
    data = bytearray(good)
    for _ in range(rng.randint(1, 6)):
        at, length = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 8, 64])
        match rng.randrange(8):
            case 0:
                data[at : at + 1] = rng.randbytes(1)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length]
            case 3:
                data[at:at] = rng.choice(
                    [
                        b"-1",
                        b"1e999",
                        b"null",
                        b"NaN",
                        b'"',
                        b"\\u0000",
                        b"\xff\xfe",
                        b"99999999999999999999",
                        b"{}",
                        b"[]",
                    ]
                )
            case 4:
                data[at : at + length] = rng.randbytes(length)
            case 5:
                data = data[: rng.randrange(len(data) + 1)] if rng.random() < 0.3 else data
            case 6:
                data[at:at] = rng.choice([b"[", b'{"a":', b"a = [", b"("]) * rng.choice([1, 50, 2000])
            case _:
                data[at : at + length] = bytes(reversed(data[at : at + length]))
    return rng.randbytes(rng.randrange(200)) if rng.random() < 0.02 else bytes(data)


def fuzz(name: str, decoder: Decoder, seconds: float) -> int:
    """How many damaged pieces were read or refused in time."""
    good, read, refusals = decoder
    rng, count = random.Random(zlib.crc32(name.encode())), 0
    read(good)
    until = time.monotonic() + seconds
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while time.monotonic() < until:
        data, begun = damaged(good, rng), time.process_time()
        try:
            read(data)
        except refusals:
            pass
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error} for {data[:2000]!r}") from error
        assert time.process_time() - begun < SLOWEST, f"{name}: slow for {data[:2000]!r}"
        count += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < GROWTH, f"{name}: {grown:.0f} MB more"
    return count


@pytest.fixture(scope="module")
def all_decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Decoder]:
    return decoders(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", NAMES)
def test_damaged_bytes_are_read_or_refused(name: str, all_decoders: dict[str, Decoder]) -> None:
    assert set(NAMES) == set(all_decoders)
    assert fuzz(name, all_decoders[name], QUICK) > 2


@pytest.mark.parametrize(
    ("name", "found"),
    [("states", b""), ("replies", b""), ("journals", b'{"a":' * 100_000), ("states", b"\xff" * 8)],
)
def test_what_was_found_once_stays_refused(name: str, found: bytes, all_decoders: dict[str, Decoder]) -> None:
    _, read, refusals = all_decoders[name]
    with pytest.raises(refusals):
        read(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_minute_of_damaged_bytes(name: str, all_decoders: dict[str, Decoder]) -> None:
    assert fuzz(name, all_decoders[name], LONG) > 500
