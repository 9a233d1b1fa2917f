"""Drills: a run killed outright at random moments ends as one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import pytest

from tests.runs import lines, saved

CARD = """
from tests import runs

def get_config(arg=""):
    changes = {"train.steps": 600, "train.eval_every": 50, "train.save_every": 7, "teacher.steps": 200}
    return runs.tiny(**changes)
"""


def command(tmp_path: Path, workdir: Path) -> tuple[list[str], dict]:
    (tmp_path / "card.py").write_text(CARD)
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    line = [sys.executable, "-m", "rmjax.main", f"--config={tmp_path / 'card.py'}", f"--workdir={workdir}"]
    return line, {"env": environment, "cwd": tmp_path, "stderr": subprocess.DEVNULL, "text": True}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_three_random_moments(tmp_path, seed):
    line, how = command(tmp_path, tmp_path / "whole")
    table = subprocess.run(line, stdout=subprocess.PIPE, check=True, **how).stdout
    expected, draw = lines(tmp_path / "whole"), random.Random(seed)

    line, how = command(tmp_path, tmp_path / "killed")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    for third in range(3):
        until = draw.randrange(third * len(expected) // 3, (third + 1) * len(expected) // 3)  # lines written
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, **how)
        while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > until):
            time.sleep(draw.random() / 100)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(line, stdout=subprocess.PIPE, check=True, **how).stdout == table
    assert lines(tmp_path / "killed") == expected
    for stage in ("teacher", "model"):
        chex.assert_trees_all_equal(saved(tmp_path / "killed", stage), saved(tmp_path / "whole", stage))
