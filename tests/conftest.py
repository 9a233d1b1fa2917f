"""Eight simulated CPU devices, and compilation with few optimisations.

Compiling takes longer than any of these tests runs. The settings are made before JAX is
initialised. Values in the environment win, so this tests the code as it runs elsewhere:

    XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true" pytest
"""

import os
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
FASTER = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
if version("jaxlib").startswith("0.10."):  # other versions abort at an unknown flag
    FASTER += "--xla_cpu_use_fusion_emitters=false "  # compiles in half the time
os.environ["XLA_FLAGS"] = FASTER + os.environ.get("XLA_FLAGS", "")

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
