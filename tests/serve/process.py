"""The service as a process of its own, and the model that it serves in tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rmjax.run import training
from rmjax.serve.client import Client, ServiceError
from tests import ROOT
from tests.runs import tiny

SMALL = {"rehearsal.recollection": 0.0, "rehearsal.familiarity": 0.0, "machine.layers": 1}
SMALL |= {"train.steps": 1, "train.eval_every": 1, "train.save_every": 1, "teacher.steps": 1}


def trained(workdir: Path, **changes) -> Path:
    """Trains a small model for one step, so that it has a workdir."""
    training.train(tiny(**SMALL | changes), workdir)
    return workdir


def command(workdir: Path, store: Path, *flags: str) -> list[str]:
    """The line that serves a model."""
    line = [sys.executable, "-m", "rmjax.serve", f"--workdir={workdir}", f"--store={store}"]
    return [*line, *flags]


def environment(workdir: Path) -> dict[str, str]:
    """The variables of a service, which keeps its compiled programs beside the workdir."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@contextlib.contextmanager
def served(
    workdir: Path, store: Path, *flags: str, before: tuple[str, ...] = ()
) -> Iterator[tuple[subprocess.Popen, Client]]:
    """Starts a service, waits until it is ready, and ends it by SIGTERM if it still runs.

    Args:
      workdir: of the model.
      store: path of the database.
      flags: more flags.
      before: the start of the line, such as strace and its flags.

    Yields:
      The process, whose log `log_of` reads, and a client.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    line = [*before, *command(workdir, store, f"--port={port}", *flags)]
    log = workdir.parent / "service.log"
    with log.open("w") as file:
        process = subprocess.Popen(line, env=environment(workdir), stderr=file, stdout=file)
    try:
        client, begin = Client(f"http://127.0.0.1:{port}"), time.monotonic()
        while not _ready(client):
            assert process.poll() is None, log_of(workdir)
            assert time.monotonic() - begin < 120, log_of(workdir)
            time.sleep(0.05)
        yield process, client
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                process.kill()


def log_of(workdir: Path) -> str:
    """The log of the last service of a workdir."""
    return (workdir.parent / "service.log").read_text()


def _ready(client: Client) -> bool:
    try:
        return client.ready()
    except (OSError, ServiceError):
        return False


def refused(workdir: Path, store: Path, *flags: str) -> str:
    """Starts a service that must end at once with exit code 1; returns its error."""
    line = command(workdir, store, "--port=0", *flags)
    done = subprocess.run(
        line, env=environment(workdir), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stderr
