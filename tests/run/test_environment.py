"""Compiled programs are kept for each kind of machine, in a folder that only this user writes."""

from __future__ import annotations

import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import logging

from rmjax.run import environment, stages
from tests import ROOT


@pytest.fixture(autouse=True)
def untouched(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept(tmp_path):
    line = environment.keep_compilations()
    folder = Path(jax.config.jax_compilation_cache_dir)
    assert f"kept in {folder}" in line and "JAX_COMPILATION_CACHE_DIR= turns it off" in line
    assert folder.parent == tmp_path / "rmjax" / "compiled"
    assert folder.stat().st_mode & 0o777 == 0o700
    for name, age in (("new", 1), ("old", environment.KEPT_DAYS + 1)):
        (folder / name).touch()
        os.utime(folder / name, times=(0, folder.stat().st_mtime - age * 86_400))
    (folder / "tuned").mkdir()  # as XLA does on a GPU
    os.utime(folder / "tuned", times=(0, 0))
    assert f"kept in {folder}" in environment.keep_compilations()
    assert sorted(path.name for path in folder.iterdir()) == ["new", "tuned"]


def test_each_kind_of_machine_has_its_folder(monkeypatch):
    names = set()
    for flags in ("avx2", "avx2 avx512f", "avx2"):
        about = f"processor: 0\nmodel name\t: A\nflags\t\t: {flags}\ncpu MHz: 3\n"
        monkeypatch.setattr(Path, "read_text", lambda self, about=about: about)
        names.add(environment.machine())
    assert len(names) == 2


def test_the_environment_variable_takes_precedence(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    before = jax.config.jax_compilation_cache_dir
    assert environment.keep_compilations() == "compiled programs: JAX_COMPILATION_CACHE_DIR="
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.parametrize("why", ["others may write", "a file is in the way", "no home"])
def test_a_run_continues_if_compiled_programs_cannot_be_kept(monkeypatch, tmp_path, why):
    if why == "others may write":  # JAX runs the programs in the folder
        environment.keep_compilations()
        Path(jax.config.jax_compilation_cache_dir).chmod(0o777)
        jax.config.update("jax_compilation_cache_dir", None)
    elif why == "a file is in the way":
        (tmp_path / "rmjax").touch()
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")

        def fail(self):
            raise RuntimeError("no home")

        monkeypatch.setattr(Path, "expanduser", fail)
    before = jax.config.jax_compilation_cache_dir
    line = environment.keep_compilations()
    assert "not kept" in line and "JAX_COMPILATION_CACHE_DIR=<folder>" in line
    assert jax.config.jax_compilation_cache_dir == before


def test_a_compilation_is_announced_and_timed_once_for_each_shape(caplog):
    logging.set_verbosity(logging.INFO)
    count = lambda params, batch: caplog.text.count("...")
    step = stages.announced(count, "model: compiling the train step", stages.Clock())
    batches = [{"items": np.zeros((2, rows))} for rows in (3, 3, 4)]
    assert [step((), batch) for batch in batches] == [1, 1, 2]  # announced before it begins
    assert caplog.text.count("model: compiling the train step: done in 0.0 seconds.") == 2


@pytest.mark.parametrize(
    ("files", "platforms", "nvidia"),
    [
        *(("nvidia0", "", True), ("nvidia0", "cuda,cpu", True), ("nvidia0", "gpu", True)),
        *(("nvidia0", "cpu", False), ("nvidia0", "tpu,cpu", False), ("nvidia0", "cpu,cuda", False)),
        *(("", "", False), ("accel0", "", False), ("kfd", "", False), ("kfd", "gpu", False)),
        *(("kfd nvidia0", "cuda", True), ("kfd nvidia0", "", True)),
    ],
)
def test_jax_runs_on_a_gpu_of_nvidia(monkeypatch, files, platforms, nvidia):
    seen = lambda *names: any(fnmatch(file, name) for file in files.split() for name in names)
    monkeypatch.setattr(environment, "_devices", seen)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert environment._nvidia() == nvidia


@pytest.mark.parametrize("flags", ["flags.txt", "", "  ", "--xla_gpu_enable_triton_gemm_any=true"])
def test_xla_flags_stay_and_a_child_adds_none(monkeypatch, flags):
    """XLA takes a value that does not begin with a dash as the name of a file with flags."""
    before = jax.config.jax_threefry_gpu_kernel_lowering
    monkeypatch.setenv(environment.BITS.upper(), "0")
    monkeypatch.setenv("XLA_FLAGS", flags)
    environment.prepare_gpu()
    got = os.environ["XLA_FLAGS"]
    if flags == "flags.txt":
        assert got == flags
    else:
        added = [f"--{name}={value}" for name, value in environment.GPU_FLAGS.items()]
        assert got.split() == [*flags.split(), *added]
    environment.prepare_gpu()
    assert os.environ["XLA_FLAGS"] == got
    assert jax.config.jax_threefry_gpu_kernel_lowering == before


def test_a_gpu_gets_flags_that_the_user_and_other_versions_of_jax_overrule(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    before = jax.config.jax_threefry_gpu_kernel_lowering
    try:
        monkeypatch.setattr(jax, "__version_info__", (0, 13, 0))
        monkeypatch.setenv(environment.BITS.upper(), "0")
        line = environment.prepare_gpu()
        assert os.environ["XLA_FLAGS"] == "--xla_gpu_enable_triton_gemm=true" in line
        assert not jax.config.jax_threefry_gpu_kernel_lowering
        monkeypatch.setattr(jax, "__version_info__", (0, 12, 1))
        monkeypatch.delenv(environment.BITS.upper())
        line = environment.prepare_gpu()
        flags = os.environ["XLA_FLAGS"].split()
        assert flags[0] == "--xla_gpu_enable_triton_gemm=true" and len(flags) == 2
        assert flags[1] == "--xla_gpu_experimental_enable_fusion_autotuner=false"
        assert " ".join(flags) in line and jax.config.jax_threefry_gpu_kernel_lowering
    finally:
        monkeypatch.delenv(environment.BITS.upper(), raising=False)
        jax.config.update(environment.BITS, before)


def test_this_version_of_xla_knows_the_flags_for_a_gpu():
    """XLA ends a process at a flag that it does not know."""
    flags = " ".join(f"--{name}={value}" for name, value in environment.GPU_FLAGS.items())
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    run = [sys.executable, "-c", "import jax; jax.numpy.ones(1)"]
    assert subprocess.run(run, env=environ, check=False).returncode == 0
    environ["XLA_FLAGS"] += " --xla_gpu_no_such_flag=1"
    done = subprocess.run(run, env=environ, capture_output=True, check=False)
    assert done.returncode != 0 and b"xla_gpu_no_such_flag" in done.stderr


def test_nothing_moves_to_the_host_without_an_accelerator(monkeypatch):
    device = lambda: jax.config.jax_default_device and jax.config.jax_default_device.platform
    assert environment.on_host(device) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert environment.on_host(device) == "cpu" and device() is None


@pytest.mark.parametrize("module", ["main", "bench", "load_test"])
def test_a_missing_platform_is_an_error_with_a_cure(module):
    card = "xlong" if module != "bench" else "memoria_bench"
    flags = [f"--config=configs/{card}.py", *(["--workdir=unused"] if module == "main" else [])]
    line = [sys.executable, "-m", f"rmjax.{module}", *flags]
    environ = os.environ | {"JAX_PLATFORMS": "gpus", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environ, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    cause = "JAX cannot start on JAX_PLATFORMS=gpus: Unable to initialize backend 'gpus'"
    assert cause in done.stderr
    assert "Set JAX_PLATFORMS=cpu to do without" in done.stderr


def test_a_device_without_memory_gets_a_cure():
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8005 bytes.")
    shown = environment.in_words(error)
    assert shown.startswith("RESOURCE_EXHAUSTED: Out of memory")
    assert "config.train.microbatch" in shown
    assert environment.in_words(ValueError("as it is")) == "as it is"
