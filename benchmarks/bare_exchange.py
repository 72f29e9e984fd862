"""NVIDIA FLARE's own exchange and nothing else: the floor that benchmarks/flare.py compares with.

One task a site and round with one numpy array both ways, as FLARE sends arrays; every reply differs.
"""

import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.controller_spec import Task
from nvflare.apis.executor import Executor
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable


class BareController(Controller):
    def __init__(self, megabytes: float, rounds: int, report: str) -> None:
        super().__init__()
        self.array = np.arange(int(megabytes * 2**20 / 4), dtype=np.float32)
        self.rounds, self.report = rounds, report

    def start_controller(self, fl_ctx: Any) -> None: ...
    def stop_controller(self, fl_ctx: Any) -> None: ...
    def process_result_of_unknown_task(self, *_: Any) -> None: ...

    def control_flow(self, abort_signal: Any, fl_ctx: Any) -> None:
        seconds, ends = [], []
        for _ in range(self.rounds):
            begun = time.perf_counter()
            total = np.zeros_like(self.array)

            def received(client_task: Any, fl_ctx: Any, total: Any = total) -> None:
                total += client_task.result["array"]
                client_task.result = None

            task = Task("bare", Shareable({"array": self.array}), result_received_cb=received)
            sites = [client.name for client in self._engine.get_clients()]
            self.broadcast_and_wait(task, fl_ctx, targets=sites, min_responses=len(sites), abort_signal=abort_signal)
            self.array = total / len(sites)
            seconds.append(time.perf_counter() - begun)
            ends.append(time.time())
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        Path(self.report).write_text(json.dumps({"seconds": seconds, "ends": ends, "server_bytes": memory}))


class BareExecutor(Executor):
    def execute(self, task_name: str, shareable: Any, fl_ctx: Any, abort_signal: Any) -> Any:
        return Shareable({"array": shareable["array"] + 1})
