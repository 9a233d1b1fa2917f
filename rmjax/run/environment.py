"""What the program sets for the machine it runs on, before JAX starts its backend."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from logging import WARNING, getLogger
from pathlib import Path
from typing import Any

import jax

from rmjax.io import paths

KEPT_DAYS = 60  # a compiled program is removed after so many days
# The temporaries of a train step are hundreds of MB. By default glibc maps them anew in every step,
# and the kernel clears them 4 KiB at a time, which takes a quarter of the step.
TUNABLES = "glibc.malloc.hugetlb=1"
# Flags of XLA on an NVIDIA GPU: name -> value. XLA ends a process at a flag that it does not know,
# so they are set only for versions of JAX that know all of them. With XLA's own values a train step
# took minutes to compile: every fusion and every matrix product is compiled in many ways, by
# Triton, and each of them is timed.
GPU_FLAGS = {
    "xla_gpu_experimental_enable_fusion_autotuner": "false",  # XLA's own emitter writes fusions
    "xla_gpu_enable_triton_gemm": "false",  # cuBLAS multiplies
}
KNOWN_JAX = (0, 10), (0, 13)  # from, and before
BITS = "jax_threefry_gpu_kernel_lowering"


def prepare() -> str:
    """Sets up a Linux machine without an accelerator, or with an NVIDIA GPU.

    Call it on the first line of a main program, before JAX computes anything. In a notebook, in a
    test, or in a Python without a program, nothing is set.

    Without an accelerator: glibc reads its tunables when a process starts, so the program begins
    again, under the same process id. If GLIBC_TUNABLES is set already, it stays, and the program
    does not begin again. Afterwards a jitted call on one CPU device returns when its result is
    ready, not before.

    With an NVIDIA GPU: programs compile faster, see `prepare_gpu`.

    Returns:
      One line for the log, which says what was set.
    """
    getLogger("jax._src.xla_bridge").setLevel(WARNING)  # it logs every platform that is missing
    program = any(arg in ("-c", "-m") or not arg.startswith("-") for arg in sys.orig_argv[1:])
    hosted = (
        "ipykernel" in sys.modules or "pytest" in sys.modules or hasattr(sys, "ps1") or not program
    )
    if sys.platform != "linux" or hosted:
        return "environment: nothing set"
    if _accelerated():
        return prepare_gpu() if _nvidia() else "environment: nothing set"
    if "GLIBC_TUNABLES" not in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os.environ["GLIBC_TUNABLES"] = TUNABLES  # which ends the recursion
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    # The caller's thread computes. Two thread switches cost more than answering a query.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return (
        f"environment: GLIBC_TUNABLES={os.environ['GLIBC_TUNABLES']}, "
        "jax_cpu_enable_async_dispatch=False"
    )


def prepare_gpu() -> str:
    """Makes programs for an NVIDIA GPU compile faster.

    The flags of `GPU_FLAGS` are added to XLA_FLAGS, which XLA reads when JAX computes for the first
    time. A flag that is in XLA_FLAGS already stays as it is. If XLA_FLAGS is the name of a file
    with flags, it stays too. Random bits come from a kernel of JAX: they are the same bits, but XLA
    need not compile their generator for every draw. A value of JAX_THREEFRY_GPU_KERNEL_LOWERING in
    the environment takes precedence.

    Returns:
      One line for the log, which says what was set.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    first, last = KNOWN_JAX
    known = first <= jax.__version_info__[:2] < last
    if known and (not flags or flags.startswith("-")):  # XLA takes all else as the name of a file
        names = {flag.partition("=")[0].lstrip("-") for flag in flags.split()}
        new = [f"--{name}={value}" for name, value in GPU_FLAGS.items() if name not in names]
        flags = " ".join([flags, *new]).strip()
        os.environ["XLA_FLAGS"] = flags
    if known and BITS.upper() not in os.environ:
        os.environ[BITS.upper()] = "true"  # processes that this one starts inherit it
        jax.config.update(BITS, True)
    bits = os.environ.get(BITS.upper(), "")
    return f"environment: XLA_FLAGS={flags}, {BITS.upper()}={bits}"


def keep_compilations() -> str:
    """Keeps compiled programs for the next start, which saves a minute of compilation.

    The folder belongs to this user and this kind of machine. JAX_COMPILATION_CACHE_DIR in the
    environment takes precedence; an empty one keeps nothing. Call this before JAX compiles
    anything.

    Returns:
      One line for the log, which says where they are kept, or why they are not.
    """
    variable = "JAX_COMPILATION_CACHE_DIR"
    if variable in os.environ:
        return f"compiled programs: {variable}={os.environ[variable]}"
    try:
        folder = paths.cache("") / "compiled" / machine()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        # JAX runs the programs in this folder, so nobody else may write there.
        mine = status.st_uid == os.getuid() and not status.st_mode & 0o022
        if not mine or not os.access(folder, os.W_OK):
            raise OSError(f"{folder} is not this user's alone")
        for file in folder.iterdir():
            # A folder holds what XLA has tuned for a GPU.
            if file.is_file() and file.stat().st_mtime < time.time() - KEPT_DAYS * 86_400:
                file.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        return f"compiled programs: not kept ({error}); {variable}=<folder> keeps them there"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return f"compiled programs: kept in {folder} for the next start; {variable}= turns it off"


def find_devices() -> None:
    """Starts JAX's backend. A main program calls it before any other code does.

    Raises:
      RuntimeError: JAX_PLATFORMS names a platform that this machine, or this installation of JAX,
        does not have.
    """
    try:
        jax.devices()
    # Without its CUDA or TPU packages, JAX raises an AssertionError without a text.
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        cause = str(error).partition("(set JAX_PLATFORMS")[0].strip()
        cause = (cause or "it knows no such device").rstrip(".")
        raise RuntimeError(
            f"JAX cannot start{asked and f' on JAX_PLATFORMS={asked}'}: {cause}. Set "
            "JAX_PLATFORMS=cpu to do without an accelerator, or install what it needs: "
            "pip install 'rmjax[cuda]' or 'rmjax[tpu]'"
        ) from error


def on_host(function: Callable[..., Any], *args: Any) -> Any:
    """Calls what an accelerator would only compile slowly, such as the draws of parameters.

    A program that runs once is compiled for longer than it runs. A GPU took 44 seconds to compile
    the draws that a CPU compiles in 2. On the CPU the draws are also the same on every platform.

    Args:
      function: runs on the CPU of this machine, unless JAX_PLATFORMS leaves it out.
      *args: its arguments.

    Returns:
      The result, as host arrays.
    """
    with contextlib.ExitStack() as stack:
        if jax.default_backend() != "cpu":
            with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS has no CPU
                stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        return jax.device_get(function(*args))


def in_words(error: BaseException) -> str:
    """The text of an error. An error of device memory gets a cure.

    Args:
      error: any error.

    Returns:
      What to log.
    """
    # A full disk is RESOURCE_EXHAUSTED too, without the word memory.
    if not {"RESOURCE_EXHAUSTED", "memory"} <= {*re.findall(r"\w+", str(error))}:
        return str(error)
    return (
        f"{error} Set config.train.microbatch, or lower config.train.batch_size, "
        "config.data.segment_length or the sizes of the model; --mode=explain shows the bytes that "
        "a step needs"
    )


def machine() -> str:
    """A name for the kind of CPU.

    Machines that share a home directory may differ, and a program that was compiled for one may be
    wrong for another.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text()
        about = re.findall(r"(?m)^(?:model name|flags|Features)\s*:.*$", lines)
    except OSError:
        about = [platform.processor()]
    digest = hashlib.sha256(repr(sorted(set(about))).encode()).hexdigest()[:8]
    return f"{platform.machine()}-{digest}"


def simulate(devices: int) -> None:
    """Makes a machine without an accelerator show several CPU devices.

    Call it before JAX computes anything.

    Args:
      devices: how many; 0 and 1 change nothing.
    """
    if devices > 1 and not _accelerated():
        jax.config.update("jax_num_cpu_devices", devices)


def _accelerated() -> bool:
    """Whether JAX would run on something else than the CPU; JAX is not started."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms != "cpu"
    return _nvidia() or _devices("kfd", "accel*", "vfio/[0-9]*")


def _nvidia() -> bool:
    """Whether JAX would run on a GPU of NVIDIA; JAX is not started."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        first = platforms.split(",")[0]
        return first == "cuda" or (first == "gpu" and not _devices("kfd"))  # kfd: a GPU of AMD
    return _devices("nvidia[0-9]*")


def _devices(*names: str) -> bool:
    """Whether /dev has a file with such a name."""
    return any(any(Path("/dev").glob(name)) for name in names)
