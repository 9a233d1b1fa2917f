"""Eight simulated CPU devices, and little optimising: compiling takes longer than any of these tests runs.

Both are set before anything initialises JAX; what the environment already says wins, so
XLA_FLAGS=--xla_backend_optimization_level=3 tests the code as it runs elsewhere.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
