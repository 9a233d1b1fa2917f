"""A lock on a workdir, and a clean end when the run is preempted."""

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
from types import FrameType
from typing import Any

from absl import logging

from rmjax.io import atomic, progress

# Exit code for an error in one of several processes. JAX then kills the others (128 + a signal),
# and SLURM reports the highest code.
EXIT_MISTAKE = 200
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same line, run again, continues


@contextlib.contextmanager
def lock(workdir: str | Path, *, reading: bool = False, name: str = "workdir") -> Iterator[None]:
    """Locks a workdir for this process. The system releases the lock however the process ends.

    The folder is locked, and so is the file `lock` in it, which names the process. Deleting the
    file releases nothing. Some file systems lock only files (NFS). Some lock nothing, which causes
    a warning.

    Args:
      workdir: is made if missing, unless `reading`.
      reading: nothing is written in the workdir. Several processes may read at once, but not while
        one writes.
      name: of the flag or argument, for errors.

    Yields:
      None, while the lock is held.

    Raises:
      RuntimeError: another process holds the lock, or this one does already; names the process and
        the cure.
      OSError: the workdir cannot be written to, and `reading` is False.
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
                message = f"--{name}={workdir} cannot be written to ({cause})"
                raise OSError(f"{message}: name another directory") from error
        if opened and not any([_take(one, how, path, name) for one in opened]):
            logging.warning(
                "%s: this file system has no locks, so nothing keeps a second run out: start one "
                "at a time, or name another --%s.",
                folder,
                name,
            )
        if not reading:
            _sign(opened[-1], path)
        try:
            yield
        finally:
            # This process does not hold what others lock later; a forked child closed it.
            if not reading and opened[-1] in _OPEN:
                with contextlib.suppress(OSError):
                    os.ftruncate(opened[-1].fileno(), 0)


def _take(opened: _Opened, how: int, path: Path, name: str) -> bool:
    """Locks a file or folder; False if the file system cannot."""
    try:
        fcntl.flock(opened, how | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(path)
        cure = "wait for it to end, stop it (kill its pid)"
        if holder == f"pid {os.getpid()} on {socket.gethostname()}":
            cure = "that is this process: close what holds it here"  # a notebook must not be killed
        raise RuntimeError(f"{path} is held by {holder}: {cure}, or use another {name}") from None
    except OSError:
        return False
    return True


def _holder(path: Path) -> str:
    """The process that signed the lock. A process that only reads does not sign."""
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
    except OSError:  # the process is another user's
        return True
    return True


def _sign(opened: _Opened, path: Path) -> None:
    """Writes the name of this process into the lock file."""
    name = f"pid {os.getpid()} on {socket.gethostname()}\n".encode()
    try:
        os.ftruncate(opened.fileno(), 0)
        os.pwrite(opened.fileno(), name, 0)
    except OSError as error:
        raise atomic.explained(error, path, len(name)) from error


class _Opened:
    """An open file or folder.

    A forked child closes it, since it would otherwise hold the lock after its parent has ended.
    """

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

    def __exit__(self, *_: object) -> None:
        self.close()


_OPEN: set[_Opened] = set()


def _close_all() -> None:
    for opened in list(_OPEN):
        opened.close()


os.register_at_fork(after_in_child=_close_all)


def leave_when_asked() -> None:
    """Makes SIGTERM and SIGINT end this process at once with EXIT_PREEMPTED.

    A `Preemption` replaces this as long as it is entered. A main program calls this function before
    its imports. They take seconds, in which nothing can be lost.
    """

    def leave(number: int, _: FrameType | None) -> None:
        os.write(2, b"Stopped: run the same line again to go on.\n")
        os._exit(EXIT_PREEMPTED)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


class Preemption:
    """While entered, SIGTERM and SIGINT only set `requested`, so the loop can save and leave.

    They also set `io.progress.REQUEST`, so the preparation of data stops. A second SIGINT raises
    KeyboardInterrupt. Outside the main thread handlers cannot be set, and nothing happens.
    """

    def __init__(self) -> None:
        self.requested = False
        self._old: dict[int, Any] = {}  # the handlers before

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGTERM, signal.SIGINT)
            self._old = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set from Python
        if self._old:
            progress.REQUEST.made = False
        self._old = {}

    def _request(self, number: int, _: FrameType | None) -> None:
        self.requested = progress.REQUEST.made = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
