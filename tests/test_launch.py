"""What the launchers do with an exit code, before clusters that are made up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

LAUNCH = ROOT / "launch"
AGAIN = (75, 134, 137)  # asked to stop, or a process was lost; killed by JAX, by the system
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="launches with bash")


def launch(
    tmp_path: Path, commands: dict[str, str], *line: str, **more: str
) -> tuple[int, list[str]]:
    """-> exit code, lines printed, with those commands (name -> bash) first in the path."""
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | more
    found = subprocess.run(
        ["bash", *line], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    return found.returncode, found.stdout.splitlines()


@pytest.mark.parametrize("code", [0, 1, *AGAIN, 200])
def test_slurm_queues_a_job_again_unless_it_ended_or_is_a_mistake(tmp_path, code):
    commands = {"srun": f'echo "$@"; exit {code}', "scontrol": 'echo "$@"'}
    job = dict(SLURM_SUBMIT_DIR=str(tmp_path), SLURM_CPUS_PER_TASK="7", SLURM_JOB_ID="12")
    ended, (step, *queued) = launch(
        tmp_path, commands, str(LAUNCH / "slurm.sbatch"), "--config=c", **job
    )
    assert ended == code and step == "--cpus-per-task=7 .venv/bin/python -m rmjax.main --config=c"
    assert queued == (["requeue 12"] if code in AGAIN else [])
    often = job | {"SLURM_RESTART_COUNT": "100"}
    assert len(launch(tmp_path, commands, str(LAUNCH / "slurm.sbatch"), **often)[1]) == 1


@pytest.mark.parametrize("code", [0, 1, *AGAIN, 255, 200])
def test_a_tpu_pod_goes_on_unless_it_ended_or_any_host_made_a_mistake(tmp_path, code):
    """The third start ends well. Between starts the hosts are cleared."""
    run = f'echo run >> ran; [ "$(wc -l < ran)" -lt 3 ] || exit 0; exit {code}'
    gcloud = f'case "$*" in *pkill*) echo cleared; exit "${{HOSTS:-0}}" ;; esac; {run}'
    line = [str(LAUNCH / "tpu_pod.sh"), "pod", "zone", "--config=c"]
    ended, cleared = launch(tmp_path, {"gcloud": gcloud}, *line)
    again = code in (*AGAIN, 255)
    assert (ended, len(cleared)) == ((0, 2) if again else (code, 0))
    (tmp_path / "ran").unlink()
    if again:
        assert launch(tmp_path, {"gcloud": gcloud}, *line, HOSTS="200") == (200, ["cleared"])
