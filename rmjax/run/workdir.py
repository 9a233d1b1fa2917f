"""One process at a time in a working directory, and a clean way out when the machine is taken away."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from rmjax.io import atomic, progress

# Of one of several processes. The others are then killed by JAX (128 + a signal), and SLURM reports the highest code.
EXIT_MISTAKE = 200
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same line again and it goes on


@contextlib.contextmanager
def lock(workdir: str | Path, *, reading: bool = False) -> Iterator[None]:
    """Holds `workdir` for this process; the system lets go of it however the process ends.

    The folder itself is locked, and a file `lock` in it, which says who holds it. Deleting that file
    frees nothing. Some file systems lock only files (NFS). Some lock nothing: a warning says so.

    Args:
      workdir: made if missing, unless `reading`.
      reading: nothing is written there. Several processes may read at once, but not beside a writer.

    Raises:
      RuntimeError: another process holds it; says which one and what to do.
      OSError: nothing can be written there, and it is not only read.
    """
    folder = Path(workdir)
    path, how, flags = folder / "lock", fcntl.LOCK_EX, os.O_RDWR | os.O_CREAT
    if reading:
        how, flags = fcntl.LOCK_SH, os.O_RDONLY
    with contextlib.ExitStack() as held:
        opened: list[_Opened] = []
        try:
            if not reading:
                folder.mkdir(parents=True, exist_ok=True)
            opened.append(held.enter_context(_Opened(folder, os.O_RDONLY)))
            opened.append(held.enter_context(_Opened(path, flags)))
        except OSError as error:
            if not reading:
                cause = "it is a file" if folder.is_file() else error.strerror
                cure = "name another directory"
                raise OSError(
                    f"--workdir={workdir} cannot be written to ({cause}): {cure}"
                ) from error
        if opened and not any([_take(one, how, path) for one in opened]):
            logging.warning(
                "%s: this file system has no locks, so nothing keeps a second run out: start one at a time, or name "
                "another --workdir.",
                folder,
            )
        if not reading:
            _sign(opened[-1], path)
        yield


def _take(opened: _Opened, how: int, path: Path) -> bool:
    """Locks a file or folder; False where the file system cannot."""
    try:
        fcntl.flock(opened, how | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(
            f"{path} is held by {_holder(path)}: wait for it to end, stop it (kill its pid), or use another workdir"
        ) from None
    except OSError:
        return False
    return True


def _holder(path: Path) -> str:
    """Who signed the lock; a process that only reads does not."""
    with contextlib.suppress(OSError):
        signed = re.match(r"pid (\d+) on (\S+)", path.read_text())
        if signed and (signed[2] != socket.gethostname() or _alive(int(signed[1]))):
            return signed[0]
    return "another process, such as an evaluation"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def _sign(opened: _Opened, path: Path) -> None:
    name = f"pid {os.getpid()} on {socket.gethostname()}\n".encode()
    try:
        os.ftruncate(opened.fileno(), 0)
        os.pwrite(opened.fileno(), name, 0)
    except OSError as error:
        raise atomic.explained(error, path, len(name)) from error


class _Opened:
    """An open file or folder. A forked child closes it: else it would hold the lock after its parent."""

    def __init__(self, path: Path, flags: int):
        self._descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
        _OPEN.add(self)

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        if self in _OPEN:
            _OPEN.remove(self)
            os.close(self._descriptor)

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_) -> None:
        self.close()


_OPEN: set[_Opened] = set()


def _close_all() -> None:
    for opened in list(_OPEN):
        opened.close()


os.register_at_fork(after_in_child=_close_all)


def leave_when_asked() -> None:
    """Makes SIGTERM and SIGINT end this process at once with EXIT_PREEMPTED, except within a `Preemption`.

    A main program calls it before its imports, which take seconds: nothing can be lost then.
    """

    def leave(number: int, _) -> None:
        os.write(2, b"Stopped: run the same line again to go on.\n")
        os._exit(EXIT_PREEMPTED)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


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
            self._old = {
                number: signal.signal(number, self._request)
                for number in (signal.SIGTERM, signal.SIGINT)
            }
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
