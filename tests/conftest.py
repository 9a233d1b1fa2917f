"""Eight simulated CPU devices, and compilation with few optimisations.

Compiling takes longer than any of these tests runs. The settings are made before JAX is
initialised. All processes of a session share what they have compiled, in a folder that is removed
at the end. Values in the environment win, so this tests the code as it runs elsewhere:

    XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true" pytest
"""

import atexit
import os
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
FASTER = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
if version("jaxlib").startswith("0.10."):  # other versions abort at an unknown flag
    FASTER += "--xla_cpu_use_fusion_emitters=false "  # compiles in half the time
os.environ["XLA_FLAGS"] = FASTER + os.environ.get("XLA_FLAGS", "")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # xdist's workers have that of their parent
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="rmjax-compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def room_for_compiled_code():
    """Frees compiled programs. Each holds memory maps; Linux allows 65,530, then XLA aborts."""
    begin = time.monotonic()
    yield
    maps = Path("/proc/self/maps")
    if time.monotonic() - begin > 0.5 and maps.exists() and maps.read_text().count("\n") > 40_000:
        jax.clear_caches()
