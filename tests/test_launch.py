"""Launchers and exit codes, with stand-ins for the commands of a cluster."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rmjax.serve import command
from rmjax.serve.http import app, server
from tests import ROOT

LAUNCH = ROOT / "launch"
# Asked to stop, or a process was lost; killed by JAX; killed by the system.
AGAIN = (75, 134, 137)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="launches with bash")


def launch(
    tmp_path: Path, commands: dict[str, str], *line: str, **variables: str
) -> tuple[int, list[str]]:
    """Runs a launcher, with `commands` {name: bash} first in the path.

    Returns:
      The exit code, and the printed lines.
    """
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables
    command, options = ["bash", *line], dict(capture_output=True, text=True, timeout=60)
    done = subprocess.run(command, env=env, cwd=tmp_path, **options)
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("code", [0, 1, *AGAIN, 200])
def test_slurm_requeues_a_job_unless_it_ended_or_made_a_mistake(tmp_path, code):
    commands = {"srun": f'echo "$@"; exit {code}', "scontrol": 'echo "$@"'}
    job = dict(SLURM_SUBMIT_DIR=str(tmp_path), SLURM_CPUS_PER_TASK="7", SLURM_JOB_ID="12")
    script = str(LAUNCH / "slurm.sbatch")
    ended, (step, *queued) = launch(tmp_path, commands, script, "--config=c", **job)
    assert ended == code and step == "--cpus-per-task=7 .venv/bin/python -m rmjax.main --config=c"
    assert queued == (["requeue 12"] if code in AGAIN else [])
    often = job | {"SLURM_RESTART_COUNT": "100"}
    assert len(launch(tmp_path, commands, script, **often)[1]) == 1


@pytest.mark.parametrize("code", [0, 1, *AGAIN, 255, 200])
def test_a_tpu_pod_starts_again_unless_it_ended_or_a_host_made_a_mistake(tmp_path, code):
    """The third start succeeds. Between starts the launcher clears the hosts."""
    run = f'echo run >> ran; [ "$(wc -l < ran)" -lt 3 ] || exit 0; exit {code}'
    gcloud = f'case "$*" in *pkill*) echo cleared; exit "${{HOSTS:-0}}" ;; esac; {run}'
    line = [str(LAUNCH / "tpu_pod.sh"), "pod", "zone", "--config=c"]
    ended, cleared = launch(tmp_path, {"gcloud": gcloud}, *line)
    again = code in (*AGAIN, 255)
    assert (ended, len(cleared)) == ((0, 2) if again else (code, 0))
    (tmp_path / "ran").unlink()
    if again:
        assert launch(tmp_path, {"gcloud": gcloud}, *line, HOSTS="200") == (200, ["cleared"])


@pytest.mark.parametrize(
    ("gpu", "asked", "tested"),
    [("yes", "", "gpu"), ("no", "", "cpu"), ("yes", "cpu", "cpu"), ("yes", "cuda", "gpu")],
)
def test_the_check_of_a_gpu_says_what_it_tested(tmp_path, gpu, asked, tested):
    """The stand-in for Python has a GPU or none, and its pytest notes the platform."""
    python = f"""case "$*" in
        *'devices("cuda")'*) [ {gpu} = yes ] ;;
        *default_backend*) case $JAX_PLATFORMS in cuda*) echo gpu ;; *) echo cpu ;; esac ;;
        *pytest*) echo "$JAX_PLATFORMS" > {tmp_path}/platform ;;
        *) echo '{{"step_ms": 1.5}}' ;;
    esac"""
    small = dict(PYTHON=str(tmp_path / "python"), KINDS="off:float32", BATCHES="2", MEMORIA="lm")
    line = [str(LAUNCH / "gpu_check.sh"), str(tmp_path / "out")]
    ended, printed = launch(tmp_path, {"python": python}, *line, JAX_PLATFORMS=asked, **small)
    assert ended == 0 and f"equality tests: passed on the {tested}" in printed
    stages = ["first", "compile", "equality", "step", "streaming", "memoria"]
    assert [line.split()[0].rstrip(":") for line in printed] == stages
    assert (tmp_path / "platform").read_text().startswith("cuda" if tested == "gpu" else "cpu")


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.name)
def test_manifests_name_their_kind(path):
    for manifest in yaml.safe_load_all(path.read_text()):
        assert manifest["apiVersion"] and manifest["kind"] and manifest["metadata"]["name"]


def test_pods_of_the_service_keep_their_users():
    text = (LAUNCH / "serve_statefulset.yaml").read_text()
    service, pods = (one["spec"] for one in yaml.safe_load_all(text))
    assert service["clusterIP"] == "None" and pods["serviceName"] == "rmjax-serve"
    labels = pods["template"]["metadata"]["labels"]
    assert labels == service["selector"] == pods["selector"]["matchLabels"]
    pod = pods["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "rmjax.serve"]
    given = dict(one.removeprefix("--").split("=") for one in container["args"])
    flags = inspect.getsource(command.define_flags)
    assert all(f'("{name}"' in flags for name in given)
    (port,) = container["ports"]
    assert int(given["port"]) == port["containerPort"] == service["ports"][0]["port"]
    (token,) = container["env"]
    assert token["name"] == "RMJAX_TOKEN" and token["valueFrom"]["secretKeyRef"]["key"] == "token"
    mounts = {one["name"]: one for one in container["volumeMounts"]}
    (own,) = pods["volumeClaimTemplates"]  # each pod has one
    assert given["store"].startswith(mounts[own["metadata"]["name"]]["mountPath"])
    (shared,) = pod["volumes"]
    assert given["workdir"].startswith(mounts[shared["name"]]["mountPath"])
    assert mounts[shared["name"]]["readOnly"]
    assert pod["terminationGracePeriodSeconds"] > server._END
    paths = {
        name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")
    }
    assert [one["path"] for one in paths.values()] == ["/healthz", "/healthz", "/readyz"]
    assert all(one["port"] == port["name"] for one in paths.values())
    assert all(f'"{one["path"]}"' in inspect.getsource(app) for one in paths.values())
