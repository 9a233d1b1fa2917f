"""Several processes are one run: the same numbers and files, and an end if one process is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import chex
import numpy as np
import pytest

from rmjax.run import processes, training
from tests import ROOT
from tests.runs import PLAIN, lines, saved, tiny

CARD = """
import os
from tests import runs
from tests import ROOT

def get_config(arg=""):
    if os.environ.get("LOSES_A_KEY") == os.environ["JAX_PROCESS_ID"]:
        runs.before("model step 3", lambda: {{}}["key"])
    return runs.tiny(**{changes!r})
"""


def start(tmp_path: Path, workdir: Path, count: int, changes: dict, **more) -> subprocess.Popen:
    """Starts launch/local.sh with several processes; `more` goes into their environment."""
    (tmp_path / "card.py").write_text(CARD.format(changes={"train.devices": 0} | changes))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "PYTHON": sys.executable,
    }
    flags = [f"--config={tmp_path / 'card.py'}", f"--workdir={workdir}"]
    line = [ROOT / "launch" / "local.sh", str(count), *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(
        line, env=environment | more, cwd=tmp_path, start_new_session=True, **pipes
    )


def agree(workdir: Path, expected: Path) -> None:
    """Compares two runs. Sums over devices come in another order, so numbers differ slightly."""
    got, wanted = lines(workdir), lines(expected)
    place = lambda line: (line["kind"], line["step"])
    assert list(map(place, got)) == list(map(place, wanted))
    numbers = lambda line: list(line.values())[3:]
    for line, other in zip(got, wanted, strict=True):
        message = str(line["step"])
        np.testing.assert_allclose(numbers(line), numbers(other), rtol=1e-3, err_msg=message)
    (step, leaves), (last, others) = saved(workdir), saved(expected)
    assert step == last
    chex.assert_trees_all_close(leaves, others, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="launches with bash")
def test_two_processes_are_one_run(tmp_path):
    process = start(tmp_path, tmp_path / "two", 2, PLAIN)
    training.train(tiny(**PLAIN), tmp_path / "one")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("oracle, full history") == 1  # only one process prints the table
    agree(tmp_path / "two", tmp_path / "one")
    assert (tmp_path / "two" / "results.json").exists()


def test_the_only_task_of_a_node_has_all_its_gpus():
    one = {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_GPUS_ON_NODE": "8"}
    assert processes.slurm_devices(one) == {"local_device_ids": list(range(8))}
    assert processes.slurm_devices(one | {"SLURM_STEP_TASKS_PER_NODE": "8(x4)"}) == {}
    assert processes.slurm_devices({"SLURM_STEP_TASKS_PER_NODE": "1"}) == {}


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:54171", True),
        ("INTERNAL: NCCL operation failed: remote process exited", True),
        ("INTERNAL: NCCL operation failed: out of memory", False),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate", False),
        ("runs/barrier/lock is held by pid 3: wait for it to end", False),
    ],
)
def test_errors_of_a_lost_process_are_recognised(monkeypatch, text, gone):
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    assert (processes.lost(RuntimeError(text)) is not None) == gone
    monkeypatch.setattr(processes.jax, "process_count", lambda: 1)
    assert processes.lost(RuntimeError(text)) is None


def test_the_flags_of_processes_are_checked():
    flags = dict(zip(processes.FLAGS, ("host:1", "4", "3"), strict=True))
    assert processes.check(flags) == ("host:1", 4, 3)
    for name, value, words in [
        (processes.COUNT, None, r"needs --processes \(or JAX_NUM_PROCESSES\) too: set"),
        (processes.COORDINATOR, "host", "--coordinator=host: must be host:port"),
        (processes.INDEX, "-1", "--process_id=-1: must be a whole number"),
        (processes.INDEX, "4", "--process_id=4: must be below --processes=4"),
    ]:
        with pytest.raises(ValueError, match=words):
            processes.check(flags | {name: value})
