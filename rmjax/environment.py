"""What the program sets for the machine it runs on, before JAX starts its backend."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax

# A train step's temporaries are hundreds of MB. Left alone, glibc maps them anew in every step, and the kernel clears
# them 4 KiB at a time: a quarter of the step.
TUNABLES = "glibc.malloc.hugetlb=1"


def prepare() -> str:
    """Sets up a Linux machine without an accelerator; -> one line saying what was set.

    Call it first: glibc reads its tunables as a process starts, so it begins the process again, under the same id.
    Whatever the user has set stays. In a notebook or a test nothing is set.
    """
    if sys.platform != "linux" or "ipykernel" in sys.modules or "pytest" in sys.modules or _accelerated():
        return "environment: nothing set"
    if "GLIBC_TUNABLES" not in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os.environ["GLIBC_TUNABLES"] = TUNABLES  # set from here on, which ends the recursion
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    # The caller's thread computes: handing over to another and back costs more than answering a query.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return f"environment: GLIBC_TUNABLES={os.environ['GLIBC_TUNABLES']}, jax_cpu_enable_async_dispatch=False"


def _accelerated() -> bool:
    """Whether JAX would run on something else than the CPU, found without starting it."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms != "cpu"
    return any(any(Path("/dev").glob(name)) for name in ("nvidia[0-9]*", "kfd", "accel*", "vfio/[0-9]*"))
