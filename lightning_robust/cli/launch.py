# SPDX-License-Identifier: Apache-2.0
"""What the processes of one run must agree on before they can talk to each other: the run folders.

Lightning starts the further processes of ``--trainer.devices 2 --trainer.strategy ddp`` by repeating the command
line; they find the plan of the first process in the environment. Processes that torchrun or SLURM started at the same
time get it through torchrun's store, or a file named after the SLURM step.
"""

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning_robust.cli.errors import CommandError, UsageError
from lightning_robust.cli.folders import write_json

__all__ = ["PLAN", "forget_plan", "is_first_process", "receive_plan", "share_plan"]

PLAN = "LIGHTNING_ROBUST_PLAN"
_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
_PATIENCE = 300.0  # seconds; the first process may still be importing from a slow disk


def is_first_process() -> bool:
    """Whether this process decides, writes and speaks for all processes of the run."""
    for name in _RANKS:
        if name in os.environ:
            return int(os.environ[name]) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0
    return int(os.environ.get("NODE_RANK", 0)) == 0


def share_plan(plan: dict[str, Any], out: Path) -> None:
    """Hand the plan of the first process to those that run beside it and to those that it will start.

    Args:
        plan: What to hand over, as JSON can hold it.
        out: Folder that holds the run folders.
    """
    os.environ[PLAN] = json.dumps(plan)
    if (store := _store()) is not None:
        store.set(PLAN, os.environ[PLAN])
    elif (path := _slurm_file(out)) is not None:
        write_json(path, plan)


def receive_plan(out: Path) -> dict[str, Any]:
    """The plan of the first process, in any other process.

    Args:
        out: Folder that holds the run folders.

    Raises:
        CommandError: If there is no way to get it, or it does not come.
    """
    if PLAN in os.environ:
        text = os.environ[PLAN]
    elif (store := _store()) is not None:
        store.wait([PLAN], timedelta(seconds=_PATIENCE))
        text = store.get(PLAN).decode()
    elif (path := _slurm_file(out)) is not None:
        text = _wait_for(path)
    else:
        raise UsageError(
            "This process is not the first of its run and cannot find out its run folder.",
            "Start several nodes with torchrun or srun.",
        )
    plan: dict[str, Any] = json.loads(text)
    return plan


def forget_plan() -> None:
    """Take the plan out of the environment at the end of a run, for programs that start several."""
    os.environ.pop(PLAN, None)


def _store() -> Any:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False)  # type: ignore[attr-defined]
    # A restarted group of workers makes a new plan.
    prefix = f"lightning-robust/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


def _slurm_file(out: Path) -> Path | None:
    if "SLURM_PROCID" not in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) < 2:
        return None
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return out / ("." + "-".join(["plan", *(os.environ.get(name, "0") for name in names)]) + ".json")


def _wait_for(path: Path) -> str:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        time.sleep(0.1)
    raise CommandError(f"The first process of the run did not write {path} in {_PATIENCE:.0f} seconds.")
