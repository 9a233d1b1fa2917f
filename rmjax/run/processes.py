"""Several processes as one run: how they find each other, and how they end when one of them is gone."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import jax

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as gone
# Names of the three that say it all, as flags of main.py and in the environment.
COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
FLAGS = {COORDINATOR: "--coordinator", COUNT: "--processes", INDEX: "--process_id"}

# What JAX and its collectives say where another process is gone; a status comes first.
_LOST = re.compile(
    r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED): (?!.*out of memory).*"
    r"(gloo|nccl|coordination service|heartbeat|connection (reset|closed|refused)|barrier)",
    re.IGNORECASE | re.DOTALL,
)


def join(
    coordinator: str | None, count: int | None, index: int | None, search: bool = False
) -> str:
    """Joins the other processes of this run, if it has any; -> one line about it. Before JAX computes anything.

    They are found by the arguments, by the environment variables above, as tasks of a SLURM step, or with `search`
    by whatever JAX knows (TPU pods, Kubernetes, Open MPI). All wait here for the last one, five minutes at most.

    Raises:
      ValueError: some of the three are given and others not, or they cannot be.
    """
    given = {name: os.environ.get(name) for name in FLAGS}
    given |= {
        n: str(v) for n, v in zip(FLAGS, (coordinator, count, index), strict=True) if v is not None
    }
    if any(given.values()):
        address, processes, place = check(given)
        how: dict[str, Any] = dict(
            coordinator_address=address, num_processes=processes, process_id=place
        )
        how["cluster_detection_method"] = "deactivate"  # within a SLURM step it would take one GPU
        if processes == 1:
            return "processes: this one alone"
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        how = dict(cluster_detection_method="slurm") | slurm_devices(os.environ)
    elif search:
        how = {}
    else:
        return "processes: this one alone"
    jax.distributed.initialize(**how, heartbeat_timeout_seconds=HEARTBEAT)
    return f"processes: number {jax.process_index()} of {jax.process_count()}, {jax.local_device_count()} devices here"


def slurm_devices(environment: Mapping[str, str]) -> dict[str, Any]:
    """The only task of a node has all its GPUs; of several, JAX gives each one."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0]
    gpus = int(environment.get("SLURM_GPUS_ON_NODE", 0))
    return {"local_device_ids": list(range(gpus))} if tasks == "1" and gpus else {}


def check(given: Mapping[str, str | None]) -> tuple[str, int, int]:
    """-> coordinator, how many processes, which one this is."""
    missing = [f"{FLAGS[name]} (or {name})" for name, value in given.items() if not value]
    if missing:
        raise ValueError(f"of several processes {' and '.join(missing)} must be given too")
    address = str(given[COORDINATOR])
    if not address.rpartition(":")[2].isdecimal() or ":" not in address:
        raise ValueError(f"--coordinator={address}: must be host:port, of process 0")
    numbers = []
    for name in (COUNT, INDEX):
        if not str(given[name]).isdecimal():
            raise ValueError(f"{FLAGS[name]}={given[name]}: must be a whole number")
        numbers.append(int(str(given[name])))
    if numbers[1] >= numbers[0]:
        raise ValueError(f"--process_id={numbers[1]}: must be below --processes={numbers[0]}")
    return address, numbers[0], numbers[1]


def several() -> bool:
    """Whether this process is one of several; False too where JAX cannot start, so that nobody knows."""
    try:
        return jax.process_count() > 1
    except (RuntimeError, AssertionError):
        return False


def lost(error: BaseException) -> str | None:
    """What to say if `error` is that another process is gone; None if it is an error of this one's own."""
    if not several() or not _LOST.match(str(error)):
        return None
    first = str(error).strip().splitlines()[0]
    me = f"process {jax.process_index()} of {jax.process_count()}"
    return f"{me} cannot reach the others, one of them has ended ({first})"


def leave(code: int) -> None:
    """Ends this process at once: an orderly end would wait for those that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
