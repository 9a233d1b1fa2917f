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

from tests import ROOT
from tests.runs import lines, saved

CARD = """
from tests import runs
from tests import ROOT

def get_config(arg=""):
    changes = {"train.steps": 600, "train.eval_every": 50, "train.save_every": 7, "teacher.steps": 200}
    return runs.tiny(**changes)
"""


def command(tmp_path: Path, workdir: Path) -> tuple[list[str], dict]:
    (tmp_path / "card.py").write_text(CARD)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    line = [
        sys.executable,
        "-m",
        "rmjax.main",
        f"--config={tmp_path / 'card.py'}",
        f"--workdir={workdir}",
    ]
    return line, {"env": environment, "cwd": tmp_path, "stderr": subprocess.DEVNULL, "text": True}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_ended_at_ten_random_moments(tmp_path, seed):
    """By SIGKILL or SIGTERM, in the teacher's training or the model's: thirty moments in all."""
    line, how = command(tmp_path, tmp_path / "whole")
    table = subprocess.run(line, stdout=subprocess.PIPE, check=True, **how).stdout
    expected, draw = lines(tmp_path / "whole"), random.Random(seed)

    line, how = command(tmp_path, tmp_path / "ended")
    metrics = tmp_path / "ended" / "metrics.jsonl"
    for part in range(10):
        until = draw.randrange(
            part * len(expected) // 10, (part + 1) * len(expected) // 10
        )  # lines written
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, **how)
        while process.poll() is None and not (
            metrics.exists() and metrics.read_bytes().count(b"\n") > until
        ):
            time.sleep(draw.random() / 100)
        assert process.poll() is None, "it ended before it could be stopped"
        kept = [
            len(list((tmp_path / "ended" / stage).glob("[0-9]*[0-9]")))
            for stage in ("teacher", "model")
        ]
        process.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM]))
        assert process.wait() in (-signal.SIGKILL, 75)
        left = [
            len(list((tmp_path / "ended" / stage).glob("[0-9]*[0-9]")))
            for stage in ("teacher", "model")
        ]
        assert all(
            now >= then - 1 for now, then in zip(left, kept, strict=True)
        )  # one may be about to be rotated out
    assert subprocess.run(line, stdout=subprocess.PIPE, check=True, **how).stdout == table
    assert lines(tmp_path / "ended") == expected
    for stage in ("teacher", "model"):
        chex.assert_trees_all_equal(
            saved(tmp_path / "ended", stage), saved(tmp_path / "whole", stage)
        )
