"""One process at a time in a working directory, and a clean way out when the machine is taken away."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from rmjax.io import progress

# Of one of several processes. The others are then killed by JAX (128 + a signal), and SLURM reports the highest code.
EXIT_MISTAKE = 200
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same line again and it goes on


@contextlib.contextmanager
def lock(workdir: str | Path) -> Iterator[None]:
    """Holds `workdir` (made if missing) for this process; the system lets go of it however the process ends.

    Raises:
      RuntimeError: another process holds it; says which one and what to do.
      OSError: nothing can be written there.
    """
    path = Path(workdir) / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+")
    except OSError as error:
        raise OSError(f"--workdir={workdir} cannot be written to ({error.strerror}): name another directory") from error
    with opened as file:
        os.register_at_fork(after_in_child=file.close)  # or a forked worker would hold on after our death
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RuntimeError(
                f"{path} is held by {holder}: wait for it to end, stop it (kill its pid), or use another workdir"
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


class Preemption:
    """While entered, SIGTERM and SIGINT only set `requested`, so that the loop can checkpoint and leave.

    They make `io.progress.REQUEST` too, so that data in preparation are left.

    A second SIGINT raises KeyboardInterrupt. Outside the main thread, where handlers cannot be set, does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._old: dict = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python
        if self._old:
            progress.REQUEST.made = False
        self._old = {}

    def _request(self, number: int, _) -> None:
        self.requested = progress.REQUEST.made = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
