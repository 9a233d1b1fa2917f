"""What the program sets for the machine it runs on, before JAX starts its backend."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
import time
from logging import WARNING, getLogger
from pathlib import Path

import jax

from rmjax.io import paths

KEPT_DAYS = 60  # of a compiled program
# A train step's temporaries are hundreds of MB. Left alone, glibc maps them anew in every step, and the kernel clears
# them 4 KiB at a time: a quarter of the step.
TUNABLES = "glibc.malloc.hugetlb=1"


def prepare() -> str:
    """Sets up a Linux machine without an accelerator; -> one line saying what was set.

    Call it on the first line of a main program: glibc reads its tunables as a process starts, so the program begins
    again, under the same process id; and JAX must not have computed anything yet. A GLIBC_TUNABLES that is set stays,
    and nothing begins again. In a notebook, a test or a Python that was given no program nothing is set.
    From here on a jitted call on one CPU device returns when its result is there, not before.
    """
    getLogger("jax._src.xla_bridge").setLevel(
        WARNING
    )  # it tells of every platform that is not here
    program = any(arg in ("-c", "-m") or not arg.startswith("-") for arg in sys.orig_argv[1:])
    hosted = (
        "ipykernel" in sys.modules or "pytest" in sys.modules or hasattr(sys, "ps1") or not program
    )
    if sys.platform != "linux" or hosted or _accelerated():
        return "environment: nothing set"
    if "GLIBC_TUNABLES" not in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os.environ["GLIBC_TUNABLES"] = TUNABLES  # set from here on, which ends the recursion
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    # The caller's thread computes: handing over to another and back costs more than answering a query.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return f"environment: GLIBC_TUNABLES={os.environ['GLIBC_TUNABLES']}, jax_cpu_enable_async_dispatch=False"


def keep_compilations() -> str:
    """Keeps compiled programs for the next start, which then reads what takes a minute to compile.

    The folder belongs to this user and this kind of machine. JAX_COMPILATION_CACHE_DIR in the
    environment wins; an empty one keeps nothing. Call this before JAX compiles anything.

    Returns:
      One line that says where they are kept, or why not.
    """
    off = "JAX_COMPILATION_CACHE_DIR= turns it off"
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return f"compiled programs: JAX_COMPILATION_CACHE_DIR={os.environ['JAX_COMPILATION_CACHE_DIR']}"
    try:
        folder = paths.cache("") / "compiled" / _machine()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (
            folder.stat().st_uid != os.getuid()
            or folder.stat().st_mode & 0o022
            or not os.access(folder, os.W_OK)
        ):
            raise OSError(f"{folder} is not this user's alone")  # what lies there is run
        for file in folder.iterdir():
            if file.stat().st_mtime < time.time() - KEPT_DAYS * 86_400:
                file.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        return f"compiled programs: not kept ({error}); JAX_COMPILATION_CACHE_DIR=<folder> keeps them there"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return f"compiled programs: kept in {folder} for the next start; {off}"


def find_devices() -> None:
    """Starts JAX's backend; a main program calls it before anything else does.

    Raises:
      RuntimeError: JAX_PLATFORMS names what this machine, or this installation of JAX, does not have.
    """
    try:
        jax.devices()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # jax without its CUDA or TPU packages asserts, and says nothing
        asked = os.environ.get("JAX_PLATFORMS", "")
        cause = (
            str(error).partition("(set JAX_PLATFORMS")[0].strip() or "it knows no such device"
        ).rstrip(".")
        raise RuntimeError(
            f"JAX cannot start{asked and f' on JAX_PLATFORMS={asked}'}: {cause}. Set JAX_PLATFORMS=cpu to do without "
            "an accelerator, or install what it needs: pip install 'rmjax[cuda]' or 'rmjax[tpu]'"
        ) from error


def in_words(error: BaseException) -> str:
    """What to say of an error: one of memory gets its cure."""
    if not {"RESOURCE_EXHAUSTED", "memory"} <= {
        *re.findall(r"\w+", str(error))
    }:  # full disks have the first
        return str(error)
    return (
        f"{error} Set config.train.microbatch, or lower config.train.batch_size, config.data.segment_length or the "
        "sizes of the model; --mode=explain says what a step takes"
    )


def _machine() -> str:
    """A name for the kind of CPU. Machines that share a home directory may differ, and programs compiled
    for one may be wrong for another.
    """
    try:
        about = re.findall(
            r"(?m)^(?:model name|flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text()
        )
    except OSError:
        about = [platform.processor()]
    return (
        f"{platform.machine()}-{hashlib.sha256(repr(sorted(set(about))).encode()).hexdigest()[:8]}"
    )


def simulate(devices: int) -> None:
    """A machine without an accelerator shows so many CPU devices; JAX must not have computed anything yet."""
    if devices > 1 and not _accelerated():
        jax.config.update("jax_num_cpu_devices", devices)


def _accelerated() -> bool:
    """Whether JAX would run on something else than the CPU, found without starting it."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms != "cpu"
    return any(
        any(Path("/dev").glob(name)) for name in ("nvidia[0-9]*", "kfd", "accel*", "vfio/[0-9]*")
    )
