"""Drills: a run that is killed at random moments ends like an undisturbed run."""

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

from tests import ROOT
from tests.runs import lines, saved

CARD = """
from tests import runs
from tests import ROOT

def get_config(arg=""):
    every = {"train.eval_every": 50, "train.save_every": 7}
    return runs.tiny(**every, **{"train.steps": 600, "teacher.steps": 200})
"""


def command(tmp_path: Path, workdir: Path) -> tuple[list[str], dict]:
    (tmp_path / "card.py").write_text(CARD)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    line = [sys.executable, "-m", "rmjax.main", f"--config={tmp_path / 'card.py'}"]
    line.append(f"--workdir={workdir}")
    return line, {"env": environment, "cwd": tmp_path, "stderr": subprocess.DEVNULL, "text": True}


def counts(workdir: Path) -> list[int]:
    """The number of the teacher's and of the model's checkpoints."""
    return [len(list((workdir / stage).glob("[0-9]*[0-9]"))) for stage in ("teacher", "model")]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_ended_at_ten_random_moments(tmp_path, seed):
    """SIGKILL or SIGTERM ends it, in the teacher's training or the model's."""
    line, how = command(tmp_path, tmp_path / "whole")
    table = subprocess.run(line, stdout=subprocess.PIPE, check=True, **how).stdout
    expected, draw = lines(tmp_path / "whole"), random.Random(seed)

    line, how = command(tmp_path, tmp_path / "ended")
    metrics = tmp_path / "ended" / "metrics.jsonl"
    for part in range(10):
        # The number of lines after which the run is ended.
        until = draw.randrange(part * len(expected) // 10, (part + 1) * len(expected) // 10)
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, **how)
        written = lambda: metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        while process.poll() is None and written() <= until:
            time.sleep(draw.random() / 100)
        assert process.poll() is None, "it ended before it could be stopped"
        before = counts(tmp_path / "ended")
        process.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM]))
        assert process.wait() in (-signal.SIGKILL, 75)
        after = counts(tmp_path / "ended")
        # One checkpoint may be about to be rotated out.
        assert all(new >= old - 1 for new, old in zip(after, before, strict=True))
    assert subprocess.run(line, stdout=subprocess.PIPE, check=True, **how).stdout == table
    assert lines(tmp_path / "ended") == expected
    for stage in ("teacher", "model"):
        ended, expected_state = (saved(tmp_path / name, stage) for name in ("ended", "whole"))
        chex.assert_trees_all_equal(ended, expected_state)
