"""The service of a small model as a process of its own, see `tests.serve.served`."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rmjax.serve.client import Client, ServiceError
from tests import ROOT


def start(store: Path, *flags: str, before: tuple[str, ...] = (), **more) -> subprocess.Popen:
    """Starts a service, see `log_of`.

    Args:
      store: path of the database.
      flags: more flags.
      before: the start of the line, such as strace and its flags.
      more: more variables of the environment.
    """
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "GLIBC_TUNABLES": "glibc.malloc.perturb=0",  # it does not begin again
    }
    line = [*before, sys.executable, "-m", "tests.serve.served", "--workdir=."]
    line += [f"--store={store}", *flags]
    with log_of(store).open("w") as log:
        return subprocess.Popen(
            line, env=environment | more, stdout=log, stderr=log, start_new_session=True
        )


def log_of(store: Path) -> Path:
    """The log of the last service of a store; it is beside the folder of the store."""
    return store.parent.with_name(f"{store.parent.name}.log")


def compiled(folder: Path) -> dict[str, str]:
    """Variables by which services keep their compiled programs in a folder."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@contextlib.contextmanager
def served(
    store: Path, *flags: str, before: tuple[str, ...] = ()
) -> Iterator[tuple[subprocess.Popen, Client]]:
    """A service that is ready; SIGTERM ends it, if it still runs.

    Args:
      store: as in `start`.
      flags: as in `start`.
      before: as in `start`.

    Yields:
      The process and a client.
    """
    process = start(store, "--port=0", *flags, before=before)
    try:
        while not (address := re.search(r"(http://\S+): serves", log_of(store).read_text())):
            _wait(process, store)
        client = Client(address[1])
        while not _ready(client):
            _wait(process, store)
        yield process, client
    finally:
        _end(process, signal.SIGTERM)


def _wait(process: subprocess.Popen, store: Path) -> None:
    """Waits a little for a service, which must not have ended."""
    assert process.poll() is None, log_of(store).read_text()
    time.sleep(0.05)


def _end(process: subprocess.Popen, sign: signal.Signals) -> None:
    """Ends a process and its children, such as those of strace."""
    if process.poll() is None:
        os.killpg(process.pid, sign)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            _end(process, signal.SIGKILL)


def _ready(client: Client) -> bool:
    try:
        return client.ready()
    except (OSError, ServiceError):
        return False


def refused(store: Path, *flags: str, **more: str) -> str:
    """Starts a service that must end with exit code 1; returns its log.

    Args:
      store: as in `start`.
      flags: as in `start`.
      more: as in `start`.
    """
    code = start(store, "--port=0", *flags, **more).wait(120)
    log = log_of(store).read_text()
    assert code == 1 and "Traceback" not in log, (code, log)
    return log
