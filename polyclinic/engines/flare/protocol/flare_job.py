"""A run request as a FLARE job: configuration only. A job contains no code, and no site would execute it."""

import json
import shutil
from pathlib import Path
from typing import Any

from polyclinic.engines.flare.protocol.run_request import RunRequest

TASK = "polyclinic"
CONTROLLER = "polyclinic.engines.flare.server.controller.StudyController"
EXECUTOR = "polyclinic.engines.flare.client.executor.SiteExecutor"


def write(folder: Path, order: RunRequest, interval: float = 0.2, dead_after: float = 30.0) -> Path:
    """Write the job of ``order`` to ``folder``, to be signed and submitted by the coordinator.

    Args:
        interval: Seconds after which an idle site polls again.
        dead_after: Seconds without a heartbeat after which a site counts as away.
    """
    if folder.exists():
        shutil.rmtree(folder)
    (folder / "app" / "config").mkdir(parents=True)
    text = order.to_json()
    empty: dict[str, Any] = {"format_version": 2, "task_data_filters": [], "task_result_filters": [], "components": []}
    server = {
        **empty,
        "server": {"heart_beat_timeout": dead_after, "task_request_interval": interval},
        "workflows": [{"id": TASK, "path": CONTROLLER, "args": {"order": text, "dead_after": dead_after}}],
        "dead_client_grace_period": dead_after / 2,
        "dead_client_check_lead_time": dead_after / 2,
    }
    site = {
        **empty,
        "executors": [{"tasks": [TASK], "executor": {"path": EXECUTOR, "args": {"order": text}}}],
        "default_task_fetch_interval": interval,
        # A busy server may need minutes to load PyTorch; by default FLARE fails the job after one minute.
        "max_runner_sync_timeout": 600.0,
    }
    meta = {
        "name": order.run,
        "resource_spec": {},
        "min_clients": 1,
        "deploy_map": {"app": ["server", *order.everyone]},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "app" / "config" / "config_fed_server.json").write_text(json.dumps(server))
    (folder / "app" / "config" / "config_fed_client.json").write_text(json.dumps(site))
    return folder
