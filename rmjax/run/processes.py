"""Several processes as one run: how they join, and how they end when one of them is lost."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import jax

HEARTBEAT = 30  # seconds without a heartbeat after which a process counts as lost
# Environment variables that describe a run of several processes, and the flags of main.py that take
# precedence over them.
COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
FLAGS = {COORDINATOR: "--coordinator", COUNT: "--processes", INDEX: "--process_id"}

# Errors of JAX and its collectives when another process is lost. They begin with a status.
_LOST = re.compile(
    r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED): (?!.*out of memory).*"
    r"(gloo|nccl|coordination service|heartbeat|connection (reset|closed|refused)|barrier)",
    re.IGNORECASE | re.DOTALL,
)
_ALONE = "processes: this one alone"


def join(
    coordinator: str | None, count: int | None, index: int | None, search: bool = False
) -> str:
    """Joins the other processes of this run, if it has any. Call it before JAX computes anything.

    The processes find each other by the arguments, by the environment variables above, or as tasks
    of a SLURM step. All wait for the last one, for five minutes at most.

    Args:
      coordinator: host:port of process 0; None: the environment variable.
      count: how many processes; None: the environment variable.
      index: which of them this process is; None: the environment variable.
      search: lets JAX search for the processes (TPU pods, Kubernetes, Open MPI).

    Returns:
      One line for the log.

    Raises:
      ValueError: some of the first three are given and others are missing, or a value is invalid.
    """
    given = {name: os.environ.get(name) for name in FLAGS}
    flags = zip(FLAGS, (coordinator, count, index), strict=True)
    given |= {name: str(value) for name, value in flags if value is not None}
    if any(given.values()):
        address, processes, place = check(given)
        how: dict[str, Any] = dict(
            coordinator_address=address, num_processes=processes, process_id=place
        )
        # Within a SLURM step JAX would otherwise take one GPU only.
        how["cluster_detection_method"] = "deactivate"
        if processes == 1:
            return _ALONE
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        how = dict(cluster_detection_method="slurm") | slurm_devices(os.environ)
    elif search:
        how = {}
    else:
        return _ALONE
    jax.distributed.initialize(**how, heartbeat_timeout_seconds=HEARTBEAT)
    return (
        f"processes: number {jax.process_index()} of {jax.process_count()}, "
        f"{jax.local_device_count()} devices here"
    )


def slurm_devices(environment: Mapping[str, str]) -> dict[str, list[int]]:
    """Chooses the GPUs of a SLURM task.

    A node's only task gets all its GPUs. If a node has several tasks, JAX gives one GPU to each.

    Args:
      environment: with SLURM's variables.

    Returns:
      Arguments for `jax.distributed.initialize`.
    """
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0]
    gpus = int(environment.get("SLURM_GPUS_ON_NODE", 0))
    return {"local_device_ids": list(range(gpus))} if tasks == "1" and gpus else {}


def check(given: Mapping[str, str | None]) -> tuple[str, int, int]:
    """Checks the description of a run of several processes.

    Args:
      given: values of the three environment variables, or of their flags.

    Returns:
      The coordinator's address, the number of processes, and the index of this one.

    Raises:
      ValueError: a value is missing or invalid; names the flag.
    """
    missing = [f"{FLAGS[name]} (or {name})" for name, value in given.items() if not value]
    if missing:
        raise ValueError(
            f"a run of several processes needs {' and '.join(missing)} too: set what is missing"
        )
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
    """Whether this process is one of several; False too if JAX cannot start, so nobody knows."""
    try:
        return jax.process_count() > 1
    except (RuntimeError, AssertionError):
        return False


def lost(error: BaseException) -> str | None:
    """Recognises an error that comes from the loss of another process.

    Args:
      error: what ended this process.

    Returns:
      What to log; None if the error is this process's own.
    """
    if not several() or not _LOST.match(str(error)):
        return None
    first = str(error).strip().splitlines()[0]
    me = f"process {jax.process_index()} of {jax.process_count()}"
    return f"{me} cannot reach the others, one of them has ended ({first})"


def leave(code: int) -> None:
    """Ends this process at once. An orderly end would wait for processes that are lost.

    Args:
      code: exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
